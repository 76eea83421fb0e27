"""Faults of servers: Postgres, its disk and connections; Valkey; the provider; the receiver."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
import uuid
from typing import Any, ClassVar, Self

import psycopg
import redis
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from tests.faults.faults import Fault
from tests.faults.orders import TIERS
from tests.faults.proxy import Trap
from tests.faults.witness import parked
from tests.faults.worker_faults import PATIENCE_S, came
from tests.faults.world import LATENCY_MS, MAX_CONNECTIONS, World
from tests.receiver import Answer

from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import make_celery, publish
from promptfleet_shared.store.engines import normalise_url

MID_STATEMENT = {
    "finish": "done AS (",
    "claim": "runnable AS MATERIALIZED",
    "insert": "INSERT INTO jobs",
    "sweep": "due AS MATERIALIZED",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PostgresRestarted(Fault):
    """A crash in the middle of a statement, by default of one that finishes jobs."""

    kind: ClassVar[str] = "postgres_immediate"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres"})
    statement: str = "finish"

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(statement=draw.choice(["finish", "finish", *MID_STATEMENT]))

    def begin(self, world: World) -> None:
        now = threading.Event()
        trap = Trap(match=MID_STATEMENT[self.statement], then=now.set)
        for wire in world.exchange.of("postgres"):
            wire.trap = trap
        now.wait(PATIENCE_S)
        world.restart_postgres("immediate")
        for wire in world.exchange.of("postgres"):
            wire.trap = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PostgresAway(Fault):
    """Killed, and only started again after a while."""

    kind: ClassVar[str] = "postgres_away"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres"})
    lasts_s: ClassVar[tuple[float, float]] = (1.0, 6.0)

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        with world.lock:
            world.postgres.kill()

    def heal(self, world: World) -> None:
        world.revive_postgres()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SessionsTerminated(Fault):
    """pg_terminate_backend of a part of all sessions, several times."""

    kind: ClassVar[str] = "sessions_terminated"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres"})
    share: float
    rounds: int

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(share=draw.uniform(0.2, 1.0), rounds=draw.randint(1, 5))

    def begin(self, world: World) -> None:
        with world.sql() as connection:
            for _ in range(self.rounds):
                connection.execute(
                    sa.text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                        " AND random() < :share"
                    ),
                    {"share": self.share},
                )
                time.sleep(0.1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PoolExhausted(Fault):
    """Somebody takes every connection that Postgres has, those of the fleet included."""

    kind: ClassVar[str] = "pool_exhausted"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres"})
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 6.0)
    taken: list[psycopg.Connection[Any]] = dataclasses.field(default_factory=list, compare=False)

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        self._take(world)
        with contextlib.suppress(OperationalError, psycopg.Error):
            self.taken[0].execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND application_name LIKE 'promptfleet%'"
            )
        self._take(world)

    def heal(self, world: World) -> None:
        del world
        for connection in self.taken:
            connection.close()
        self.taken.clear()

    def _take(self, world: World) -> None:
        url = normalise_url(world.postgres.url).set(drivername="postgresql")
        address = url.render_as_string(hide_password=False)
        misses = 0
        while misses < 20 and len(self.taken) < MAX_CONNECTIONS:
            try:
                connection = psycopg.connect(
                    address, application_name="greedy", autocommit=True, connect_timeout=3
                )
            except psycopg.OperationalError:
                misses += 1
                time.sleep(0.01)
            else:
                self.taken.append(connection)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiskFull(Fault):
    """Postgres' disk has no byte left, at times just when its log needs a new segment."""

    kind: ClassVar[str] = "disk_full"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres"})
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 6.0)
    new_segment: bool

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(new_segment=draw.random() < 0.5)

    def begin(self, world: World) -> None:
        assert world.disk is not None
        world.disk.fill()
        if self.new_segment:
            with contextlib.suppress(DBAPIError):
                world.rows("SELECT pg_switch_wal()")

    def heal(self, world: World) -> None:
        assert world.disk is not None
        world.disk.empty()
        world.revive_postgres()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ValkeyLost(Fault):
    """Killed, and started again with nothing in it."""

    kind: ClassVar[str] = "valkey_lost"
    touches: ClassVar[frozenset[str]] = frozenset({"valkey"})

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        with world.lock:
            world.valkey.restart(lose_data=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ValkeyFlushed(Fault):
    """FLUSHALL under everybody's feet, if it may be while doorbells are parked."""

    kind: ClassVar[str] = "valkey_flushed"
    touches: ClassVar[frozenset[str]] = frozenset({"valkey"})

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        with contextlib.suppress(redis.RedisError), world.redis() as client:
            came(lambda: parked(client) > 0)
            client.flushall()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ValkeyAway(Fault):
    """Killed, and started again later with its data: with doorbells from before."""

    kind: ClassVar[str] = "valkey_away"
    touches: ClassVar[frozenset[str]] = frozenset({"valkey"})
    lasts_s: ClassVar[tuple[float, float]] = (0.5, 5.0)

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        with world.lock:
            world.valkey.kill()

    def heal(self, world: World) -> None:
        world.revive_valkey()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ValkeyClientsKilled(Fault):
    """CLIENT KILL of all connections, several times."""

    kind: ClassVar[str] = "valkey_clients_killed"
    touches: ClassVar[frozenset[str]] = frozenset({"valkey"})
    rounds: int

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(rounds=draw.randint(1, 8))

    def begin(self, world: World) -> None:
        with world.redis() as client:
            for _ in range(self.rounds):
                for kind in ("normal", "pubsub"):
                    client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
                time.sleep(0.1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DoorbellFlood(Fault):
    """The doorbell of some jobs a thousand times each, those of ended jobs among them."""

    kind: ClassVar[str] = "doorbell_flood"
    touches: ClassVar[frozenset[str]] = frozenset({"doorbells"})

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        try:
            rows = world.rows(
                # Who is bounded waits for its turn, which such a doorbell would take from others.
                "(SELECT id, tier FROM jobs WHERE finished_at IS NULL AND tenant <> 'bounded'"
                " LIMIT 2) UNION ALL"
                " (SELECT id, tier FROM jobs WHERE finished_at IS NOT NULL LIMIT 1)"
            )
        except OperationalError:  # Postgres is being broken, too
            rows = []
        bells = [Doorbell(job_id=row.id, tier=row.tier) for row in rows]
        bells.append(Doorbell(job_id=uuid.UUID(int=7), tier=TIERS[0]))
        celery = make_celery(world.valkey.url, TIERS)
        with contextlib.suppress(BrokerUnavailableError):  # Valkey is being broken, too
            for bell in bells:
                for _ in range(100):
                    publish(celery, [bell])  # each in a message of its own
                publish(celery, [bell] * 900)
        celery.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProviderStorm(Fault):
    """The provider fails, hangs, refuses or breaks off, most of the time."""

    kind: ClassVar[str] = "provider_storm"
    touches: ClassVar[frozenset[str]] = frozenset({"provider"})
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 8.0)
    what: str

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(what=draw.choice(["429", "500", "hang", "reset", "mixed", "slow"]))

    def begin(self, world: World) -> None:
        world.control(**_STORMS[self.what])

    def heal(self, world: World) -> None:
        world.control(errors="", rpm=0, latency_ms=LATENCY_MS)


# A refusal by the rate limit is not among the calls that the provider counts: it costs nothing.
_STORMS: dict[str, dict[str, object]] = {
    "429": {"rpm": 20},
    "500": {"errors": "500:0.8"},
    "hang": {"errors": "timeout:0.7"},
    "reset": {"errors": "disconnect:0.4,reset:0.4"},
    "mixed": {"errors": "500:0.2,truncate:0.2,stall:0.1,html:0.1,bad-utf8:0.1,cut:0.1"},
    "slow": {"latency_ms": "2000..6000"},
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchTrouble(Fault):
    """The provider's batch API makes a batch and says nothing, or breaks off its results, …"""

    kind: ClassVar[str] = "batch_trouble"
    touches: ClassVar[frozenset[str]] = frozenset({"batches"})
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 8.0)
    what: str

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(what=draw.choice(_BATCH_TROUBLES))

    def begin(self, world: World) -> None:
        world.control(batch_faults=self.what)

    def heal(self, world: World) -> None:
        world.control(batch_faults="")


# Not "full": jobs of a batch that there was no room for are gathered again after five minutes.
_BATCH_TROUBLES = (
    *("upload-hang", "create-hang", "create-deaf", "create-502", "look-hang", "results-cut"),
    *("results-hang", "fail"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverTrouble(Fault):
    """Who receives callbacks answers with errors, or not at all."""

    kind: ClassVar[str] = "receiver_trouble"
    touches: ClassVar[frozenset[str]] = frozenset({"receiver"})
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 6.0)
    status: int

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(status=draw.choice([0, 302, 429, 500, 502]))

    def begin(self, world: World) -> None:
        silent = threading.Event() if not self.status else None
        world.callback_trouble = Answer(status=self.status or 500, hold=silent)

    def heal(self, world: World) -> None:
        trouble, world.callback_trouble = world.callback_trouble, None
        if trouble is not None and trouble.hold is not None:
            trouble.hold.set()
