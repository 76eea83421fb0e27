"""A cache of the user's own: found by its name, and kept from doing harm."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.policies.caching import CacheSection
from promptfleet_workers.caching.protocol import Item, ResponseCache
from promptfleet_workers.plugins import load_path, load_plugin

log = logging.getLogger(__name__)

ENTRY_POINTS = "promptfleet.caches"
TIMEOUT_S = 1.0
COOL_DOWN_S = 2.0
_METHODS = ("get_many", "set_many", "aclose")


def load_custom(section: CacheSection) -> ResponseCache:
    """The cache that [cache] `factory` makes, called with the section.

    Raises:
        ConfigurationError: There is none of this name, it can't be made, or it is no cache.
    """
    name = section.factory or ""
    try:
        cache = _factory(name)(section)
    except ConfigurationError:
        raise
    except Exception as error:  # whatever code of theirs raises is a mistake of configuration
        msg = f"cache.factory: {name!r} could not be called ({type(error).__name__}: {error})"
        raise ConfigurationError(msg) from error
    missing = [method for method in _METHODS if not callable(getattr(cache, method, None))]
    if missing:
        msg = f"cache.factory: what {name!r} made is no cache; it lacks {', '.join(missing)}"
        raise ConfigurationError(msg)
    return cast("ResponseCache", cache)


def _factory(name: str) -> Callable[[CacheSection], Any]:
    field = "cache.factory"
    if ":" in name:
        found = load_path(name, field=field)
    else:
        found = load_plugin(ENTRY_POINTS, name, field=field, built_in=())
    return cast("Callable[[CacheSection], Any]", found)


class GuardedCache:
    """A cache that may be slow or raise anything, made into one that does neither."""

    def __init__(
        self,
        cache: ResponseCache,
        *,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bound each call of `cache` to `timeout_s`; leave it alone for a while after a failure."""
        self._cache = cache
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss, or for all if the cache is out of order."""
        nothing: list[bytes | None] = [None] * len(keys)
        if not keys or self._clock() < self._cold_until:
            return nothing
        try:
            async with asyncio.timeout(self._timeout_s):
                values = list(await self._cache.get_many(keys))
        except Exception as error:  # noqa: BLE001 - it is not ours, and must not fail jobs
            self._cool_down(error)
            return nothing
        if len(values) != len(keys) or not all(v is None or isinstance(v, bytes) for v in values):
            self._cool_down(TypeError())
            return nothing
        return values

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values, if the cache is in order."""
        if not items or self._clock() < self._cold_until:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._cache.set_many(items)
        except Exception as error:  # noqa: BLE001 - as above
            self._cool_down(error)

    async def aclose(self) -> None:
        """Close it."""
        try:
            await self._cache.aclose()
        except Exception as error:  # noqa: BLE001 - as above
            self._cool_down(error)

    def _cool_down(self, error: Exception) -> None:
        self._cold_until = self._clock() + self._cool_down_s
        facts = {"error": type(error).__name__, "cool_down_s": self._cool_down_s}
        log.warning("cache_unavailable", extra=facts)
