"""Where jobs are in flight: the load and the latency of each deployment, as this worker knows it.

Nothing here waits or does I/O. A job counts from the moment it is placed; `load_exchange` swaps
what this worker counted for what the fleet did. Where the fleet can't be asked, a worker goes on
with its own counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from promptfleet_shared.fleet import Deployment

ALONE_AFTER_S = 3.0
"""Without news of the fleet for so long, a worker goes by its own counts."""
FAILED_S = 1.0
"""What a failed call counts at least: one that fails at once must not look quick."""
REST_S = 1.0
"""How long a deployment that refused for being too busy is passed over, where it names no time."""
MAX_REST_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What a worker tells the fleet of one deployment.

    Attributes:
        in_flight: Jobs of this worker there, now.
        peak_s: The slowest call since the last report; 0 without one.
        mean_s: The mean of those calls.
        rest_s: Seconds for which the deployment asked to be left alone.
    """

    name: str
    in_flight: int
    peak_s: float
    mean_s: float
    rest_s: float
    decay_s: float


class DeploymentLoad(NamedTuple):
    """For metrics; `latency_s` is not a number while nobody knows."""

    deployment: str
    in_flight: int
    latency_s: float


class Place:
    """One deployment; the hot path reads and counts attributes."""

    def __init__(
        self, deployment: Deployment, *, decay_s: float, clock: Callable[[], float]
    ) -> None:
        """Nothing is in flight, and nothing known."""
        self.name = deployment.name
        self.limit = deployment.max_concurrency
        self.own = 0
        self.others = 0
        self._decay_s = decay_s
        self._clock = clock
        self._latency_s = 0.0
        self._seen_at = clock()
        self._rest_until = -math.inf
        # Since the last report.
        self._peak_s = self._sum_s = 0.0
        self._calls = 0

    @property
    def in_flight(self) -> int:
        """Jobs in flight here from the whole fleet."""
        return self.own + self.others

    @property
    def has_room(self) -> bool:
        """False while there are as many jobs as there should be, or it asked for a rest."""
        if self.limit is not None and self.own + self.others >= self.limit:
            return False
        return self._clock() >= self._rest_until

    @property
    def latency_s(self) -> float | None:
        """The peak-EWMA of the fleet's calls; None while none is known."""
        if not self._latency_s:
            return None
        return self._latency_s * self._weight(self._clock())

    # -- calls -----------------------------------------------------------------------------------

    def answered(self, elapsed_s: float) -> None:
        """A call ended well."""
        self._peak_s = max(self._peak_s, elapsed_s)
        self._sum_s += elapsed_s
        self._calls += 1
        self._observe(elapsed_s, elapsed_s)

    def failed(self, elapsed_s: float) -> None:
        """A call failed: it counts as twice as slow as usual, so that others are tried."""
        self.answered(max(elapsed_s, 2 * (self.latency_s or 0.0), FAILED_S))

    def rest(self, for_s: float | None) -> None:
        """It is too busy: pass it over for a time, while there are others."""
        wait_s = min(MAX_REST_S, REST_S if for_s is None else for_s)
        self._rest_until = max(self._rest_until, self._clock() + wait_s)

    # Finagle's PeakEwma: a peak counts at once, and is forgotten with time. Source:
    # https://github.com/twitter/finagle, finagle-core/src/main/scala/com/twitter/finagle/
    # loadbalancer/PeakEwma.scala; the weight by the time between observations is that of
    # http://www.eckner.com/papers/ts_alg.pdf.
    def _observe(self, peak_s: float, mean_s: float) -> None:
        now = self._clock()
        if peak_s > self._latency_s:
            self._latency_s = peak_s
        else:
            weight = self._weight(now)
            self._latency_s = self._latency_s * weight + mean_s * (1 - weight)
        self._seen_at = now

    def _weight(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._seen_at) / self._decay_s)

    # -- the exchange ----------------------------------------------------------------------------

    def report(self) -> LoadReport:
        """What to tell the fleet; the calls count as told."""
        report = LoadReport(
            name=self.name,
            in_flight=self.own,
            peak_s=self._peak_s,
            mean_s=self._sum_s / max(1, self._calls),
            rest_s=max(0.0, self._rest_until - self._clock()),
            decay_s=self._decay_s,
        )
        self._peak_s = self._sum_s = 0.0
        self._calls = 0
        return report

    def adopt(self, report: LoadReport, *, total: int, latency_s: float, rest_s: float) -> None:
        """Go on with what the fleet answered to a report; `total` includes what it told."""
        now = self._clock()
        self.others = max(0, total - report.in_flight)
        self._latency_s = max(latency_s, self._peak_s)  # calls that ended meanwhile
        self._seen_at = now
        if rest_s > 0:
            self._rest_until = max(self._rest_until, now + rest_s)

    def forget_others(self) -> None:
        """The fleet can't be asked."""
        self.others = 0


class Places:
    """All deployments; used on the event loop's thread only."""

    def __init__(self, places: Sequence[Place]) -> None:
        """Keep them by name."""
        self._places: Mapping[str, Place] = {place.name: place for place in places}
        self.wake: Callable[[], None] = lambda: None  # set by the exchange
        self._used = False

    def __getitem__(self, name: str) -> Place:
        """The place of a deployment."""
        return self._places[name]

    def all(self) -> Sequence[Place]:
        """Each of them."""
        return tuple(self._places.values())

    def use(self) -> None:
        """A job was placed: from now on the fleet's loads matter."""
        if not self._used:
            self._used = True
            self.wake()

    @property
    def used(self) -> bool:
        """True once a job was placed."""
        return self._used
