"""What all commands print with, and how an error becomes one clear line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from promptfleet.cli.exits import ExitCode, exit_code_of
from promptfleet_shared.errors import PromptFleetError, StoreUnavailableError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


class Commands(TyperGroup):
    """A group of commands whose errors are lines on stderr, never tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see `exits` for what its errors end with."""
        try:
            return super().invoke(ctx)
        except PromptFleetError as error:
            complain(explain(error))
            raise typer.Exit(exit_code_of(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def explain(error: PromptFleetError) -> str:
    """What to tell about the error, with what to do where that is known."""
    text = error.message
    if isinstance(error, StoreUnavailableError):
        text += " Is `promptfleet dev` running, or PROMPTFLEET_DATABASE_URL right?"
    if job := error.facts.get("job_id"):
        text += f" (job {job})"
    return text


def out() -> Console:
    """For what was asked for; made anew, so that it follows a redirected stdout."""
    return Console(highlight=False)


def err() -> Console:
    """For everything else: progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def complain(text: str) -> None:
    """One error on stderr."""
    console = err()
    console.print("[bold red]error:[/] ", end="", soft_wrap=True)
    console.print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """A remark on stderr."""
    err().print(text, style="dim", markup=False, soft_wrap=True)


def print_text(text: str) -> None:
    """A model's text as it is: no markup, no wrapping."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def print_json(value: object) -> None:
    """One JSON document on stdout, indented."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
    print_text(orjson.dumps(value, default=str, option=options).decode())


def table(*columns: str, title: str | None = None, left: Iterable[str] = ()) -> Table:
    """A plain table; all columns but the first and those in `left` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    lefts = {columns[0], *left}
    for column in columns:
        made.add_column(
            column,
            justify="left" if column in lefts else "right",
            header_style="dim",
            overflow="fold",
        )
    return made
