"""Counts how jobs used the cache, a tier at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from decimal import Decimal

from promptfleet_shared.jobs import CacheStatus
from promptfleet_workers.telemetry import CacheUsed
from promptfleet_workers.work import Work

_ANSWERED = frozenset({CacheStatus.HIT, CacheStatus.COALESCED, CacheStatus.SEMANTIC})


class CacheTally:
    """What happened since it was last taken."""

    def __init__(self) -> None:
        """Nothing has."""
        self._answers: dict[str, Counter[str]] = {}
        self._saved: dict[str, Decimal] = {}

    def add(self, work: Work) -> None:
        """The work has ended, with whatever the cache had for it."""
        if work.cache is CacheStatus.OFF:
            return
        tier = work.job.tier
        answers = self._answers.get(tier)
        if answers is None:
            answers = self._answers[tier] = Counter()
        answers[work.cache.value] += 1
        if work.cache in _ANSWERED and work.saved_usd is not None:
            self._saved[tier] = self._saved.get(tier, Decimal(0)) + work.saved_usd

    def take(self) -> Iterable[CacheUsed]:
        """An event a tier, and a new beginning."""
        if not self._answers:
            return ()
        answers, self._answers = self._answers, {}
        saved, self._saved = self._saved, {}
        return [
            CacheUsed(tier=tier, answers=dict(counts), saved_usd=float(saved.get(tier, 0)))
            for tier, counts in answers.items()
        ]
