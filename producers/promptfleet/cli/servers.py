"""Commands that run things: dev, worker, migrate."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.console import Console

from promptfleet import local_model
from promptfleet.cli.api import has_api
from promptfleet.cli.environment import (
    DEFAULT_DATA_DIR,
    DataDir,
    find_settings,
    fleet_environment,
    without_password,
)
from promptfleet.cli.terminal import JsonFlag, note, out, print_json, print_text
from promptfleet.dev_stack.local_fleet import LocalProvider
from promptfleet.dev_stack.stack import (
    Addresses,
    DevStack,
    StackOptions,
    migrate_database,
    worker_command,
)
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.settings import Settings, load_settings

READY_LINE = "The fleet is ready."
_WATCH_S = 0.5
_EXTRA_DRAIN_S = 5.0  # beyond what the workers allow themselves
_PROVIDERS = ", ".join((*LocalProvider, "config"))

Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        help="local (a small real model), simulated, or config (what fleet.toml says);"
        " by default config where there is a fleet.toml, else local.",
    ),
]
Tiers = Annotated[
    list[str] | None, typer.Option("--tier", help="Serve this tier only; repeatable.")
]


def dev(
    *,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    provider: Provider = None,
    tier: Tiers = None,
    provider_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the provider, e.g. latency-ms=50; repeatable."),
    ] = None,
    flower: Annotated[bool, typer.Option(help="Run Flower as well.")] = True,
    api: Annotated[bool, typer.Option(help="Serve the HTTP API as well.")] = True,
    print_env: Annotated[
        bool, typer.Option("--print-env", help="Show the URLs with their passwords.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="Of the workers.")] = "WARNING",
) -> None:
    """Run a whole fleet on this machine: servers, provider, workers, API, Flower."""
    settings = load_settings()
    options = StackOptions(
        data_dir=data_dir,
        provider=choose_provider(provider, settings),
        config=settings.config_path,
        tiers=tuple(tier) if tier else None,
        database_url=_own_server("PROMPTFLEET_DATABASE_URL"),
        broker_url=_own_server("PROMPTFLEET_BROKER_URL"),
        provider_flags=tuple(_provider_flags(provider_option or [])),
        flower=flower,
        api=api and has_api(),
        worker_flags=("--loglevel", log_level.upper(), "--without-gossip"),
        drain_s=settings.drain_s + _EXTRA_DRAIN_S,
    )
    stack = DevStack(options, console=out(), on_step=lambda text: note(f"{text} …"))
    with _signals() as asked:
        run_until_asked(stack, asked, on_ready=lambda: _introduce(stack, print_env=print_env))


def run_until_asked(stack: DevStack, asked: AskedToStop, *, on_ready: Callable[[], None]) -> None:
    """Start the fleet, keep its servers alive, and drain it once a signal has come."""
    try:
        stack.start()
        on_ready()
        while not asked.event.wait(_WATCH_S):
            for name in stack.restart_dead_servers():
                note(f"{name} had ended by itself and was started again")
    finally:
        _drain(stack, asked)


def worker(
    context: typer.Context,
    *,
    tier: Annotated[list[str] | None, typer.Option("--tier", help="Repeatable.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Celery tasks at once.")] = None,
    log_level: Annotated[str, typer.Option(help="DEBUG to ERROR.")] = "INFO",
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Run a worker for some tiers; arguments after -- are Celery's own."""
    if not tier:
        raise ConfigurationError("--tier: name at least one, e.g. promptfleet worker --tier basic")
    require_workers()
    extra = ["--loglevel", log_level.upper()]
    if concurrency is not None:
        extra += ["--concurrency", str(concurrency)]
    command = worker_command(tier, extra=[*extra, *context.args])
    os.environ.update(fleet_environment(data_dir))
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  # no shell is what we want


