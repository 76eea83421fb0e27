"""The whole fleet on one machine: servers, schema, provider, workers and Flower, in that order."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from promptfleet.dev_stack.data_directory import DataDirectory
from promptfleet.dev_stack.errors import ServerStartError
from promptfleet.dev_stack.local_fleet import LocalProvider, fleet_toml, provider_command
from promptfleet.dev_stack.ports import LOOPBACK, choose_port
from promptfleet.dev_stack.postgres import EmbeddedPostgres
from promptfleet.dev_stack.processes import wait_until
from promptfleet.dev_stack.supervisor import ChildSpec, ChildState, Supervisor
from promptfleet.dev_stack.valkey import EmbeddedValkey
from promptfleet_shared.fleet import Fleet, load_fleet
from promptfleet_shared.signing import new_secret
from promptfleet_shared.tiers import DEFAULT_TIERS, queue_name

if TYPE_CHECKING:
    from promptfleet_shared.store.migrating import SchemaVersion

API_PORT = 8000
FLOWER_PORT = 5555
READY_TIMEOUT_S = 60.0
ENVIRONMENT_FILE = "env"
SECRET_FILE = "callback.secret"  # noqa: S105 - a name
_FLOWER_FLAGS = ("--logging=error", "--read_only=True", "--inspect_timeout=3000")
_STARTS_TO_BELIEVE = 3
_PING_S = 0.5
_PROBE_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class StackOptions:
    """What to run.

    Attributes:
        data_dir: Where the servers keep their data; made private to this user.
        provider: Which provider answers; None for those of `config`.
        config: The user's own fleet.toml; None where `provider` has one made.
        tiers: Which tiers get a worker; None for all of the fleet's.
        database_url: A Postgres of the user's instead of the embedded one.
        broker_url: A Redis or Valkey of the user's instead of the embedded one.
        provider_flags: Further flags of the provider's process.
        cache_namespace: Of the made fleet.toml, so that a run can have a cache of its own.
        flower: Whether to run Flower.
        api: Whether to serve the HTTP API, to this machine and without keys.
        worker_flags: Further flags of each worker.
        drain_s: Seconds that workers have to end what they do.
    """

    data_dir: Path
    provider: LocalProvider | None = None
    config: Path | None = None
    tiers: tuple[str, ...] | None = None
    database_url: str | None = None
    broker_url: str | None = None
    provider_flags: tuple[str, ...] = ()
    cache_namespace: str = "default"
    flower: bool = True
    api: bool = True
    worker_flags: tuple[str, ...] = ()
    drain_s: float = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where things are; the URLs carry passwords and are not to be shown."""

    database_url: str = field(repr=False)
    broker_url: str = field(repr=False)
    config: Path
    provider_url: str | None
    flower_url: str | None
    api_url: str | None
    callback_secrets: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """The variables under which every promptfleet process finds this fleet."""
        values = {
            "PROMPTFLEET_DATABASE_URL": self.database_url,
            "PROMPTFLEET_BROKER_URL": self.broker_url,
            "PROMPTFLEET_CONFIG": str(self.config),
            "PROMPTFLEET_CALLBACK_SECRETS": self.callback_secrets,
            # Here, the receivers under development are on this machine, too.
            "PROMPTFLEET_CALLBACK_ALLOW_LOOPBACK": os.environ.get(
                "PROMPTFLEET_CALLBACK_ALLOW_LOOPBACK", "true"
            ),
        }
        if self.flower_url is not None:
            values["PROMPTFLEET_FLOWER_URL"] = self.flower_url
        if self.api_url is not None:
            public_url = os.environ.get("PROMPTFLEET_PUBLIC_URL") or self.api_url
            values["PROMPTFLEET_PUBLIC_URL"] = public_url
        return values


