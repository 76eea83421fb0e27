"""Exit codes, and which error ends a command with which."""

from __future__ import annotations

from enum import IntEnum

from promptfleet_shared.errors import (
    ConfigurationError,
    InvalidRequestError,
    PromptFleetError,
    WaitTimeoutError,
)


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1
    USAGE = 2
    JOBS_FAILED = 3
    NOT_YET = 4
    INTERRUPTED = 130


EXPLAINED = (
    "Exit codes: 0 all went well · 1 it could not be done · 2 wrong usage or configuration ·"
    " 3 it was done, but some jobs or lines failed · 4 not finished in time; the jobs go on ·"
    " 130 interrupted."
)


def exit_code_of(error: PromptFleetError) -> ExitCode:
    """The code for an error that ended a command."""
    match error:
        case WaitTimeoutError():
            return ExitCode.NOT_YET
        case ConfigurationError() | InvalidRequestError():
            return ExitCode.USAGE
        case _:
            return ExitCode.FAILED
