"""The world that is broken: a whole fleet of real processes, with wires between its parts."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import orjson
import redis
import sqlalchemy as sa
from pydantic import SecretStr
from rich.console import Console
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from tests.acceptance.fleet import procfile_workers
from tests.faults.disk import SmallDisk
from tests.faults.orders import LONG_S, METERED, SPENDER, TIERS
from tests.faults.proxy import Exchange, Wire
from tests.processes import Provider, worker_environment
from tests.receiver import Answer, Received, Receiver
from tests.waiting import eventually

from promptfleet import verify_callback
from promptfleet.dev_stack import (
    Backoff,
    ChildExit,
    ChildSpec,
    EmbeddedPostgres,
    EmbeddedValkey,
    Hooks,
    Supervisor,
)
from promptfleet_shared.errors import InvalidSignatureError
from promptfleet_shared.settings import Settings
from promptfleet_shared.signing import new_secret
from promptfleet_shared.store.engines import make_engine, normalise_url
from promptfleet_shared.store.migrating import migrate

LEASE_S = 3.0
DRAIN_S = 4.0
MAX_CALLS = 6
RETRY_ATTEMPTS = 4
MAX_CONNECTIONS = 80
IN_BATCH_S = 22.0
"""How long a prompt waits in its provider's batch, until it is taken back."""
TENANT_BOUND = 12
KEY_BOUND = 3
RPM = 150
"""Requests that the metered provider takes in any minute, and not one more."""
LATENCY_MS = "20..400"
READY = re.compile(r"^(worker_\w+) .*\bready\.", re.MULTILINE)
FLEET = """
default_tier = "basic"
[batch]
max_concurrent_calls = 24
batch_window_ms = 10
[retry]
retry_attempts = {retry_attempts}
retry_delay_ms = 100
max_retry_delay_ms = 3000
max_calls = {max_calls}
[timeouts]
connect_timeout_ms = 1000
first_byte_timeout_ms = 5000
idle_timeout_ms = 3000
timeout_ms = 8000
[breaker]
window_s = 6
cool_down_s = 1
max_cool_down_s = 4
ramp_s = 3
retry_share = 0.5
retries_per_s = 20
[tiers]
basic = {{ models = ["plain"] }}
standard = {{ models = ["streamed"] }}
advanced = {{ models = ["plain", "second"] }}
[batch_service]
gather_s = 0.7
poll_s = 0.5
settle_s = 2
spill_before_s = {spill_before_s}
[fairness.tenants.bounded]
max_in_flight = {tenant_bound}
[fairness]
max_in_flight_per_key = {key_bound}
[[budgets]]
name = "hard"
by = "tenant"
only = ["{spender}"]
period = "total"
hard_usd = {hard_usd}
[models.plain]
price_as = "free"
deployments = [{{ base_url = "{url}", batch_api = true }}, {{ base_url = "{url}" }}]
[models.streamed]
price_as = "free"
deployments = [{{ base_url = "{url}", stream = true }}]
[models.second]
price_as = "free"
deployments = [{{ base_url = "{url}" }}]
[models.{metered}]
price_as = "openai/gpt-4o-mini"
[[models.{metered}.deployments]]
base_url = "{metered_url}"
limits = {{ requests_per_minute = {rpm} }}
"""
_SMALL_WAL = {
    "max_connections": str(MAX_CONNECTIONS),
    "max_wal_size": "64MB",
    "min_wal_size": "32MB",
    "wal_recycle": "off",  # so that a full disk is felt by the next segment, too
    "checkpoint_timeout": "30s",
    "autovacuum_naptime": "5s",
}


