"""`promptfleet callbacks …`: what became of callbacks, and how to deliver them again."""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING, Annotated

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.reports import store_connection
from promptfleet.cli.terminal import (
    Commands,
    JsonFlag,
    complain,
    note,
    out,
    print_json,
    print_text,
)
from promptfleet_shared.egress import check_url
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.signing import new_secret

if TYPE_CHECKING:
    from promptfleet_shared.store.callbacks import CallbackRow, Replay

app = typer.Typer(
    cls=Commands, help="List callbacks, and deliver them again.", no_args_is_help=True
)

_STATES = ("pending", "delivered", "exhausted")


@app.command("list")
def list_(
    *,
    state: Annotated[
        str | None, typer.Option(help=f"Only those that are {', '.join(_STATES)}.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show this tenant's callbacks and what became of them, the newest first."""
    from promptfleet_shared.store.callbacks import (  # noqa: PLC0415  # slow to import
        CallbackState,
        list_callbacks,
    )

    if state is not None and state not in _STATES:
        msg = f"--state: must be one of {', '.join(_STATES)}, not {state!r}"
        raise InvalidRequestError(msg, field="state")
    settings = find_settings(data_dir)
    wanted = None if state is None else CallbackState(state)
    with store_connection(settings) as connection:
        found = list_callbacks(connection, tenant=settings.tenant, state=wanted, limit=limit)
    if as_json:
        print_json([dataclasses.asdict(row) for row in found])
    elif found:
        _show(found)
    else:
        note("There are no such callbacks.")


@app.command()
def replay(
    id: Annotated[  # noqa: A002  # what users call it
        str | None, typer.Argument(help="The callback's id, with or without msg_ before it.")
    ] = None,
    *,
    exhausted: Annotated[
        bool, typer.Option("--exhausted", help="All that were given up, instead of one.")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="With --exhausted: only those to this URL.")
    ] = None,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Deliver a callback again, under the same webhook-id; exit 1 if that can't be."""
    from promptfleet_shared.store.callbacks import (  # noqa: PLC0415  # slow to import
        replay_exhausted,
        replay_one,
    )

    if (id is None) is not exhausted or (endpoint is not None and not exhausted):
        msg = "name one callback's id, or --exhausted, optionally with --endpoint"
        raise InvalidRequestError(msg, field="id")
    settings = find_settings(data_dir)
    callback_id = None if id is None else _callback_id(id)
    url = None if endpoint is None else _normal(endpoint)
    with store_connection(settings) as connection, connection.begin():
        if callback_id is None:
            done = replay_exhausted(connection, tenant=settings.tenant, endpoint=url)
        else:
            done = replay_one(connection, callback_id, tenant=settings.tenant)
    _tell(done, as_json=as_json, one=callback_id is not None)


@app.command()
def enable(
    url: Annotated[str, typer.Argument(help="An endpoint that answered 410, or that is paused.")],
    *,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Post to an endpoint again; exit 1 if it was neither disabled nor paused."""
    from promptfleet_shared.store.callbacks import enable_endpoint  # noqa: PLC0415  # slow

    settings = find_settings(data_dir)
    with store_connection(settings) as connection, connection.begin():
        was_closed = enable_endpoint(connection, _normal(url), tenant=settings.tenant)
    if as_json:
        print_json({"enabled": was_closed})
    elif was_closed:
        print_text("It is enabled; promptfleet callbacks replay --exhausted sends what it missed.")
    else:
        complain("this endpoint was neither disabled nor paused")
    if not was_closed:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def secret(*, as_json: JsonFlag = False) -> None:
    """Print a new secret to sign callbacks with; it is kept nowhere."""
    made = new_secret()
    if as_json:
        print_json({"secret": made})
    else:
        print_text(made)


def _callback_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text.removeprefix("msg_"))
    except ValueError:
        msg = f"id: must be a callback's id, not {text!r}; promptfleet callbacks list shows them"
        raise InvalidRequestError(msg, field="id") from None


def _normal(url: str) -> str:
    """The URL as it was stored."""
    return check_url(url, field="URL", allow_loopback=True).url


def _show(found: list[CallbackRow]) -> None:
    """A line each, that no terminal is too narrow for: ids are there to be copied."""
    console = out()
    for row in found:
        console.print(f"{row.id}  {row.state:<9}  {row.attempts:>2}  {row.event:<16}", end="  ")
        console.print(row.endpoint, end="  ", markup=False, soft_wrap=True)
        console.print(_answer(row), style="dim", markup=False, soft_wrap=True)


def _answer(row: CallbackRow) -> str:
    if row.last_error is not None:
        return row.last_error
    return "" if row.last_status is None else str(row.last_status)


def _tell(done: Replay, *, as_json: bool, one: bool) -> None:
    failed = one and not done.replayed
    if as_json:
        print_json(dataclasses.asdict(done))
    elif failed and not (done.disabled or done.in_flight):
        complain("there is no such callback")
    else:
        print_text(f"{_callbacks(done.replayed)} will be delivered again.")
        _tell_others(done)
    if failed:
        raise typer.Exit(ExitCode.FAILED)


def _tell_others(done: Replay) -> None:
    if done.disabled:
        note(
            f"{_callbacks(done.disabled)} left alone: the endpoint is disabled;"
            " promptfleet callbacks enable URL"
        )
    if done.in_flight:
        note(f"{_callbacks(done.in_flight)} left alone: being delivered just now")


def _callbacks(count: int) -> str:
    return f"{count:,} callback{'' if count == 1 else 's'}"