def migrate(*, as_json: JsonFlag = False, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Bring the database to the newest schema; safe to run from many places at once."""
    settings = find_settings(data_dir)
    version = migrate_database(settings.database_url.get_secret_value())
    if as_json:
        print_json({"revision": version.current, "tenants_walled": version.gap is None})
    else:
        print_text(f"The database is at revision {version.current}, the newest.")
    if version.gap is not None:
        note(f"Postgres does not wall tenants off from each other: {version.gap}.")
        note("All else works; docs/howto/separate-database-roles.md tells how to raise the wall.")


def choose_provider(wanted: str | None, settings: Settings) -> LocalProvider | None:
    """Which provider to run; None for those of the user's fleet.toml.

    Raises:
        ConfigurationError: It can't be run here; says how it could.
    """
    name = wanted or ("config" if settings.config_path is not None else LocalProvider.LOCAL)
    if name == "config":
        if settings.config_path is None:
            raise ConfigurationError(
                "--provider config: there is no ./fleet.toml and PROMPTFLEET_CONFIG names none"
            )
        return None
    if name not in {*LocalProvider}:
        raise ConfigurationError(f"--provider: must be one of {_PROVIDERS}, not {name!r}")
    provider = LocalProvider(name)
    ready = local_model.available()
    if provider is LocalProvider.LOCAL and not ready:
        raise ConfigurationError(
            f"--provider local: {ready.reason}; or run with --provider simulated"
        )
    require_workers()
    return provider


def require_workers() -> None:
    """Refuse where only the light producer is installed.

    Raises:
        ConfigurationError: Says what to install.
    """
    if find_spec("httpx_aiohttp") is None or find_spec("flower") is None:
        raise ConfigurationError(
            "The workers' packages are not installed: pip install 'promptfleet[workers]'"
        )


class AskedToStop:
    """Counts the signals that asked us to stop."""

    def __init__(self) -> None:
        """None so far."""
        self.event = threading.Event()
        self.times = 0

    def __call__(self, *_signal: object) -> None:
        """A signal came."""
        self.times += 1
        self.event.set()


@contextmanager
def _signals() -> Iterator[AskedToStop]:
    """Note SIGINT, SIGTERM and SIGHUP instead of being ended by them."""
    asked = AskedToStop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drain(stack: DevStack, asked: AskedToStop) -> None:
    """Stop in a thread of its own, so that a second signal can cut it short."""
    if asked.event.is_set():
        note("draining: what runs may end; once more to kill it")
    before = asked.times
    late: list[str] = []
    stopping = threading.Thread(target=lambda: late.extend(stack.stop()), name="drain")
    stopping.start()
    while stopping.is_alive():
        stopping.join(_WATCH_S / 5)
        if asked.times > before:
            before = asked.times
            late.extend(stack.kill_children())
    if late:
        note(f"killed before they had ended: {', '.join(late)}")
    if asked.event.is_set():
        note("stopped")


def _introduce(stack: DevStack, *, print_env: bool) -> None:
    addresses = stack.addresses
    console = out()
    console.print()
    console.print(f"[bold green]{READY_LINE}[/]")
    for name, text in _rows(addresses):
        console.print(f"  [dim]{name:<10}[/] {text}", soft_wrap=True)
    where = stack.environment_file.parent
    option = "" if where == DEFAULT_DATA_DIR.absolute() else f" --data-dir {where}"
    console.print()
    _show_environment(console, addresses, option, print_env=print_env)
    console.print(
        f'  [dim]try[/]        promptfleet enqueue "Hello" --wait{option}', soft_wrap=True
    )
    console.print("  [dim]stop[/]       Ctrl-C")
    console.print()


def _rows(addresses: Addresses) -> Iterator[tuple[str, str]]:
    yield "Postgres", without_password(addresses.database_url)
    yield "broker", without_password(addresses.broker_url)
    yield "config", str(addresses.config)
    if addresses.provider_url is not None:
        yield "provider", addresses.provider_url
    if addresses.flower_url is not None:
        yield "Flower", addresses.flower_url
    if addresses.api_url is not None:
        yield "API", f"{addresses.api_url}/docs, from this machine without a key"
    yield "callbacks", "signed with PROMPTFLEET_CALLBACK_SECRETS, which `promptfleet env` shows"


def _show_environment(
    console: Console, addresses: Addresses, option: str, *, print_env: bool
) -> None:
    if print_env:
        for name, value in addresses.environment().items():
            console.print(f"  export {name}={value}", soft_wrap=True)
    else:
        command = f'eval "$(promptfleet env{option})"'
        console.print(f"  [dim]your app[/]   {command}", soft_wrap=True)


def _own_server(name: str) -> str | None:
    return os.environ.get(name) or None


def _provider_flags(pairs: list[str]) -> Iterator[str]:
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigurationError(f"--provider-option: must be NAME=VALUE, not {pair!r}")
        yield f"--{name}"
        yield value
