"""A cache in Redis or Valkey, which a whole fleet shares: values, and whose turn it is."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.client import PubSub

from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_workers.caching.protocol import Item, Reply, Turn

log = logging.getLogger(__name__)

TIMEOUT_S = 0.25
"""What one look-up or one filling may take before the batch goes on without it."""
COOL_DOWN_S = 2.0
"""After a failure the cache is left alone for so long: a slow one must not slow every batch."""
LEASE_S = 6.0
"""How long the fleet waits for a worker that was lost in the middle of a call."""
CHANNEL = "promptfleet:cache-settled"
MARK = b"\xffcall:"
"""How a lease begins; no value does, whose first byte is its version."""
_MISS = 1
_WAIT = 2


class RedisCache:
    """A cache in Redis or Valkey; one round trip a call, made on the loop that uses it."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first use.

        Args:
            url: As in redis://user:password@host:6379/0.
            timeout_s: Seconds that a call may take.
            cool_down_s: Seconds without another try after a failure.
            lease_s: Seconds that a lease lasts without being renewed.
            clock: Gives steady seconds.
        """
        self.lease_s = lease_s
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")
        self._marker = MARK + uuid.uuid4().hex.encode() + b" "
        self._redis = impatient_client(url, connect_s=timeout_s)
        self._ask = self._script("cache_ask.lua")
        self._set = self._script("cache_set.lua")
        self._release = self._script("cache_release.lua")

    def _script(self, name: str) -> Any:
        files = importlib.resources.files("promptfleet_workers.caching")
        return self._redis.register_script(files.joinpath(name).read_text("utf-8"))

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss, or for all if the cache is out of order."""
        if keys and self._clock() >= self._cold_until:
            try:
                async with asyncio.timeout(self._timeout_s):
                    values: list[Any] = await self._redis.mget(keys)  # bytes: nothing is decoded
            except REDIS_FAILURES as error:
                self._cool_down(error)
            else:
                return [None if v is not None and v.startswith(MARK) else v for v in values]
        return [None] * len(keys)

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values, if the cache is in order."""
        if not items or self._clock() < self._cold_until:
            return
        by_ttl: defaultdict[int, tuple[list[str], list[Any]]] = defaultdict(lambda: ([], []))
        for key, value, ttl_s in items:
            keys, values = by_ttl[ttl_s]
            keys.append(key)
            values.append(value)
        try:
            async with asyncio.timeout(self._timeout_s):
                for ttl_s, (keys, values) in by_ttl.items():
                    await self._set(keys, [ttl_s, MARK, CHANNEL, *values])
        except REDIS_FAILURES as error:
            self._cool_down(error)

    async def ask(self, keys: Sequence[str], *, leased: set[str]) -> list[Reply]:
        """The value of each key, or whose turn it is; see `SharedCache`."""
        if keys and self._clock() >= self._cold_until:
            arguments = [self._marker, int(self.lease_s * 1000), len(MARK)]
            try:
                async with asyncio.timeout(self._timeout_s):
                    replies: list[Any] = await self._ask(keys, arguments)
            except REDIS_FAILURES as error:
                self._cool_down(error)
            else:
                leased.update(k for k, r in zip(keys, replies, strict=True) if r == _MISS)
                return [_reply(reply) for reply in replies]
        return [Turn.CALL] * len(keys)

    async def renew(self, keys: Sequence[str]) -> None:
        """Keep leases."""
        await self._tend(keys, int(self.lease_s * 1000))

    async def release(self, keys: Sequence[str]) -> None:
        """End leases without a value."""
        await self._tend(keys, 0)

    async def listen(
        self, ready: Callable[[], None], heard: Callable[[Sequence[str]], None]
    ) -> None:
        """Tell of ended leases that somebody waits for; see `SharedCache`."""
        try:
            async with self._redis.pubsub() as pubsub:
                async with asyncio.timeout(self._timeout_s):
                    await pubsub.subscribe(CHANNEL)
                await self._hear(pubsub, ready, heard)
        except REDIS_FAILURES as error:
            log.info("cache_unheard", extra={"error": type(error).__name__})

    async def _hear(
        self, pubsub: PubSub, ready: Callable[[], None], heard: Callable[[Sequence[str]], None]
    ) -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            if message is None:
                continue
            if message["type"] == "subscribe":
                ready()
            elif message["type"] == "message":
                heard(message["data"].decode().split(" "))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _tend(self, keys: Sequence[str], last_ms: int) -> None:
        if not keys or self._clock() < self._cold_until:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._release(keys, [self._marker, CHANNEL, last_ms])
        except REDIS_FAILURES as error:
            self._cool_down(error)

    def _cool_down(self, error: Exception) -> None:
        self._cold_until = self._clock() + self._cool_down_s
        facts = {"error": type(error).__name__, "cool_down_s": self._cool_down_s}
        log.warning("cache_unavailable", extra=facts)


def _reply(reply: Any) -> Reply:
    if isinstance(reply, bytes):
        return reply
    return Turn.WAIT if reply == _WAIT else Turn.CALL
