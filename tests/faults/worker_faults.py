"""Faults of workers: killed, stopped and woken, told to end, given a wrong clock."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from typing import ClassVar, Self

from tests.faults.faults import Fault
from tests.faults.proxy import Trap
from tests.faults.world import LEASE_S, World
from tests.waiting import eventually

WORKERS = ("worker_basic", "worker_standard", "worker_advanced", "worker_spare")
PATIENCE_S = 3.0
"""How long a fault waits for the right moment before it strikes at the wrong one."""


def some_workers(draw: random.Random, most: int = len(WORKERS)) -> tuple[str, ...]:
    return tuple(draw.sample(WORKERS, draw.randint(1, most)))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkersKilled(Fault):
    """SIGKILL; the supervisor starts them again."""

    kind: ClassVar[str] = "workers_killed"
    touches: ClassVar[frozenset[str]] = frozenset({"workers"})
    workers: tuple[str, ...]

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(workers=some_workers(draw))

    def begin(self, world: World) -> None:
        for worker in self.workers:
            world.signal(world.pid(worker), signal.SIGKILL)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkersPaused(Fault):
    """SIGSTOP, and SIGCONT when their leases are over: they come back as zombies."""

    kind: ClassVar[str] = "workers_paused"
    touches: ClassVar[frozenset[str]] = frozenset({"workers"})
    lasts_s: ClassVar[tuple[float, float]] = (LEASE_S + 1, LEASE_S + 5)
    workers: tuple[str, ...]

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(workers=some_workers(draw, 2))

    def begin(self, world: World) -> None:
        for worker in self.workers:
            world.signal(world.pid(worker), signal.SIGSTOP)

    def heal(self, world: World) -> None:
        for worker in self.workers:
            world.signal(world.pid(worker), signal.SIGCONT)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweeperPaused(Fault):
    """A worker is stopped when Postgres is at its sweep, and while all the others sweep on."""

    kind: ClassVar[str] = "sweeper_paused"
    touches: ClassVar[frozenset[str]] = frozenset({"workers", "postgres"})
    lasts_s: ClassVar[tuple[float, float]] = (LEASE_S + 1, LEASE_S + 4)
    worker: str

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(worker=draw.choice(WORKERS))

    def begin(self, world: World) -> None:
        wire, pid = world.wire(self.worker, "postgres"), world.pid(self.worker)
        trap = Trap(match="due AS MATERIALIZED", then=lambda: world.signal(pid, signal.SIGSTOP))
        wire.trap = trap
        if not came(lambda: trap.sprung > 0):
            world.signal(pid, signal.SIGSTOP)
        wire.trap = None

    def heal(self, world: World) -> None:
        world.signal(world.pid(self.worker), signal.SIGCONT)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchMakerKilled(Fault):
    """SIGKILL of a worker whose batch the provider has just made, before that is written down."""

    kind: ClassVar[str] = "batch_maker_killed"
    touches: ClassVar[frozenset[str]] = frozenset({"workers", "postgres", "batches"})

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        del draw
        return cls()

    def begin(self, world: World) -> None:
        makers: list[str] = []
        for worker in WORKERS:
            world.wire(worker, "postgres").trap = _slowed(world, worker, makers)
        made = world.batches_made()
        if came(lambda: bool(makers)):
            came(lambda: world.batches_made() > made)
            world.signal(world.pid(makers[0]), signal.SIGKILL)
        for worker in WORKERS:
            world.wire(worker, "postgres").heal()


def _slowed(world: World, worker: str, makers: list[str]) -> Trap:
    """Who has written that it is about to ask the provider needs long to write anything more."""

    def now() -> None:
        if not makers:
            makers.append(worker)
            world.wire(worker, "postgres").delay_s = 0.3

    return Trap(match="SET state = 'submitting'", then=now)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RollingRestart(Fault):
    """SIGTERM to one worker after the other, each given time to drain and start again."""

    kind: ClassVar[str] = "rolling_restart"
    touches: ClassVar[frozenset[str]] = frozenset({"workers"})
    workers: tuple[str, ...]

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(workers=tuple(draw.sample(WORKERS, len(WORKERS))))

    def begin(self, world: World) -> None:
        for worker in self.workers:
            pid = world.pid(worker)
            if pid is None:
                continue
            world.signal(pid, signal.SIGTERM)
            eventually(
                lambda: world.pid(worker) not in {pid, None},  # noqa: B023 - used at once
                f"{worker} drains and is started again",
                timeout_s=60,
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClockWrong(Fault):
    """A worker's clock jumps by two hours, and back."""

    kind: ClassVar[str] = "clock_wrong"
    touches: ClassVar[frozenset[str]] = frozenset({"clock"})
    lasts_s: ClassVar[tuple[float, float]] = (3.0, 9.0)
    worker: str
    offset_s: float

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(worker=draw.choice(WORKERS), offset_s=draw.choice([-7200.0, 7200.0]))

    def begin(self, world: World) -> None:
        world.clock_of(self.worker).write_text(str(self.offset_s), encoding="ascii")

    def heal(self, world: World) -> None:
        world.clock_of(self.worker).write_text("0", encoding="ascii")


def came(condition: object) -> bool:
    """True if the condition came true within `PATIENCE_S`."""
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
