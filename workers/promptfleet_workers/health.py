"""A worker's health over HTTP: whether it lives, whether it is ready, and its metrics.

The server runs on the worker's own event loop: where that is blocked, nobody answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from aiohttp import web

from promptfleet_shared.errors import ConfigurationError

log = logging.getLogger(__name__)

RECENT_S = 10.0
"""How long ago database, broker and consumer may have been heard of in a worker that is ready."""
RECENT_SWEEPS = 5
ASK_S = 3.0
_OK, _UNAVAILABLE = 200, 503

MetricsPage = Callable[[str], tuple[bytes, str]]
"""Given the Accept header, a page and its content type."""


class Phase(enum.Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Committing(Protocol):
    """A database that remembers its last commit."""

    @property
    def last_commit(self) -> float:
        """By `time.monotonic`; 0.0 before the first."""
        ...


class Answering(Protocol):
    """A broker that remembers its last answer."""

    @property
    def answered_at(self) -> float:
        """By `time.monotonic`; 0.0 before the first."""
        ...


class Vitals:
    """What a worker knows of its own health; instants are by `time.monotonic`.

    Attributes:
        phase: Where it is in its life.
        looked_at: When Celery's consumer last looked at the queues.
    """

    def __init__(
        self,
        *,
        databases: Sequence[Committing],
        broker: Answering,
        tiers: Sequence[str],
        stale_s: float,
        sweep_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            databases: All that commit for this worker.
            broker: What is asked about the queues.
            tiers: Which tiers it serves.
            stale_s: Seconds without a commit after which it is not alive; at least a few sweeps,
                since an idle worker commits with each.
            sweep_interval_s: Seconds between sweeps.
            clock: In seconds.
        """
        self._databases = databases
        self._broker = broker
        self._clock = clock
        self._born = clock()
        self._stale_s = max(stale_s, RECENT_SWEEPS * sweep_interval_s)
        self._recent_s = max(RECENT_S, RECENT_SWEEPS * sweep_interval_s)
        self.tiers = tuple(tiers)
        self.phase = Phase.STARTING
        self.looked_at = 0.0

    @property
    def commit_age_s(self) -> float:
        """Seconds since the last commit; since the start, while there was none."""
        commits = (database.last_commit for database in self._databases)
        return self._clock() - max(self._born, *commits)

    @property
    def alive(self) -> bool:
        """False if this worker has committed nothing for too long."""
        return self.commit_age_s <= self._stale_s

    @property
    def broker_is_silent(self) -> bool:
        """True if the broker has not answered lately."""
        return self._clock() - self._broker.answered_at > self._recent_s

    def obstacles(self) -> list[str]:
        """Why no work should be expected of this worker now; empty if it is ready."""
        found = [] if self.phase is Phase.SERVING else [f"the worker is {self.phase.value}"]
        if not self.tiers:
            found.append("it serves no tier")
        if self.commit_age_s > self._recent_s:
            found.append(f"the database has taken nothing for {self.commit_age_s:.0f} s")
        if self.broker_is_silent:
            found.append(f"the broker has not answered within {self._recent_s:g} s")
        if self._clock() - self.looked_at > self._recent_s:
            found.append(f"nobody has looked at the queues within {self._recent_s:g} s")
        return found


class HealthServer:
    """Serves `/healthz`, `/readyz` and `/metrics`."""

    def __init__(
        self,
        vitals: Vitals,
        *,
        host: str,
        port: int,
        metrics: MetricsPage,
        ask_broker: Callable[[], Awaitable[object]],
    ) -> None:
        """Serve nothing yet.

        Args:
            vitals: What to tell.
            host: The address to listen on.
            port: The port; 0 for any free one.
            metrics: Makes the page of metrics.
            ask_broker: Asks now, where nobody has lately: the sweeper does not while it waits for
                the database.
        """
        self._vitals = vitals
        self._host = host
        self._port = port
        self._metrics = metrics
        self._ask_broker = ask_broker
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Serve until `stop`; returns the URL.

        Raises:
            ConfigurationError: It can't listen there.
        """
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics_page)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError as error:
            await runner.cleanup()
            msg = (
                f"health can't be served on {self._host}:{self._port} (error {error.errno}): set"
                " PROMPTFLEET_HEALTH_PORT to 0 for any free port, or to nothing for no server"
            )
            raise ConfigurationError(msg) from None
        self._runner = runner
        url = _url(runner.addresses[0])
        log.info("health_served", extra={"url": url})
        return url

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _healthz(self, _: web.Request) -> web.Response:
        alive, age_s = self._vitals.alive, self._vitals.commit_age_s
        facts = {"status": "alive" if alive else "stale", "last_commit_age_s": round(age_s, 3)}
        return web.json_response(facts, status=_OK if alive else _UNAVAILABLE)

    async def _readyz(self, _: web.Request) -> web.Response:
        if self._vitals.broker_is_silent:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_S):
                    await self._ask_broker()
        reasons = self._vitals.obstacles()
        facts = {
            "status": "not ready" if reasons else "ready",
            "reasons": reasons,
            "tiers": self._vitals.tiers,
        }
        return web.json_response(facts, status=_UNAVAILABLE if reasons else _OK)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})


def _url(address: Any) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
