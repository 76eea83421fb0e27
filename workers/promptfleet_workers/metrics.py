"""Events as numbers for Prometheus: counted a batch at a time, never with prompts or tenants."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import assert_never

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from promptfleet_workers.balancing.places import DeploymentLoad
from promptfleet_workers.telemetry import (
    BatchClaimed,
    BreakerChanged,
    BudgetNearlySpent,
    BudgetRefused,
    CacheUsed,
    CallbacksDelivered,
    Event,
    JobsFinished,
    JobsReleased,
    KeyStopped,
    Swept,
)

BATCH_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
MAX_CODES = 50
"""Codes that get a series of their own: providers make them up, and a series costs memory."""
OTHER = "other"
BREAKER_STATES = ("closed", "open", "ramp")
_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")

Read = Callable[[], float]


class PrometheusHook:
    """Counts events in a registry of its own; docs/reference/metrics.md says what each is."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        """Make all metrics; `now` in seconds since 1970."""
        self._now = now
        self.registry = CollectorRegistry()
        self._codes: set[str] = set()
        self._make_job_metrics()
        self._make_call_metrics()
        self._make_worker_metrics()
        ProcessCollector(registry=self.registry)

    def __call__(self, event: Event) -> None:
        """Count the event."""
        match event:
            case BatchClaimed():
                self._claimed(event)
            case JobsFinished():
                _add(self._finished, event.states)
                self._ended("finish", event)
            case JobsReleased():
                _add(self._released, {self._known(c): n for c, n in event.codes.items()})
                self._ended("release", event)
            case Swept():
                _add(self._swept, event.verdicts)
                self._unknown_calls.labels("sweep").inc(event.unknown_calls)
            case _:
                self._happened_besides(event)

    def _happened_besides(
        self,
        event: BreakerChanged
        | KeyStopped
        | CacheUsed
        | CallbacksDelivered
        | BudgetRefused
        | BudgetNearlySpent,
    ) -> None:
        """Count what is not about jobs that come and go."""
        match event:
            case BreakerChanged():
                for state in BREAKER_STATES:
                    self._breaker.labels(event.deployment, state).set(state == event.state)
            case KeyStopped():
                self._stopped_keys.labels(event.deployment).inc()
            case CacheUsed():
                self._cache_used(event)
            case CallbacksDelivered():
                _add(self._callbacks, event.outcomes)
                self._fenced.labels("callback").inc(event.fenced)
            case BudgetRefused():
                _add(self._budget_refusals, event.budgets)
            case BudgetNearlySpent():
                self._soft_budgets.labels(event.budget).inc()
            case _:
                assert_never(event)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its content type; `accept` as in the HTTP header."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def watch(
        self,
        *,
        worker: str,
        tiers: Sequence[str],
        slots: int,
        slots_free: Read,
        jobs_held: Read,
        commit_age_s: Read,
        watchdog_idle_s: Read,
    ) -> None:
        """Show a worker's own numbers, read anew for each page."""
        self._worker.info({"worker": worker, "tiers": ",".join(tiers)})
        self._slots.set(slots)
        self._slots_free.set_function(slots_free)
        self._jobs_held.set_function(jobs_held)
        self._last_commit.set_function(lambda: self._now() - commit_age_s())
        self._watchdog_idle.set_function(watchdog_idle_s)

    def watch_loads(self, read: Callable[[], Iterable[DeploymentLoad]]) -> None:
        """Show how busy and how slow the deployments are, read anew for each page."""
        self.registry.register(_Loads(read))

    # -- what there is -----------------------------------------------------------------------

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"promptfleet_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"promptfleet_{name}", text, labels, registry=self.registry)

    def _make_job_metrics(self) -> None:
        self._jobs_claimed = self._counter("jobs_claimed", "Jobs claimed.", "tier")
        self._stale = self._counter("stale_doorbells", "Ids with no job to claim.", "tier")
        self._failed_claims = self._counter(
            "failed_claims", "Batches whose claim the database did not take.", "tier"
        )
        self._batch_jobs = Histogram(
            "promptfleet_batch_jobs",
            "Jobs claimed together.",
            ["tier"],
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self._finished = self._counter("jobs_finished", "Jobs that ended here.", "state")
        self._released = self._counter("jobs_released", "Jobs given back to their queues.", "code")
        self._fenced = self._counter("fenced_writes", "Ends that came after the lease.", "write")
        self._swept = self._counter("swept_jobs", "Jobs judged by this sweeper.", "verdict")

    def _make_call_metrics(self) -> None:
        self._calls = self._counter("calls", "Provider calls for jobs that ended or went back.")
        self._unknown_calls = self._counter(
            "unknown_calls", "Calls that may have been answered, and billed, for nothing.", "source"
        )
        for source in ("finish", "release", "sweep"):
            self._unknown_calls.labels(source)  # so that a rise from nothing shows, too
        self._breaker = self._gauge(
            "breaker_state", "1 for the state of a deployment's breaker.", "deployment", "state"
        )
        self._stopped_keys = self._counter(
            "stopped_keys", "Times that a deployment's key was used up.", "deployment"
        )

        self._cache_answers = self._counter(
            "cache_answers", "Jobs that ended, by what the cache had for them.", "tier", "answer"
        )
        self._cache_saved = self._counter(
            "cache_saved_usd", "What answers without a call would have cost.", "tier"
        )
        self._callbacks = self._counter(
            "callback_attempts", "Attempts to deliver a callback, as they ended.", "outcome"
        )
        self._budget_refusals = self._counter(
            "budget_refusals", "Jobs that were not called because of a budget.", "budget"
        )
        self._soft_budgets = self._counter(
            "budget_soft_limits", "Times that a budget's soft limit was reached.", "budget"
        )

    def watch_parking(self, tiers: Sequence[str], parked: Callable[[str], int]) -> None:
        """Show how many jobs of each tier wait for their turn."""
        for tier in tiers:
            self._parked.labels(tier).set_function(functools.partial(parked, tier))

    def _make_worker_metrics(self) -> None:
        self._parked = self._gauge(
            "parked_jobs", "Jobs that wait for their tenant's turn, in the whole fleet.", "tier"
        )
        self._worker = Info("promptfleet_worker", "Who this is.", registry=self.registry)
        self._slots = self._gauge("slots", "Jobs that may be called at once.")
        self._slots_free = self._gauge("slots_free", "Jobs that may be taken now.")
        self._jobs_held = self._gauge("jobs_held", "Jobs under a lease of this worker.")
        self._last_commit = self._gauge(
            "last_commit_timestamp_seconds", "When the database last took something."
        )
        self._watchdog_idle = self._gauge(
            "watchdog_idle_seconds", "Time without a claim that the watchdog counts."
        )

    # -- counting ----------------------------------------------------------------------------

    def _claimed(self, event: BatchClaimed) -> None:
        if not event.answered:
            self._failed_claims.labels(event.tier).inc()
            return
        self._jobs_claimed.labels(event.tier).inc(event.claimed)
        self._stale.labels(event.tier).inc(event.rung - event.claimed)
        if event.claimed:
            self._batch_jobs.labels(event.tier).observe(event.claimed)

    def _cache_used(self, event: CacheUsed) -> None:
        for answer, count in event.answers.items():
            self._cache_answers.labels(event.tier, answer).inc(count)
        if event.saved_usd:
            self._cache_saved.labels(event.tier).inc(event.saved_usd)

    def _ended(self, write: str, event: JobsFinished | JobsReleased) -> None:
        self._calls.inc(event.calls)
        self._unknown_calls.labels(write).inc(event.unknown_calls)
        self._fenced.labels(write).inc(event.fenced)

    def _known(self, code: str) -> str:
        """The code, if it looks like one and there are not too many already."""
        if code in self._codes:
            return code
        if len(self._codes) >= MAX_CODES or not _CODE.fullmatch(code):
            return OTHER
        self._codes.add(code)
        return code


class _Loads(Collector):
    """One reading of all deployments for both of their metrics."""

    def __init__(self, read: Callable[[], Iterable[DeploymentLoad]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily(
            "promptfleet_deployment_load",
            "Jobs in flight from the whole fleet, as the balancer knows.",
            labels=["deployment"],
        )
        latency = GaugeMetricFamily(
            "promptfleet_deployment_latency_seconds",
            "What a call takes: the fleet's peak-EWMA.",
            labels=["deployment"],
        )
        for load in self._read():
            jobs.add_metric([load.deployment], load.in_flight)
            latency.add_metric([load.deployment], load.latency_s)
        return jobs, latency


def _add(counter: Counter, counts: Mapping[str, int]) -> None:
    for label, count in counts.items():
        counter.labels(label).inc(count)
