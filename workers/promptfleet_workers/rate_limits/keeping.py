"""Keeps what was used of limits of an hour and longer in Postgres, lest Redis lose it.

Redis notes which windows were changed. About once a second one of the workers writes those down,
all in one statement; a Redis that lost them is told again before it lets anything through.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.policies.limits import PERIODS_S
from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.store import limit_windows
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.limit_windows import LimitWindow
from promptfleet_workers.rate_limits.asking import Pieces
from promptfleet_workers.rate_limits.exchange import CHANGED, PREFIX
from promptfleet_workers.rate_limits.keys import MICROSECONDS, LimitKey

log = logging.getLogger(__name__)

KEEPER = f"{PREFIX}keeper"
"""Whose turn it was last to keep them."""
KEEP_EVERY_S = 1.0
TIMEOUT_S = 3.0
"""For a question to Redis, and for the last round of a worker that ends."""
PRUNE_EVERY_S = 3600.0
_AT_ONCE = 500
_PRUNED_AT_ONCE = 1000
_FAILURES = (*REDIS_FAILURES, StoreRefusedError, StoreUnavailableError)


class WindowKeeping:
    """Keeps and recalls windows; lives on a worker's event loop."""

    def __init__(
        self,
        url: str,
        database: AsyncDatabase,
        *,
        every_s: float = KEEP_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first round.

        Args:
            url: Of the Redis with the limits.
            database: Where they are kept.
            every_s: Seconds between two rounds, of whichever workers.
            clock: Gives steady seconds.
        """
        self._redis = impatient_client(url, connect_s=TIMEOUT_S)
        self._database = database
        self._every_s = every_s
        self._clock = clock
        self._worker = uuid.uuid4().hex
        self._pruned_at = clock()
        self._fails = False

    async def recall(self, keys: Sequence[LimitKey]) -> Mapping[str, Pieces]:
        """See `WindowMemory`."""
        wanted = [(key.tenant, key.name) for key in keys]
        return await self._database.run(lambda c: limit_windows.recall_windows(c, wanted))

    async def run(self) -> None:
        """Take turns with the other workers at keeping them, until cancelled."""
        while True:
            try:
                if await self._is_my_turn():
                    await self.keep()
                    await self._prune()
                self._fails = False
            except _FAILURES as error:
                if not self._fails:
                    facts = {"error": type(error).__name__}
                    log.warning("limit_windows_not_kept", extra=facts)
                self._fails = True
            await asyncio.sleep(self._every_s)

    async def keep(self) -> int:
        """Write down the windows that were changed; how many.

        Raises:
            RedisError: Or another of `REDIS_FAILURES`; what is not kept now is kept the next time.
            StoreUnavailableError: See `Database.run`; the same holds.
        """
        async with asyncio.timeout(TIMEOUT_S):
            seconds, microseconds = await self._redis.time()
            members: Any = await self._redis.zrange(CHANGED, 0, -1)
        seen_us = seconds * MICROSECONDS + microseconds
        kept = 0
        for start in range(0, len(members), _AT_ONCE):
            windows = await self._look_at(members[start : start + _AT_ONCE])
            kept += len(windows)
            if windows:
                await self._keep(windows, seen_us)
        if members:
            # What has been changed since it was looked at stays, for the next time.
            async with asyncio.timeout(TIMEOUT_S):
                await self._redis.zremrangebyscore(CHANGED, "-inf", f"({seen_us}")
        return kept

    async def aclose(self) -> None:
        """Keep what is left to be kept, and close the connection."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self.keep()
        except _FAILURES as error:
            log.warning("limit_windows_not_kept", extra={"error": type(error).__name__})
        await self._redis.aclose()

    async def _is_my_turn(self) -> bool:
        px = max(1, round(self._every_s * 900))  # a bit less than the rounds are apart
        async with asyncio.timeout(TIMEOUT_S):
            return bool(await self._redis.set(KEEPER, self._worker, nx=True, px=px))

    async def _look_at(self, members: Sequence[bytes]) -> list[LimitWindow]:
        places = [member.decode().split("\0", 1) for member in members]
        async with asyncio.timeout(TIMEOUT_S), self._redis.pipeline(transaction=False) as pipe:
            for _, key in places:
                pipe.hgetall(key)
            found = await pipe.execute()
        return [
            _window(tenant, key.removeprefix(PREFIX), fields)
            for (tenant, key), fields in zip(places, found, strict=True)
            if b"known" in fields  # else it is but a part of what was used
        ]

    async def _keep(self, windows: Sequence[LimitWindow], seen_us: int) -> None:
        await self._database.run(lambda c: limit_windows.keep_windows(c, windows, seen_us=seen_us))

    async def _prune(self) -> None:
        if self._clock() - self._pruned_at < PRUNE_EVERY_S:
            return
        self._pruned_at = self._clock()
        gone = _PRUNED_AT_ONCE
        while gone == _PRUNED_AT_ONCE:
            gone = await self._database.run(
                lambda c: limit_windows.prune_windows(c, limit=_PRUNED_AT_ONCE)
            )


def _window(tenant: str, name: str, fields: Mapping[bytes, bytes]) -> LimitWindow:
    period_s = PERIODS_S[name.rpartition("_per_")[2]]
    pieces = {int(field): float(used) for field, used in fields.items() if field.isdigit()}
    return LimitWindow(tenant=tenant, name=name, period_s=period_s, pieces=pieces)
