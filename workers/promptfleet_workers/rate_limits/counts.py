"""What the limits did, as numbers for Prometheus: read when a page is asked for."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from promptfleet_workers.rate_limits.keys import LimitKey

NOBODY = "none"
"""The label of calls that no limit made wait."""


class LimitCounts(Collector):
    """Counts by the labels of limits, which name no tenant and no key."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.reserved: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.waited_s: dict[str, float] = collections.defaultdict(float)
        self.used: dict[str, float] = collections.defaultdict(float)
        self.limits: dict[str, float] = {}
        self.throttled: collections.Counter[str] = collections.Counter()
        self.alone = 0

    def collect(self) -> Iterable[Metric]:
        """All of them, for a page."""
        yield _counter(
            "limit_reserved", "Calls let through, by the limit that made them wait.", self.reserved
        )
        yield _counter("limit_refused", "Calls sent back to wait in the database.", self.refused)
        yield _counter("limit_waited_seconds", "Time waited for a turn.", self.waited_s)
        yield _counter("limit_used", "What calls took of a limit.", self.used)
        yield _counter(
            "throttled_calls", "Calls that the provider refused as too many.", self.throttled,
            label="deployment",
        )  # fmt: skip
        alone = CounterMetricFamily(
            "promptfleet_limit_alone", "Decisions of this worker without the fleet."
        )
        alone.add_metric([], self.alone)
        yield alone
        gauge = GaugeMetricFamily(
            "promptfleet_limit", "The limit as configured, a period.", labels=["limit"]
        )
        for label, limit in list(self.limits.items()):
            gauge.add_metric([label], limit)
        yield gauge

    def know(self, keys: Iterable[LimitKey]) -> None:
        """Show these limits."""
        for key in keys:
            if key.limit is not None:
                self.limits[key.label] = key.limit


def _counter(
    name: str, text: str, counts: dict[str, int] | dict[str, float], *, label: str = "limit"
) -> Metric:
    family = CounterMetricFamily(f"promptfleet_{name}", text, labels=[label])
    for value, count in list(counts.items()):
        family.add_metric([value], count)
    return family
