"""Faults of connections: black holes, resets, delays, and replies that are lost after a commit."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from typing import ClassVar, Self

from tests.faults.faults import Fault
from tests.faults.proxy import Mode, Reply, Trap, Wire
from tests.faults.worker_faults import WORKERS
from tests.faults.world import World

CLIENTS = ("producers", *WORKERS)
COMMITS = {
    "claim": "runnable AS MATERIALIZED",
    "begin_calls": "noted AS (",
    "finish": "done AS (",
    "release": "released AS (",
    "heartbeat": "late AS MATERIALIZED",
    "sweep": "due AS MATERIALIZED",
    "insert": "INSERT INTO jobs",
    "commit": "COMMIT",
    "cancel": "asked AS (",
    "callback": "recorded AS (",
    "attach": "room AS MATERIALIZED",
    "mark": "marked AS (",
    "batch": "UPDATE provider_batches SET state",
    "return": "returned AS (",
    "turn": "remembered AS (",
}
"""A part of each statement that commits, whose reply may be lost."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _WireFault(Fault):
    """Of the connections from some clients to one server."""

    server: ClassVar[str]
    clients: tuple[str, ...]

    def wires(self, world: World) -> Iterator[Wire]:
        for client in self.clients:
            yield world.wire(client, self.server)


def some_clients(draw: random.Random) -> tuple[str, ...]:
    """One of them, some, or all."""
    return tuple(draw.sample(CLIENTS, draw.choice([1, 1, 2, len(CLIENTS)])))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _BlackHole(_WireFault):
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 8.0)
    mode: Mode

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        modes = [Mode.SILENT, Mode.DEAF, Mode.MUTE]
        return cls(clients=some_clients(draw), mode=draw.choice(modes))

    def begin(self, world: World) -> None:
        for wire in self.wires(world):
            wire.mode = self.mode

    def heal(self, world: World) -> None:
        for wire in self.wires(world):
            wire.heal()


class PostgresBlackHole(_BlackHole):
    """What is sent to or by Postgres is swallowed; such connections stay dead for ever."""

    kind = "postgres_black_hole"
    touches = frozenset({"postgres"})
    server = "postgres"


class ValkeyBlackHole(_BlackHole):
    """The same for Valkey."""

    kind = "valkey_black_hole"
    touches = frozenset({"valkey"})
    server = "valkey"


class ProviderBlackHole(_BlackHole):
    """The same for the provider: who called does not know whether it was done."""

    kind = "provider_black_hole"
    touches = frozenset({"provider"})
    server = "provider"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Resets(_WireFault):
    lasts_s: ClassVar[tuple[float, float]] = (0.0, 3.0)
    rounds: int
    refuse: bool

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        clients, rounds = some_clients(draw), draw.randint(1, 5)
        return cls(clients=clients, rounds=rounds, refuse=draw.random() < 0.5)

    def begin(self, world: World) -> None:
        for _ in range(self.rounds):
            for wire in self.wires(world):
                wire.mode = Mode.REFUSE if self.refuse else wire.mode
                wire.reset()
            time.sleep(0.1)

    def heal(self, world: World) -> None:
        for wire in self.wires(world):
            wire.heal()


class PostgresResets(_Resets):
    """Connections to Postgres are reset, and for a while refused."""

    kind = "postgres_resets"
    touches = frozenset({"postgres"})
    server = "postgres"


class ValkeyResets(_Resets):
    """The same for Valkey."""

    kind = "valkey_resets"
    touches = frozenset({"valkey"})
    server = "valkey"


class ProviderResets(_Resets):
    """The same for the provider, in mid-call."""

    kind = "provider_resets"
    touches = frozenset({"provider"})
    server = "provider"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlowWires(Fault):
    """Every packet takes longer, on the way to all servers."""

    kind: ClassVar[str] = "slow_wires"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres", "valkey"})
    lasts_s: ClassVar[tuple[float, float]] = (2.0, 6.0)
    clients: tuple[str, ...]
    delay_s: float

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls(clients=some_clients(draw), delay_s=draw.choice([0.02, 0.1, 0.3]))

    def begin(self, world: World) -> None:
        for client in self.clients:
            for server in ("postgres", "valkey"):
                world.wire(client, server).delay_s = self.delay_s

    def heal(self, world: World) -> None:
        for client in self.clients:
            for server in ("postgres", "valkey"):
                world.wire(client, server).heal()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplyLost(Fault):
    """Postgres commits, and whoever asked never hears of it."""

    kind: ClassVar[str] = "reply_lost"
    touches: ClassVar[frozenset[str]] = frozenset({"postgres"})
    lasts_s: ClassVar[tuple[float, float]] = (1.0, 4.0)
    statement: str
    reply: Reply
    times: int

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        reply = draw.choice([Reply.RESET, Reply.RESET, Reply.SILENCE])
        return cls(statement=draw.choice(sorted(COMMITS)), reply=reply, times=draw.randint(1, 6))

    def begin(self, world: World) -> None:
        for wire in world.exchange.of("postgres"):
            wire.trap = Trap(match=COMMITS[self.statement], reply=self.reply, times=self.times)

    def heal(self, world: World) -> None:
        for wire in world.exchange.of("postgres"):
            wire.heal()