class DevStack:
    """Starts and stops the fleet of one machine; one thread at a time may use it."""

    def __init__(
        self,
        options: StackOptions,
        *,
        console: Console,
        on_step: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Nothing is started yet.

        Args:
            options: What to run.
            console: Where the children's lines go.
            on_step: Told in a few words what is being done.
        """
        self._options = options
        self._say = on_step
        self._directory = DataDirectory(options.data_dir)
        self._servers: list[EmbeddedPostgres | EmbeddedValkey] = []
        self._supervisor = Supervisor(console=console)
        self._addresses: Addresses | None = None
        self._stop_lock = threading.Lock()

    @property
    def addresses(self) -> Addresses:
        """Where the running fleet is."""
        if self._addresses is None:
            raise ServerStartError("The fleet was not started")
        return self._addresses

    @property
    def environment_file(self) -> Path:
        """Where other processes of this user find the addresses while the fleet runs."""
        return self._directory.path / ENVIRONMENT_FILE

    def start(self) -> Addresses:
        """Start everything and wait until prompts are answered.

        Raises:
            DevStackError: Something can't run here; says what, and shows the end of its log.
            ConfigurationError: fleet.toml is wrong.
            StoreUnavailableError: The user's own database can't be reached.
        """
        self._directory.acquire()
        with ExitStack() as undo:
            undo.callback(self.stop)
            self._directory.write(".gitignore", "*\n")  # passwords never get into a repository
            (self._directory.path / ENVIRONMENT_FILE).unlink(missing_ok=True)
            self._start_all()
            undo.pop_all()
        return self.addresses

    def _start_all(self) -> None:
        options = self._options
        provider_port = self._write_config() if options.provider is not None else None
        config = self._config_path()
        fleet = load_fleet(config)
        database_url = options.database_url or self._start_server(EmbeddedPostgres)
        broker_url = options.broker_url or self._start_server(EmbeddedValkey)
        self._say("migrating the database")
        migrate_database(database_url)
        flower_port = choose_port(FLOWER_PORT) if options.flower else None
        api_port = choose_port(API_PORT) if options.api else None
        self._addresses = Addresses(
            database_url=database_url,
            broker_url=broker_url,
            config=config,
            provider_url=None if provider_port is None else _http(provider_port, "/v1"),
            flower_url=None if flower_port is None else _http(flower_port),
            api_url=None if api_port is None else _http(api_port),
            callback_secrets=os.environ.get("PROMPTFLEET_CALLBACK_SECRETS") or self._secret(),
        )
        if provider_port is not None:
            self._start_provider(provider_port)
        if api_port is not None:
            self._start_api(api_port)
        self._start_workers(fleet, flower_port)
        if api_port is not None:
            self._say("waiting for the API")
            self._wait(lambda: _accepts(api_port), "The API", children=("api",))
        self._write_environment()

    def _secret(self) -> str:
        """The secret that callbacks are signed with; made once for this directory."""
        known = self._directory.read(SECRET_FILE)
        if known is None:
            known = new_secret()
            self._directory.write(SECRET_FILE, known)
        return known

    def _start_server(self, kind: type[EmbeddedPostgres | EmbeddedValkey]) -> str:
        server = kind(self._directory.path / kind.name)
        self._say(f"starting {kind.name}")
        server.start()
        self._servers.append(server)
        return server.url

    def _write_config(self) -> int:
        options = self._options
        assert options.provider is not None  # noqa: S101  # for the type checker
        port = choose_port(self._directory.read_int("provider.port"), options.provider.usual_port)
        self._directory.write("provider.port", str(port))
        text = fleet_toml(
            options.provider,
            base_url=_http(port, "/v1"),
            tiers=options.tiers or DEFAULT_TIERS,
            cache_namespace=options.cache_namespace,
        )
        self._directory.write("fleet.toml", text)
        return port

    def _config_path(self) -> Path:
        if self._options.provider is not None:
            return self._directory.path / "fleet.toml"
        assert self._options.config is not None  # noqa: S101  # for the type checker
        return self._options.config.absolute()

    def _start_provider(self, port: int) -> None:
        provider = self._options.provider
        assert provider is not None  # noqa: S101  # for the type checker
        self._say(f"starting the {provider} provider")
        command = provider_command(provider, port=port, flags=self._options.provider_flags)
        self._supervisor.start(ChildSpec(name="provider", argv=command))
        self._wait(lambda: _accepts(port), "The provider", children=("provider",))

    def _start_api(self, port: int) -> None:
        env = {**os.environ, **self.addresses.environment()}
        env.setdefault("PROMPTFLEET_API_KEYLESS", "true")  # it listens on loopback alone
        self._supervisor.start(ChildSpec(name="api", argv=api_command(port), env=env))

    def _start_workers(self, fleet: Fleet, flower_port: int | None) -> None:
        from promptfleet.broker import Broker  # noqa: PLC0415  # slow to import

        tiers = self._options.tiers or fleet.tier_names
        env = _quiet({**os.environ, **self.addresses.environment()})
        specs = [
            ChildSpec(
                name=tier,
                argv=worker_command((tier,), extra=self._options.worker_flags, quiet=True),
                env=env,
            )
            for tier in tiers
        ]
        if flower_port is not None:
            specs.append(
                ChildSpec(
                    name="flower", argv=flower_command(flower_port, extra=_FLOWER_FLAGS), env=env
                )
            )
        self._say(f"starting {len(tiers)} workers")
        self._supervisor.start(*specs)
        wait = f"The workers for {', '.join(tiers)}"
        with Broker(self.addresses.broker_url, tiers) as broker:

            def all_answer() -> bool:
                return set(tiers) <= broker.ping(timeout_s=_PING_S, enough=len(tiers))

            self._wait(all_answer, wait, children=tiers)
        if flower_port is not None:
            self._say("waiting for Flower")
            self._wait(lambda: _accepts(flower_port), "Flower", children=("flower",))

    def _wait(self, ready: Callable[[], bool], who: str, *, children: Sequence[str]) -> None:
        """Wait until something works; give up early where its process keeps on dying."""

        def settled() -> bool:
            return ready() or bool(self._dying(children))

        came = wait_until(settled, READY_TIMEOUT_S)
        if dying := self._dying(children):
            raise ServerStartError(
                f"{who} can't run: {', '.join(dying)} ended again and again; its lines say why"
            )
        if not came:
            raise ServerStartError(f"{who} did not answer within {READY_TIMEOUT_S:.0f} s")

    def _dying(self, children: Sequence[str]) -> list[str]:
        return [
            child.name
            for child in self._supervisor.status()
            if child.name in children
            and child.restarts + (child.state is ChildState.BACKING_OFF) >= _STARTS_TO_BELIEVE
        ]

    def _write_environment(self) -> None:
        lines = [
            f"{name}={shlex.quote(value)}\n" for name, value in self.addresses.environment().items()
        ]
        self._directory.write(ENVIRONMENT_FILE, "".join(lines))

    def restart_dead_servers(self) -> list[str]:
        """Start the embedded servers that ended by themselves; their names."""
        dead = [server for server in self._servers if not server.running]
        for server in dead:
            server.start()
        return [server.name for server in dead]

    def stop(self) -> tuple[str, ...]:
        """Drain the workers and stop all, the last first; may be called again.

        Returns:
            The children that had to be killed since they did not end in time.
        """
        with self._stop_lock:
            if self._addresses is not None:  # else the file is another fleet's, if there is one
                self.environment_file.unlink(missing_ok=True)
                self._addresses = None
            late = self._supervisor.stop(self._options.drain_s)
            while self._servers:
                self._servers.pop().stop()
            self._directory.release()
        return late

    def kill_children(self) -> tuple[str, ...]:
        """End the drain that `stop` waits for: SIGKILL to those of the children that still run.

        Returns:
            Their names.
        """
        return self._supervisor.kill()


def worker_command(
    tiers: Sequence[str], *, extra: Sequence[str] = (), quiet: bool = False
) -> list[str]:
    """The command line of a worker that serves these tiers; the same as in the Procfile.

    Args:
        tiers: Whose queues it consumes.
        extra: Further arguments of Celery's worker.
        quiet: Without Celery's banner.
    """
    queues = ",".join(queue_name(tier) for tier in tiers)
    name = f"{'-'.join(tiers)}@%h"
    celery = [sys.executable, "-m", "celery", *(["--quiet"] if quiet else [])]
    return [*celery, "-A", "promptfleet_workers.app", "worker", "-Q", queues, "-n", name, *extra]


def api_command(port: int, *, log_level: str = "WARNING") -> list[str]:
    """The command line of the HTTP API on loopback."""
    command = [sys.executable, "-m", "promptfleet.cli", "api", "--host", LOOPBACK]
    return [*command, "--port", str(port), "--log-level", log_level]


def flower_command(port: int, *, extra: Sequence[str] = ()) -> list[str]:
    """The command line of Flower on loopback."""
    celery = [sys.executable, "-m", "celery", "-A", "promptfleet_workers.app"]
    return [*celery, "flower", f"--address={LOOPBACK}", f"--port={port}", *extra]


def migrate_database(url: str) -> SchemaVersion:
    """Bring the database to the newest schema; where it stands then.

    Raises:
        StoreUnavailableError: It can't be reached.
    """
    # Here, since it takes half a second to import.
    from promptfleet_shared.store.engines import make_engine, store_errors  # noqa: PLC0415
    from promptfleet_shared.store.migrating import migrate  # noqa: PLC0415

    engine = make_engine(url, application_name="promptfleet-migrate", pool_size=1)
    try:
        with store_errors():
            return migrate(engine)
    finally:
        engine.dispose()


def read_environment(path: Path) -> Mapping[str, str]:
    """The variables that a running fleet left for the other processes of its user."""
    values: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals:
            values[name] = "".join(shlex.split(value))
    return values


def _quiet(environment: dict[str, str]) -> dict[str, str]:
    """Without Celery's banner-like warning about root: a development fleet may run as root."""
    warnings = environment.get("PYTHONWARNINGS", "")
    about_root = "ignore:You're running the worker with superuser"
    joined = f"{warnings},{about_root}" if warnings else about_root
    return {**environment, "PYTHONWARNINGS": joined}


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=_PROBE_S):
            return True
    except OSError:
        return False


def _http(port: int, path: str = "") -> str:
    return f"http://{LOOPBACK}:{port}{path}"
