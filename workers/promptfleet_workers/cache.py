"""The response cache: answers to exactly equal requests of one tenant.

A cache only ever saves work: a broken or slow one answers nothing and raises nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import logging
import struct
import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_workers.providers.protocol import Completion

log = logging.getLogger(__name__)

KEY_PREFIX = "promptfleet:cache:"
TIMEOUT_S = 0.25
"""What one look-up or one filling may take before the batch goes on without it."""
COOL_DOWN_S = 2.0
"""After a failure the cache is left alone for so long: a slow one must not slow every batch."""

Item = tuple[str, bytes, int]
"""A key, its value, and the seconds (at least 1) to keep it."""


class ResponseCache(Protocol):
    """Values by key, for a time."""

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss. Raises nothing."""
        ...

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values. Raises nothing."""
        ...

    async def aclose(self) -> None:
        """Give back connections."""
        ...


class MemoryCache:
    """A cache in this process; the least recently used values go first."""

    def __init__(
        self, *, max_items: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """An empty cache; `clock` gives steady seconds."""
        self._max_items = max_items
        self._clock = clock
        self._values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss."""
        now = self._clock()
        return [self._get(key, now) for key in keys]

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values."""
        now = self._clock()
        for key, value, ttl_s in items:
            self._values[key] = (now + ttl_s, value)
            self._values.move_to_end(key)
        while len(self._values) > self._max_items:
            self._values.popitem(last=False)

    async def aclose(self) -> None:
        """Forget everything."""
        self._values.clear()

    def _get(self, key: str, now: float) -> bytes | None:
        until, value = self._values.get(key, (now, b""))
        if until <= now:
            self._values.pop(key, None)
            return None
        self._values.move_to_end(key)
        return value


class RedisCache:
    """A cache in Redis or Valkey; one round trip a call, made on the loop that uses it."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first use.

        Args:
            url: As in redis://user:password@host:6379/0.
            timeout_s: Seconds that a call may take.
            cool_down_s: Seconds without another try after a failure.
            clock: Gives steady seconds.
        """
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")
        self._redis: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # a miss is cheaper than a wait
            socket_timeout=None,  # each call is bounded as a whole
            socket_connect_timeout=timeout_s,
        )
        lua = (
            importlib.resources.files("promptfleet_workers")
            .joinpath("cache_set.lua")
            .read_text("utf-8")
        )
        self._set = self._redis.register_script(lua)

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss, or for all if the cache is out of order."""
        if keys and self._clock() >= self._cold_until:
            try:
                async with asyncio.timeout(self._timeout_s):
                    values: list[Any] = await self._redis.mget(keys)  # bytes: nothing is decoded
                    return values
            except REDIS_FAILURES as error:
                self._cool_down(error)
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
                    await self._set(keys, [ttl_s, *values])
        except REDIS_FAILURES as error:
            self._cool_down(error)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _cool_down(self, error: Exception) -> None:
        self._cold_until = self._clock() + self._cool_down_s
        facts = {"error": type(error).__name__, "cool_down_s": self._cool_down_s}
        log.warning("cache_unavailable", extra=facts)


# -- keys ------------------------------------------------------------------------------------


def cache_key(namespace: str, tenant: str, model: str, kind: JobKind, request: str) -> str:
    """The key of a request's answer; equal only if all the parts are.

    Args:
        namespace: From the job's or the fleet's cache options.
        tenant: Whose answer it is; tenants never see each other's.
        model: Where the answer comes from: provider and model.
        kind: Which endpoint answers.
        request: The request as it is stored: without whitespace, its keys sorted.
    """
    # With their lengths in front, no two different lists of parts join to the same text.
    parts = (
        f"{len(namespace)}:{namespace}{len(tenant)}:{tenant}"
        f"{len(model)}:{model}{len(kind)}:{kind}{len(request)}:{request}"
    )
    return KEY_PREFIX + hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


# -- values ----------------------------------------------------------------------------------

# A value is this head, the facts as JSON, and the response's bytes; the two latter may be
# compressed. The checksum is that of all that follows the head, begun with what stands before it.
_HEAD = struct.Struct(">BBII")  # version, flags, length of the facts, CRC-32
_VERSION = 1
_COMPRESSED = 1
# zlib takes 40 µs for its start and 8 ns a byte: for usual answers that costs more than it saves.
# Vectors (without text) shrink to a half only, and would hold up the loop.
_COMPRESS_FROM = 16 * 1024
_PLAIN_MAX = 64 * 1024 * 1024


def encode_completion(completion: Completion) -> bytes:
    """The completion as a cache's value; the response keeps its bytes."""
    usage = completion.usage
    facts = orjson.dumps(
        (
            completion.text,
            completion.finish_reason,
            completion.model,
            usage.input,
            usage.cached,
            usage.output,
            usage.reasoning,
        )
    )
    body = facts + completion.response
    flags = 0
    if completion.text is not None and len(body) >= _COMPRESS_FROM:
        body = zlib.compress(body, 1)
        flags = _COMPRESSED
    return _HEAD.pack(_VERSION, flags, len(facts), _checksum(body, flags, len(facts))) + body


def decode_completion(value: bytes) -> Completion | None:
    """The completion that a value holds; None if it is damaged or of another version."""
    if len(value) < _HEAD.size:
        return None
    version, flags, facts_length, checksum = _HEAD.unpack_from(value)
    body = value[_HEAD.size :]
    if version != _VERSION or _checksum(body, flags, facts_length) != checksum:
        return None
    try:
        if flags == _COMPRESSED:
            body = zlib.decompressobj().decompress(body, _PLAIN_MAX)
        text, finish_reason, model, *counts = orjson.loads(body[:facts_length])
        size, cached, output, reasoning = counts
    except (zlib.error, ValueError, TypeError):
        return None
    return Completion(
        text=text,
        response=body[facts_length:],
        finish_reason=finish_reason,
        usage=Usage(input=size, cached=cached, output=output, reasoning=reasoning),
        model=model,
    )


def _checksum(body: bytes, flags: int, facts_length: int) -> int:
    return zlib.crc32(body, (flags << 24) ^ facts_length)
