"""What a fault is, and the seeded sequence of faults that a run goes through."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from tests.faults.world import World


class Fault(ABC):
    """One way to break the world; a frozen dataclass with what was drawn for it.

    Attributes:
        kind: Its name in reports.
        touches: What it breaks: two faults of the same part are never at work at once.
        lasts_s: Between which bounds, in seconds, its duration is drawn.
    """

    kind: ClassVar[str]
    touches: ClassVar[frozenset[str]]
    lasts_s: ClassVar[tuple[float, float]] = (0.0, 0.0)

    @classmethod
    @abstractmethod
    def drawn(cls, draw: random.Random) -> Self:
        """One with random parameters."""

    @abstractmethod
    def begin(self, world: World) -> None:
        """Break it."""

    def heal(self, world: World) -> None:  # noqa: B027 - most heal by themselves
        """Make good what does not heal by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Strike:
    """A fault with its time; seconds from the run's start."""

    fault: Fault
    at_s: float
    lasts_s: float


PAUSE_S = (0.5, 4.0)
OVERLAP = 0.4
"""How often the next fault does not wait for the end of the one before."""


def make_plan(
    seed: int,
    seconds: float,
    kinds: Mapping[str, type[Fault]],
    *,
    pause_s: tuple[float, float] = PAUSE_S,
) -> list[Strike]:
    """The faults of a run, the same for the same seed.

    Each kind comes once before any comes again, in an order that is drawn anew each time.
    """
    draw = random.Random(f"{seed} faults")
    strikes: list[Strike] = []
    deck: list[str] = []
    now = 2.0
    while now < seconds:
        if not deck:
            deck = sorted(kinds)
            draw.shuffle(deck)
        kind = kinds[deck.pop()]
        fault, lasts_s = kind.drawn(draw), draw.uniform(*kind.lasts_s)
        begins = max([now, *(s.at_s + s.lasts_s for s in strikes if _collide(s.fault, fault))])
        strikes.append(Strike(fault=fault, at_s=begins, lasts_s=lasts_s))
        now = begins + draw.uniform(*pause_s)
        if draw.random() >= OVERLAP:
            now += lasts_s
    return [strike for strike in strikes if strike.at_s + strike.lasts_s <= seconds]


def one_after_the_other(faults: Sequence[tuple[float, float, Fault]]) -> list[Strike]:
    """A plan that is written by hand: begin, duration, fault."""
    return [Strike(fault=fault, at_s=at_s, lasts_s=lasts_s) for at_s, lasts_s, fault in faults]


def _collide(one: Fault, other: Fault) -> bool:
    return bool(one.touches & other.touches)
