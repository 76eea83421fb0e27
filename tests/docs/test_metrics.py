"""The page of metrics names exactly what the registry has."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT, rows

from promptfleet_workers.balancing.places import DeploymentLoad
from promptfleet_workers.metrics import PrometheusHook
from promptfleet_workers.rate_limits.counts import LimitCounts


def test_metrics_page_has_every_metric_with_its_type_and_labels() -> None:
    told = {
        name: (cells[0], tuple(re.findall(r"`(\w+)`", cells[1])))
        for name, cells in rows(ROOT / "docs/reference/metrics.md").items()
    }
    assert told == _metrics(PrometheusHook())


def _limit_counts() -> LimitCounts:
    """One of each, so that there are labels to see."""
    counts = LimitCounts()
    for counted in (counts.reserved, counts.refused, counts.throttled):
        counted["a"] += 1
    for measured in (counts.waited_s, counts.used, counts.limits):
        measured["a"] = 1.0
    return counts


def _metrics(hook: PrometheusHook) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The type and the labels of each metric, by the name that queries use."""
    hook.watch(
        worker="",
        tiers=(),
        slots=1,
        slots_free=float,
        jobs_held=float,
        commit_age_s=float,
        watchdog_idle_s=float,
    )
    hook.watch_loads(lambda: [DeploymentLoad("a", 1, 1.0)])
    hook.registry.register(_limit_counts())
    found = {}
    for collector in hook.registry._collector_to_names:
        for family in collector.collect():
            if family.name.startswith("promptfleet_"):
                suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
                kind = "gauge" if family.type == "info" else family.type
                labels = getattr(collector, "_labelnames", None)
                if labels is None or family.type == "info":
                    labels = tuple(family.samples[0].labels)
                found[family.name + suffix] = (kind, tuple(labels))
    return found
