"""What the workers tell the world: frozen events to hooks; never prompts, outputs or keys."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from promptfleet_shared.jobs import Outcome, Release


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchClaimed:
    """A batch was claimed; `rung - claimed` of its doorbells were stale."""

    tier: str
    rung: int
    claimed: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobsFinished:
    """Jobs reached their ends in one transaction; `fenced` of them were somebody else's by then."""

    jobs: int
    fenced: int
    states: Mapping[str, int]
    calls: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], *, fenced: int) -> JobsFinished:
        """Count them."""
        states = collections.Counter(outcome.state.value for outcome in outcomes)
        calls = sum(outcome.calls for outcome in outcomes)
        return cls(jobs=len(outcomes), fenced=fenced, states=dict(states), calls=calls)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobsReleased:
    """Jobs went back to their queues; `codes` counts why."""

    jobs: int
    fenced: int
    codes: Mapping[str, int]

    @classmethod
    def of(cls, releases: Sequence[Release], *, fenced: int) -> JobsReleased:
        """Count them."""
        codes = collections.Counter(r.error.code if r.error else "drained" for r in releases)
        return cls(jobs=len(releases), fenced=fenced, codes=dict(codes))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """The sweeper judged jobs whose timer was due, or rang for silent ones.

    Attributes:
        unknown_calls: Calls that lost claims had begun, and of which nobody knows what became.
    """

    verdicts: Mapping[str, int]
    unknown_calls: int = 0


Event = BatchClaimed | JobsFinished | JobsReleased | Swept
Emit = Callable[[Event], None]


def emit_to(hooks: Iterable[Emit]) -> Emit:
    """One function that tells every hook."""
    listeners = tuple(hooks)

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


class LogHook:
    """Writes events as log lines: what needs attention as a warning, the rest for debugging."""

    def __init__(self) -> None:
        """Log to structlog."""
        self._log = structlog.stdlib.get_logger("promptfleet")
        self._debugs = logging.getLogger("promptfleet").isEnabledFor(logging.DEBUG)

    def __call__(self, event: Event) -> None:
        """Log the event."""
        name = type(event).__name__
        match event:
            case JobsFinished(fenced=fenced) | JobsReleased(fenced=fenced) if fenced:
                self._log.warning(name, **dataclasses.asdict(event))
            case Swept(verdicts=verdicts) if verdicts.keys() & {"lost", "poison", "expired"}:
                self._log.warning(name, **dataclasses.asdict(event))
            case _ if self._debugs:
                self._log.debug(name, **dataclasses.asdict(event))
            case _:
                pass
