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
    """A batch was claimed; `rung - claimed` of its doorbells were stale.

    Attributes:
        answered: False if the database did not take the claim, so that nothing was claimed.
    """

    tier: str
    rung: int
    claimed: int
    answered: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobsFinished:
    """Jobs reached their ends in one transaction; `fenced` of them were somebody else's by then.

    Attributes:
        calls: Provider calls made for them.
        unknown_calls: Those whose outcome (and bill) nobody knows.
    """

    jobs: int
    fenced: int
    states: Mapping[str, int]
    calls: int
    unknown_calls: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], *, fenced: int) -> JobsFinished:
        """Count them."""
        states = collections.Counter(outcome.state.value for outcome in outcomes)
        return cls(
            jobs=len(outcomes),
            fenced=fenced,
            states=dict(states),
            calls=sum(outcome.calls for outcome in outcomes),
            unknown_calls=sum(outcome.unknown_calls for outcome in outcomes),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobsReleased:
    """Jobs went back to their queues; `codes` counts why, the rest is as for `JobsFinished`."""

    jobs: int
    fenced: int
    codes: Mapping[str, int]
    calls: int
    unknown_calls: int

    @classmethod
    def of(cls, releases: Sequence[Release], *, fenced: int) -> JobsReleased:
        """Count them."""
        codes = collections.Counter(r.error.code if r.error else "drained" for r in releases)
        return cls(
            jobs=len(releases),
            fenced=fenced,
            codes=dict(codes),
            calls=sum(release.calls for release in releases),
            unknown_calls=sum(release.unknown_calls for release in releases),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """The sweeper judged jobs whose timer was due, or rang for silent ones.

    Attributes:
        unknown_calls: Calls that lost claims had begun, and of which nobody knows what became.
    """

    verdicts: Mapping[str, int]
    unknown_calls: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BreakerChanged:
    """A deployment's breaker changed, as this worker sees it.

    Attributes:
        state: "closed", "open" or "ramp".
        fleet: False if this worker judged by itself.
        stopped: True if it opened because the key's quota is exhausted.
        for_s: Seconds until a probe, where it opened.
    """

    deployment: str
    state: str
    fleet: bool
    stopped: bool = False
    for_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeyStopped:
    """A key's quota is exhausted: the fleet makes no call with it for a time. Somebody must act."""

    deployment: str
    for_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CallbacksDelivered:
    """Attempts to deliver callbacks were written down together.

    Attributes:
        outcomes: How many of them were: delivered; failed, to be tried again; exhausted, to be
            tried no more; disabled, for their endpoint wants no more; returned, not tried.
        fenced: Those that were somebody else's by then, so that their receivers hear it twice.
    """

    outcomes: Mapping[str, int]
    fenced: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRefused:
    """Jobs were not called because of budgets; how many, by budget."""

    budgets: Mapping[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> BudgetRefused:
        """Count them."""
        return cls(budgets=dict(collections.Counter(names)))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetNearlySpent:
    """A budget's soft limit is reached in this period."""

    budget: str
    spent_usd: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheUsed:
    """Jobs of a tier that might have been answered from the cache have ended, in one transaction.

    Attributes:
        answers: How many of them were a `miss`, a `hit`, `coalesced`, `semantic`.
        saved_usd: What those without a call of their own would have cost, where that is known.
    """

    tier: str
    answers: Mapping[str, int]
    saved_usd: float


Event = (
    BatchClaimed
    | JobsFinished
    | JobsReleased
    | Swept
    | BreakerChanged
    | KeyStopped
    | CallbacksDelivered
    | CacheUsed
    | BudgetRefused
    | BudgetNearlySpent
)
Emit = Callable[[Event], None]


def emit_to(hooks: Iterable[Emit]) -> Emit:
    """One function that tells every hook."""
    listeners = tuple(hooks)

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


_LOSSES = frozenset({"lost", "poison", "unknown", "expired"})
"""Verdicts of the sweeper that somebody should hear of."""


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
            case Swept(verdicts=verdicts) if verdicts.keys() & _LOSSES:
                self._log.warning(name, **dataclasses.asdict(event))
            case CallbacksDelivered(outcomes=lost) if lost.keys() & {"exhausted", "disabled"}:
                self._log.warning(name, **dataclasses.asdict(event))
            case KeyStopped():
                self._log.error(name, **dataclasses.asdict(event))
            case BudgetNearlySpent():
                self._log.warning(name, **dataclasses.asdict(event))
            case BreakerChanged(state=state):
                level = logging.WARNING if state == "open" else logging.INFO
                self._log.log(level, name, **dataclasses.asdict(event))
            case _ if self._debugs:
                self._log.debug(name, **dataclasses.asdict(event))
            case _:
                pass
