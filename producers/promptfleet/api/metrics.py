"""The API's numbers for Prometheus, in a registry of its own; no label ever names a tenant."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

_METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROUTE = ("method", "route")


class ApiMetrics:
    """What one process of the API has answered.

    Attributes:
        in_flight: Requests that are being answered now.
    """

    def __init__(self) -> None:
        """Make all metrics, in a registry of their own."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "promptfleet_api_requests",
            "Requests answered, by route template and status; 0 where the client left.",
            (*_ROUTE, "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "promptfleet_api_request_seconds",
            "Seconds from a request's headers to the end of its response.",
            _ROUTE,
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "promptfleet_api_requests_in_flight",
            "Requests that are being answered now, streams and waiting ones among them.",
            registry=registry,
        )
        self._accepted = Counter(
            "promptfleet_api_jobs_accepted", "Jobs committed, replays left out.", registry=registry
        )
        self._refused = Counter(
            "promptfleet_api_refused",
            "Requests refused to protect the database, by the limit that did it.",
            ("limit",),
            registry=registry,
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def accepted(self, jobs: int) -> None:
        """So many jobs were committed."""
        self._accepted.inc(jobs)

    def refused(self, limit: str) -> None:
        """A limit held."""
        self._refused.labels(limit).inc()

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its content type; `accept` as in the HTTP header."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
