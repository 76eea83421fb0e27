"""`promptfleet keys …`: who may use the HTTP API, and for which tenant."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

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
    table,
)
from promptfleet.cost_report import seconds_of
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.settings import Settings

if TYPE_CHECKING:
    from promptfleet_shared.store.keys import Key, NewKey

app = typer.Typer(cls=Commands, help="Make, list and revoke keys of the API.", no_args_is_help=True)

Tenant = Annotated[
    str | None, typer.Option("--tenant", help="Whose keys; by default PROMPTFLEET_TENANT.")
]
Prefix = Annotated[str, typer.Argument(help="What the key begins with, with or without pf_.")]


@app.command()
def create(
    *,
    tenant: Tenant = None,
    scopes: Annotated[
        str, typer.Option(help="What it may do: some of submit, read, admin, with commas.")
    ] = "submit,read",
    expires: Annotated[
        str | None, typer.Option(help="How long it lasts, e.g. 90d; by default until revoked.")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a key and print it: the only time that it is seen."""
    from promptfleet_shared.store.keys import create_key  # noqa: PLC0415  # slow to import

    wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    lasts_s = None if expires is None else seconds(expires, field="expires")
    with _tenants_keys(data_dir, tenant) as (connection, whose):
        made = create_key(connection, tenant=whose, scopes=wanted, name=name, expires_in_s=lasts_s)
    _tell_new(made, as_json=as_json)


@app.command("list")
def list_(
    *, tenant: Tenant = None, as_json: JsonFlag = False, data_dir: DataDir = DEFAULT_DATA_DIR
) -> None:
    """Show a tenant's keys, the newest first."""
    from promptfleet_shared.store.keys import list_keys  # noqa: PLC0415  # slow to import

    with _tenants_keys(data_dir, tenant) as (connection, whose):
        found = list_keys(connection, tenant=whose)
    if as_json:
        print_json([_record(key) for key in found])
    elif found:
        _show(found)
    else:
        note("There are no keys; promptfleet keys create makes one.")


@app.command()
def rotate(
    prefix: Prefix,
    *,
    overlap: Annotated[str, typer.Option(help="How long the old key goes on, e.g. 24h.")] = "24h",
    tenant: Tenant = None,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a key like this one, which expires after the overlap; exit 1 if that can't be."""
    from promptfleet_shared.store.keys import rotate_key  # noqa: PLC0415  # slow to import

    overlap_s = seconds(overlap, field="overlap")
    with _tenants_keys(data_dir, tenant) as (connection, whose):
        key = _find(connection, prefix, whose)
        made = rotate_key(connection, key.id, tenant=whose, overlap_s=overlap_s)
    if made is None:
        complain("this key is revoked or expired; promptfleet keys create makes another")
        raise typer.Exit(ExitCode.FAILED)
    _tell_new(made, as_json=as_json)
    note(f"pf_{key.prefix}… goes on for {overlap}.")


@app.command()
def revoke(
    prefix: Prefix,
    *,
    tenant: Tenant = None,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let a key open nothing any more, within seconds."""
    from promptfleet_shared.store.keys import revoke_key  # noqa: PLC0415  # slow to import

    with _tenants_keys(data_dir, tenant) as (connection, whose):
        key = _find(connection, prefix, whose)
        revoked = revoke_key(connection, key.id, tenant=whose)
    if as_json:
        print_json(_record(revoked or key))
    else:
        print_text(f"pf_{key.prefix}… opens nothing any more.")


def seconds(text: str, *, field: str) -> float:
    """Seconds from `90`, `90s`, `15m`, `24h`, `30d` or `2w`.

    Raises:
        InvalidRequestError: It is none of these.
    """
    parsed = seconds_of(text)
    if parsed is None:
        msg = f"--{field}: must be like 90s, 15m, 24h, 30d or 2w, not {text!r}"
        raise InvalidRequestError(msg, field=field)
    return parsed


@contextlib.contextmanager
def _tenants_keys(data_dir: DataDir, tenant: str | None) -> Iterator[tuple[Any, str]]:
    """A transaction that sees the tenant's keys, and the tenant."""
    from promptfleet_shared.store.keys import check_tenant  # noqa: PLC0415  # slow to import
    from promptfleet_shared.store.tenancy import set_tenant  # noqa: PLC0415

    settings: Settings = find_settings(data_dir)
    whose = check_tenant(tenant or settings.tenant)
    with store_connection(settings) as connection, connection.begin():
        set_tenant(connection, whose)
        yield connection, whose


def _find(connection: Any, prefix: str, tenant: str) -> Key:
    """The one key that begins so."""
    from promptfleet_shared.store.keys import MARK, PREFIX_LENGTH, list_keys  # noqa: PLC0415  # slow

    begin = prefix.removeprefix(MARK)[:PREFIX_LENGTH]  # of a whole key, too
    found = [key for key in list_keys(connection, tenant=tenant) if key.prefix.startswith(begin)]
    if len(found) != 1:
        how_many = "no key" if not found else f"{len(found)} keys"
        msg = f"prefix: {how_many} of {tenant} begins so; promptfleet keys list shows them"
        raise InvalidRequestError(msg, field="prefix")
    return found[0]


def _tell_new(made: NewKey, *, as_json: bool) -> None:
    if as_json:
        print_json({**_record(made.key), "key": made.secret})
        return
    print_text(made.secret)
    note(f"A key of {made.key.tenant} for {_scopes(made.key)}. Keep it: it is not shown again.")


def _record(key: Key) -> dict[str, Any]:
    return {**dataclasses.asdict(key), "scopes": sorted(key.scopes)}


def _show(found: list[Key]) -> None:
    left = ("name", "scopes", "state")
    made = table("key", "name", "scopes", "state", "expires", "last used", left=left)
    for key in found:
        made.add_row(
            f"pf_{key.prefix}…",
            key.name,
            _scopes(key),
            _state(key),
            "" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}",
            "" if key.last_used_at is None else f"{key.last_used_at:%Y-%m-%d %H:%M}",
        )
    out().print(made)


def _scopes(key: Key) -> str:
    return ", ".join(scope for scope in ("submit", "read", "admin") if scope in key.scopes)


def _state(key: Key) -> str:
    if key.usable:
        return "usable"
    return "expired" if key.revoked_at is None else "revoked"
