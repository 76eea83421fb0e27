"""A worker's own share of the limits, for when the fleet can't be asked: never unlimited."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from promptfleet_workers.rate_limits.asking import Grant, News, Reservation, Verdict
from promptfleet_workers.rate_limits.keys import MICROSECONDS, LimitKey

UNSEEN_WORKERS = 10
"""Workers that are assumed while nobody has been able to count them."""
BREATH_S = 60.0
"""What is served is spread over so long a time at least: a share has no minute of its own."""
_MAX_KEYS = 10_000
_REFUSED_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Of how many workers this is one, and which of them, from 0."""

    workers: int = UNSEEN_WORKERS
    place: int = UNSEEN_WORKERS - 1

    def of(self, count: float) -> float:
        """This worker's part of what can be divided."""
        return count / max(1, self.workers)

    def of_whole(self, count: float) -> int:
        """The same in whole pieces; the parts of all workers add up to `count`."""
        each, rest = divmod(int(count), max(1, self.workers))
        return each + (self.place < rest)


class LocalLimits:
    """GCRA for each rate, at a static share of it; permits are counted.

    A limit that is not known here (because only the provider tells it) does not hold.
    """

    def __init__(
        self,
        *,
        patience_s: float,
        headroom: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Have used nothing.

        Args:
            patience_s: Seconds that a call waits in the worker.
            headroom: The share of each limit that is left unused.
            clock: Gives steady seconds.
        """
        self.share = Share()
        self._patience_s = patience_s
        self._headroom = headroom
        self._clock = clock
        self._due: dict[str, float] = {}
        self._line: dict[str, float] = {}
        self._paused: dict[str, float] = {}
        self._permits: dict[str, set[str]] = {}

    def decide(self, reservation: Reservation) -> Grant:
        """All of its keys, or none."""
        now = self._clock()
        self._forget(now)
        start, decisive = now, None
        for key, _ in reservation.items:
            if key.kind == "permits" and self._is_full(key):
                return Grant(verdict=Verdict.BUSY, decisive=key, alone=True)
            ready = self._ready(key)
            if ready > start:
                start, decisive = ready, key
        if start - now > self._patience_s:
            items = () if reservation.probe else reservation.items
            wait_s = self._queue(items, start, now)
            return Grant(verdict=Verdict.LATER, wait_s=wait_s, decisive=decisive, alone=True)
        for key, cost in reservation.items:
            if key.kind == "permits":
                self._permits.setdefault(key.name, set()).add(reservation.id)
            elif (unit_s := self._unit_s(key)) is not None:
                self._due[key.name] = max(self._due.get(key.name, 0.0), now) + cost * unit_s
        return Grant(verdict=Verdict.GO, wait_s=start - now, decisive=decisive, alone=True)

    def hear(self, news: News) -> None:
        """What a worker alone can make use of."""
        now = self._clock()
        for key, difference in news.settled:
            unit_s = self._unit_s(key)
            if unit_s is not None and key.name in self._due:
                self._due[key.name] += difference * unit_s
        for key, permit in news.returned:
            permits = self._permits.get(key.name, set())
            permits.discard(permit)
            if not permits:
                self._permits.pop(key.name, None)
        for key, wait_s in news.refusals:
            if wait_s <= 0:  # a key's: slower, and no pause
                continue
            until = now + max(wait_s, _REFUSED_S)
            self._paused[key.name] = max(self._paused.get(key.name, 0.0), until)

    def _unit_s(self, key: LimitKey) -> float | None:
        """Seconds that one unit of a rate takes this worker."""
        if key.kind not in {"rate", "window"} or key.limit is None:
            return None
        period_s = key.period_us / MICROSECONDS
        return period_s * (1 + self._headroom) / self.share.of(key.limit)

    def _ready(self, key: LimitKey) -> float:
        if key.kind == "health":
            return self._paused.get(key.name, 0.0)
        return self._due.get(key.name, 0.0)

    def _is_full(self, key: LimitKey) -> bool:
        # What is found out by trying can't be, alone: a share of what is configured, or one.
        most = 1 if key.limit is None else self.share.of_whole(key.limit)
        return len(self._permits.get(key.name, ())) >= most

    def _queue(self, items: Sequence[tuple[LimitKey, float]], start: float, now: float) -> float:
        """Another time for each of those that must come again."""
        at = start
        for key, cost in items:
            unit_s = self._unit_s(key)
            if unit_s is not None and self._ready(key) > now + self._patience_s:
                ready = max(self._line.get(key.name, 0.0), self._ready(key))
                at = max(at, ready)
                self._line[key.name] = ready + cost * unit_s
        return at - now - self._patience_s / 2

    def _forget(self, now: float) -> None:
        for times in (self._due, self._line, self._paused):
            if len(times) > _MAX_KEYS:
                for name in [name for name, at in times.items() if at < now]:
                    del times[name]
