"""Swap what this worker's breakers counted for what the fleet knows: one round trip for all.

Redis may be slow, away or empty: nobody waits for this, and the breakers go on by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_workers.breaker_reports import FleetView, Report, Terms
from promptfleet_workers.breakers import Breakers

log = logging.getLogger(__name__)

KEY = "promptfleet:breaker:{%s}"
INTERVAL_S = 0.25
"""Between two exchanges while there is something to say or a breaker is not closed."""
IDLE_S = 1.0
"""Between two looks at the fleet otherwise; so old is an idle worker's knowledge at most."""
PAUSE_S = 0.02
"""Between two exchanges when something can't wait: a probe, an opening."""
TIMEOUT_S = 1.0


class BreakerExchange:
    """Keeps this worker's breakers and the fleet's, which are in Redis, alike."""

    def __init__(
        self,
        breakers: Breakers,
        url: str,
        *,
        interval_s: float = INTERVAL_S,
        idle_s: float = IDLE_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first exchange.

        Args:
            breakers: This worker's.
            url: As in redis://user:password@host:6379/0.
            interval_s: Seconds between exchanges while there is something to say.
            idle_s: Seconds between exchanges otherwise.
            timeout_s: Seconds that an exchange may take.
            clock: The breakers' own.
        """
        self._breakers = breakers
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._urgent = asyncio.Event()
        self._terms = orjson.dumps(Terms.of(breakers.options))
        self._lost = False
        self._closing = False
        self._ended = asyncio.Event()
        self._ended.set()
        self._redis = impatient_client(url, connect_s=timeout_s)
        files = importlib.resources.files("promptfleet_workers")
        self._script = self._redis.register_script(files.joinpath("breaker.lua").read_text("utf-8"))
        for breaker in breakers.all():
            breaker.wake = self._urgent.set

    async def run(self) -> None:
        """Exchange until closed; at once where something can't wait."""
        self._ended.clear()
        try:
            while self._breakers.options.enabled and not self._closing:
                self._urgent.clear()
                await self.exchange()
                await asyncio.sleep(PAUSE_S)
                await self._pause()
        finally:
            self._ended.set()

    async def _pause(self) -> None:
        busy = any(breaker.busy for breaker in self._breakers.all())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s if busy else self._idle_s):
                await self._urgent.wait()

    async def exchange(self) -> bool:
        """One round trip; false if the fleet could not be asked. Raises nothing of Redis."""
        if not self._breakers.options.enabled:
            return False
        breakers = self._breakers.all()
        asked_at = self._clock()
        reports = [breaker.report() for breaker in breakers]
        try:
            async with asyncio.timeout(self._timeout_s):
                replies = await self._ask(reports, [KEY % breaker.name for breaker in breakers])
        except REDIS_FAILURES as error:
            for breaker, report in zip(breakers, reports, strict=True):
                breaker.not_heard(report)
            self._say_lost(error)
            return False
        for breaker, report, reply in zip(breakers, reports, replies, strict=True):
            breaker.adopt(FleetView(**orjson.loads(reply)), report, asked_at=asked_at)
        self._lost = False
        return True

    async def _ask(self, reports: Sequence[Report], keys: Sequence[str]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key, report in zip(keys, reports, strict=True):
                values = [self._terms, orjson.dumps(report)]
                await self._script(keys=[key], args=values, client=pipeline)
            return await pipeline.execute()

    async def aclose(self) -> None:
        """Let a running exchange end, and close the connection."""
        self._closing = True
        self._urgent.set()
        await self._ended.wait()
        await self._redis.aclose()

    def _say_lost(self, error: Exception) -> None:
        if not self._lost:
            log.warning("breaker_alone", extra={"error": type(error).__name__})
        self._lost = True
