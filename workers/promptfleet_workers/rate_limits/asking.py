"""What is asked of whoever keeps the limits, and what they answer."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from promptfleet_workers.rate_limits.keys import LimitKey

Pieces: TypeAlias = Sequence[tuple[int, float]]
"""What was used of a window in each sixtieth of its period, by the sixtieth's number."""


class Verdict(enum.IntEnum):
    """What is said about a call; the numbers are reserve.lua's."""

    GO = 0  # after the wait
    LATER = 1  # ask again after the wait
    BUSY = 2  # as many are in flight as may be
    UNKNOWN = 3  # what was used of a window must be told first; whoever asks never sees this


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """A call that wants to be made.

    Attributes:
        id: Of its permits.
        items: Its keys, and how much of each it takes.
        turn: 0 for one that comes for the first time; 1 for one that has waited in line, and goes
            before those; 2 for one that has waited twice or is urgent, and goes before all.
        probe: True to be told the wait without joining the line for it.
        sure: False where its cost is a mere guess, so that a place far back in line would be, too.
    """

    id: str
    items: Sequence[tuple[LimitKey, float]]
    turn: int = 0
    sure: bool = True
    probe: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """The answer to a reservation.

    Attributes:
        wait_s: Seconds from when it was decided.
        decisive: The key that made it wait; None where nothing did.
        alone: True if this worker decided without the fleet.
    """

    verdict: Verdict
    wait_s: float = 0.0
    decisive: LimitKey | None = None
    alone: bool = False


@dataclasses.dataclass(slots=True)
class News:
    """What is to be told with the next question; reserve.lua says what becomes of each.

    Attributes:
        settled: How much more (or less) a call took of a key than was reserved.
        returned: Permits of calls that ended.
        refusals: Healths of deployments that refused a call, and seconds that they asked for.
        outcomes: Healths and permits of adaptive deployments, and whether a call went well.
        told: Limits that providers told, and for how many seconds they are believed; 0 for always.
    """

    settled: list[tuple[LimitKey, float]] = dataclasses.field(default_factory=list)
    returned: list[tuple[LimitKey, str]] = dataclasses.field(default_factory=list)
    refusals: list[tuple[LimitKey, float]] = dataclasses.field(default_factory=list)
    outcomes: list[tuple[LimitKey, LimitKey, bool]] = dataclasses.field(default_factory=list)
    told: list[tuple[LimitKey, float, float]] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.settled or self.returned or self.refusals or self.outcomes or self.told)


def unused(reservation: Reservation) -> News:
    """What to tell when a call that may be made is not made after all."""
    news = News()
    for key, cost in reservation.items:
        if key.kind == "permits":
            news.returned.append((key, reservation.id))
        elif cost:
            news.settled.append((key, -cost))
    return news


class WindowMemory(Protocol):
    """Knows what was used of limits of an hour and longer, whatever becomes of Redis."""

    async def recall(self, keys: Sequence[LimitKey]) -> Mapping[str, Pieces]:
        """What was used of these windows, by their names, as far as it is known.

        Raises:
            StoreUnavailableError: It can't be asked now.
            StoreRefusedError: It did not take the question.
        """
        ...


class LimitKeeper(Protocol):
    """Keeps limits: the fleet's in Redis, or a share of them in this process."""

    async def reserve(self, reservation: Reservation) -> Grant:
        """Ask for leave to make a call."""
        ...

    def tell(self, news: News) -> None:
        """Tell what happened; nobody waits for that."""
        ...

    async def aclose(self) -> None:
        """Tell what is left to be told, and give back connections."""
        ...
