"""Swap what this worker has in flight for what the fleet has: one round trip for all deployments.

Redis may be slow, away or empty: nobody waits for this, and the worker goes on with its own counts.
A worker that dies is forgotten `LEASE_S` after its last exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import logging
import time
import uuid
from collections.abc import Callable, Sequence

import orjson

from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_workers.balancing.places import ALONE_AFTER_S, LoadReport, Places

log = logging.getLogger(__name__)

TAG = "{promptfleet:loads}"
KEYS = (f"{TAG}:heard", f"{TAG}:said", f"{TAG}:sums", f"{TAG}:latencies")
INTERVAL_S = 0.25
"""Between two exchanges while there are jobs in flight; so old is what is known of others."""
IDLE_S = 1.0
"""Between two exchanges otherwise."""
LEASE_S = 3.0
"""A silent worker's jobs count for so long."""
TIMEOUT_S = 1.0


class LoadExchange:
    """Keeps this worker's places and the fleet's, which are in Redis, alike."""

    def __init__(
        self,
        places: Places,
        url: str,
        *,
        interval_s: float = INTERVAL_S,
        idle_s: float = IDLE_S,
        lease_s: float = LEASE_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first exchange.

        Args:
            places: This worker's.
            url: As in redis://user:password@host:6379/0.
            interval_s: Seconds between exchanges while there are jobs in flight.
            idle_s: Seconds between exchanges otherwise.
            lease_s: Seconds after which a worker that says nothing is forgotten.
            timeout_s: Seconds that an exchange may take.
            clock: Gives steady seconds.
        """
        self.worker = uuid.uuid4().hex
        self._places = places
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._lease_ms = round(lease_s * 1000)
        self._timeout_s = timeout_s
        self._clock = clock
        self._heard_at = clock()
        self._woken = asyncio.Event()
        self._lost = False
        self._closing = False
        self._ended = asyncio.Event()
        self._ended.set()
        self._redis = impatient_client(url, connect_s=timeout_s)
        files = importlib.resources.files("promptfleet_workers.balancing")
        self._script = self._redis.register_script(files.joinpath("loads.lua").read_text("utf-8"))
        places.wake = self._woken.set

    async def run(self) -> None:
        """Exchange until closed, from the first placed job on."""
        self._ended.clear()
        try:
            if not self._places.used:
                await self._woken.wait()
            while not self._closing:
                self._woken.clear()
                await self.exchange()
                busy = any(place.own for place in self._places.all())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s if busy else self._idle_s):
                        await self._woken.wait()
        finally:
            self._ended.set()

    async def exchange(self) -> bool:
        """One round trip; false if the fleet could not be asked. Raises nothing of Redis."""
        places = self._places.all()
        reports = [place.report() for place in places]
        try:
            async with asyncio.timeout(self._timeout_s):
                views = await self._ask(reports)
        except REDIS_FAILURES as error:
            self._not_heard(error)
            return False
        self._heard_at = self._clock()
        self._lost = False
        for place, report, (total, latency_ms, rest_ms) in zip(places, reports, views, strict=True):
            place.adopt(
                report, total=int(total), latency_s=latency_ms / 1000, rest_s=rest_ms / 1000
            )
        return True

    async def _ask(self, reports: Sequence[LoadReport]) -> list[tuple[float, float, float]]:
        told = [
            [
                report.name,
                report.in_flight,
                report.peak_s * 1000,
                report.mean_s * 1000,
                report.rest_s * 1000,
                report.decay_s * 1000,
            ]
            for report in reports
        ]
        values: list[bytes | str | int] = [self.worker, self._lease_ms, orjson.dumps(told)]
        views: list[tuple[float, float, float]] = orjson.loads(
            await self._script(keys=list(KEYS), args=values)
        )
        return views

    async def aclose(self) -> None:
        """Let a running exchange end, take this worker's load back, and close the connection."""
        self._closing = True
        self._woken.set()
        await self._ended.wait()
        if self._places.used:
            await self.exchange()
        await self._redis.aclose()

    def _not_heard(self, error: Exception) -> None:
        if not self._lost:
            log.warning("balancing_alone", extra={"error": type(error).__name__})
        self._lost = True
        if self._clock() - self._heard_at > ALONE_AFTER_S:
            for place in self._places.all():
                place.forget_others()
