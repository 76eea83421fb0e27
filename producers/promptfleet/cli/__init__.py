"""The command line: `promptfleet demo | dev | enqueue | submit | result | status | …`."""

from __future__ import annotations

from typing import Annotated

import typer

from promptfleet.cli import (
    api,
    audit,
    callbacks,
    config,
    cost,
    demo,
    doctor,
    environment_command,
    jobs,
    keys,
    route,
    servers,
    status,
    submit,
)
from promptfleet.cli.exits import EXPLAINED
from promptfleet.cli.terminal import Commands, print_text
from promptfleet_shared import __version__

app = typer.Typer(
    cls=Commands,
    name="promptfleet",
    help="A fleet of workers for LLM prompts.",
    epilog=EXPLAINED,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_JOBS, _FLEET, _CHECKS = "Prompts", "Running a fleet", "Looking after it"
_EXTRA_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command(rich_help_panel=_JOBS)(jobs.enqueue)
app.command(rich_help_panel=_JOBS)(submit.submit)
app.command(rich_help_panel=_JOBS)(audit.audit)
app.command(rich_help_panel=_JOBS)(jobs.result)
app.command(rich_help_panel=_JOBS)(jobs.cancel)
app.command(rich_help_panel=_FLEET)(demo.demo)
app.command(rich_help_panel=_FLEET)(servers.dev)
app.command(rich_help_panel=_FLEET, context_settings=_EXTRA_ARGUMENTS)(servers.worker)
app.command(rich_help_panel=_FLEET)(api.api)
app.command(rich_help_panel=_FLEET)(servers.migrate)
app.command(rich_help_panel=_CHECKS)(status.status)
app.command(rich_help_panel=_CHECKS)(cost.cost)
app.command(rich_help_panel=_CHECKS)(doctor.doctor)
app.command(rich_help_panel=_CHECKS)(route.route)
app.command("env", rich_help_panel=_CHECKS)(environment_command.env)
app.add_typer(callbacks.app, name="callbacks", rich_help_panel=_CHECKS)
app.add_typer(keys.app, name="keys", rich_help_panel=_CHECKS)
app.add_typer(config.app, name="config", rich_help_panel=_CHECKS)


def _show_version(wanted: bool) -> None:  # noqa: FBT001  # typer calls it so
    if wanted:
        print_text(f"promptfleet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """A fleet of workers for LLM prompts."""


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    app()