class World:
    """Postgres, Valkey, a provider, a receiver, workers and wires; each can be broken."""

    def __init__(
        self,
        directory: Path,
        *,
        disk: SmallDisk | None,
        hard_usd: Decimal = Decimal("0.001"),
        in_batch_s: float = IN_BATCH_S,
    ) -> None:
        """Start nothing yet.

        Args:
            directory: Where all data and logs are.
            disk: Where Postgres' data go; None for `directory`.
            hard_usd: What the spender may spend.
            in_batch_s: As `IN_BATCH_S`.
        """
        self.hard_usd = hard_usd
        self._spill_before_s = LONG_S - in_batch_s
        self.directory = directory
        self.disk = disk
        self.lock = threading.RLock()
        self.exits: list[ChildExit] = []
        self.refused_callbacks = 0
        self.callback_trouble: Answer | None = None
        self.delivered: dict[str, list[Received]] = {}
        self.secret = new_secret()
        self._stack = ExitStack()
        self._log_path = directory / "workers.log"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    # -- its parts ---------------------------------------------------------------------------

    def _start(self) -> None:
        home = self.disk.path if self.disk else self.directory
        self.postgres = EmbeddedPostgres(home / "postgres", settings=_SMALL_WAL)
        self._stack.enter_context(self.postgres)
        self.valkey = self._stack.enter_context(EmbeddedValkey(self.directory / "valkey"))
        engine = make_engine(self.postgres.url, application_name="nemesis", pool_size=1)
        migrate(engine)
        engine.dispose()
        self.provider = Provider(
            self.directory, "--latency-ms", LATENCY_MS, "--batch-ms", "200..3000"
        )
        self._stack.callback(self.provider.close)
        metered = self.directory / "metered"
        metered.mkdir(parents=True, exist_ok=True)
        self.metered = Provider(metered, "--latency-ms", LATENCY_MS, "--rpm", str(RPM))
        self._stack.callback(self.metered.close)
        self.receiver = self._stack.enter_context(Receiver(self._take_callback))
        self.exchange = self._stack.enter_context(Exchange())
        self.workers = _worker_commands()
        for name in ("producers", *self.workers):
            self._wire(name)
        self._start_workers()

    def _wire(self, client: str) -> None:
        targets = {
            "postgres": lambda: ("127.0.0.1", self.postgres.port),
            "valkey": lambda: ("127.0.0.1", self.valkey.port),
            "provider": lambda: _address(self.provider),
            "metered": lambda: _address(self.metered),
        }
        for server, target in targets.items():
            self.exchange.wire(f"{client}->{server}", target, postgres=server == "postgres")

    def _start_workers(self) -> None:
        log = self._stack.enter_context(self._log_path.open("a", encoding="utf-8"))
        self.supervisor = Supervisor(
            console=Console(file=_Flushing(log), width=100_000),
            backoff=Backoff(first_s=0.2, max_s=1.0),
            hooks=Hooks(on_exit=self.exits.append),
        )
        self._stack.callback(self.supervisor.kill)
        specs = [
            ChildSpec(name=name, argv=argv, env=self._environment(name), cwd=self.directory)
            for name, argv in self.workers.items()
        ]
        self.supervisor.start(*specs)
        eventually(
            lambda: set(READY.findall(self.output)) == set(self.workers),
            "all workers are ready",
            timeout_s=90,
            every_s=0.1,
        )

    def _environment(self, worker: str) -> Mapping[str, str]:
        config = self.directory / f"{worker}.toml"
        provider = self.wire(worker, "provider").url(self.provider.base_url)
        text = FLEET.format(
            url=provider,
            metered_url=self.wire(worker, "metered").url(self.metered.base_url),
            metered=METERED,
            spender=SPENDER,
            max_calls=MAX_CALLS,
            retry_attempts=RETRY_ATTEMPTS,
            spill_before_s=self._spill_before_s,
            tenant_bound=TENANT_BOUND,
            key_bound=KEY_BOUND,
            hard_usd=self.hard_usd,
            rpm=RPM,
        )
        config.write_text(text, encoding="utf-8")
        env = worker_environment(
            database_url=self.wire(worker, "postgres").url(self.postgres.url),
            broker_url=self.wire(worker, "valkey").url(self.valkey.url),
            config=config,
            lease_s=LEASE_S,
            sweep_interval_s=0.3,
            drain_s=DRAIN_S,
            watchdog_s=20,
            callback_secrets=self.secret,
            callback_allow_loopback="true",
            callback_schedule_s="0,0.5,1,2,4,8,8,8,8,8",
            callback_timeout_s=3,
            callback_poll_s=0.5,
        )
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        paths = [str(Path(__file__).with_name("clock")), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
        env["NEMESIS_CLOCK"] = str(self.clock_of(worker))
        return env

    # -- how to reach them -------------------------------------------------------------------

    def wire(self, client: str, server: str) -> Wire:
        return self.exchange.wires[f"{client}->{server}"]

    def clock_of(self, worker: str) -> Path:
        """The file that puts a worker's clock wrong."""
        return self.directory / f"{worker}.clock"

    def settings(self, tenant: str) -> Settings:
        """A producer's."""
        return Settings(
            tenant=tenant,
            database_url=SecretStr(self.wire("producers", "postgres").url(self.postgres.url)),
            broker_url=SecretStr(self.wire("producers", "valkey").url(self.valkey.url)),
            config=self.directory / "worker_basic.toml",
            database_connect_timeout_s=2,
            database_patience_s=3,
            callback_allow_loopback=True,
        )

    @property
    def output(self) -> str:
        """What the workers have said so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def pid(self, worker: str) -> int | None:
        """The worker's process, if it lives just now."""
        return next(s.pid for s in self.supervisor.status() if s.name == worker)

    def signal(self, pid: int | None, number: signal.Signals) -> None:
        """Signal a process that may have ended."""
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def sql(self) -> Iterator[sa.Connection]:
        """A connection of its own, not by a wire, each statement a transaction."""
        engine = sa.create_engine(
            normalise_url(self.postgres.url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 3, "application_name": "nemesis"},
        )
        with engine.connect() as connection:
            yield connection

    def rows(self, statement: str, **parameters: object) -> list[Any]:
        with self.sql() as connection:
            return list(connection.execute(sa.text(statement), parameters))

    def redis(self) -> redis.Redis:
        """A client of Valkey, not by a wire."""
        return redis.Redis.from_url(self.valkey.url, socket_timeout=5)

    def batches(self) -> list[tuple[str, list[str]]]:
        """Every batch that the provider has ever made: our own name for it, and its lines' ids."""
        with httpx.Client(base_url=self.provider.base_url, timeout=30) as client:
            found: list[Any] = []
            more = True
            while more:
                after = {"after": found[-1]["id"]} if found else {}
                page = client.get("/batches", params={"limit": 100, **after}).json()
                found += page["data"]
                more = page["has_more"]
            return [(str(batch["metadata"]), _ids_of(client, batch)) for batch in found]

    def batches_made(self) -> int:
        """How many batches the provider has made so far."""
        return int(httpx.get(f"{self.provider.url}/stats", timeout=10).json()["batches"])

    def control(self, **options: object) -> None:
        """Change how the provider behaves."""
        response = httpx.post(f"{self.provider.url}/control", json=options, timeout=10)
        response.raise_for_status()

    # -- how they heal -----------------------------------------------------------------------

    def restart_postgres(self, mode: str) -> None:
        with self.lock:
            self.postgres.restart(mode)

    def revive_postgres(self) -> None:
        """Start Postgres if it does not run, and wait until it answers."""
        with self.lock:
            if not self.postgres.running:
                self.postgres.kill()
                self.postgres.start()
        self._await_postgres()

    def revive_valkey(self) -> None:
        """Start Valkey if it does not run."""
        with self.lock:
            if not self.valkey.running:
                self.valkey.start()

    def heal(self) -> None:
        """Make everything whole again."""
        if self.disk is not None:
            self.disk.empty()
        self.exchange.heal()
        self.callback_trouble = None
        for worker in self.workers:
            self.clock_of(worker).write_text("0", encoding="ascii")
            self.signal(self.pid(worker), signal.SIGCONT)
        self.revive_postgres()
        self.revive_valkey()
        self.control(errors="", rpm=0, latency_ms=LATENCY_MS, batch_faults="")

    def _await_postgres(self) -> None:
        """Wait until Postgres, which may recover from a crash of its own, answers."""

        def answers() -> bool:
            with contextlib.suppress(OperationalError):
                return bool(self.rows("SELECT 1"))
            return False

        eventually(answers, "Postgres answers", timeout_s=60, every_s=0.1)

    # -- callbacks ---------------------------------------------------------------------------

    def _take_callback(self, received: Received) -> Answer:
        if self.callback_trouble is not None:
            return self.callback_trouble
        try:
            event = verify_callback(received.body, received.headers, self.secret)
        except InvalidSignatureError:  # such as of a worker whose clock is wrong
            self.refused_callbacks += 1
            return Answer(status=400)
        with self.lock:
            self.delivered.setdefault(event.id, []).append(received)
        return Answer()


def _worker_commands() -> dict[str, Sequence[str]]:
    """The Procfile's, and one more for all tiers, so that each tier has two."""
    commands: dict[str, Sequence[str]] = dict(procfile_workers())
    argv = shlex.join(commands["worker_basic"])
    queues = ",".join(f"prompts.{tier}" for tier in TIERS)
    spare = argv.replace("prompts.basic", queues).replace("basic@", "spare@")
    return {**commands, "worker_spare": shlex.split(spare)}


def _address(provider: Provider) -> tuple[str, int]:
    parts = urlsplit(provider.url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def _ids_of(client: httpx.Client, batch: Mapping[str, Any]) -> list[str]:
    content = client.get(f"/files/{batch['input_file_id']}/content").content
    return [str(orjson.loads(line)["custom_id"]) for line in content.splitlines() if line]


class _Flushing(io.StringIO):
    """A log whose lines can be read at once."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(text)
        self._file.flush()
        return len(text)
