"""`promptfleet env`: the addresses of a running fleet for a shell."""

from __future__ import annotations

import shlex

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, running_fleet
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.terminal import JsonFlag, complain, print_json, print_text


def env(*, as_json: JsonFlag = False, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Print the running fleet's variables, passwords included: eval "$(promptfleet env)"."""
    found = running_fleet(data_dir)
    if not found:
        complain(f"no fleet of `promptfleet dev` runs on {data_dir}")
        raise typer.Exit(ExitCode.FAILED)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        print_text(f"export {name}={shlex.quote(value)}")
