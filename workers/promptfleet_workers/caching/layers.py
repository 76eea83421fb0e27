"""A small cache in memory in front of another one: what is asked for often costs no round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from promptfleet_workers.caching.memory import MemoryCache
from promptfleet_workers.caching.protocol import Item, Reply, ResponseCache, SharedCache, Turn

FRONT_TTL_S = 60
"""An answer that was made here is kept in front for so long: another worker's newer one is not seen
meanwhile."""
FOUND_TTL_S = 2
"""The same for one that was found behind, where nobody knows how long it has still to live."""
FRONT_BYTES = 64 * 1024 * 1024


class LayeredCache:
    """Two caches as one: what the front does not have comes from the back."""

    def __init__(self, front: MemoryCache, back: ResponseCache) -> None:
        """Ask `front` first, and `back` for the rest; both are filled."""
        self._front = front
        self._back = back

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss."""
        values = await self._front.get_many(keys)
        missing = [key for key, value in zip(keys, values, strict=True) if value is None]
        if not missing:
            return values
        found = dict(zip(missing, await self._back.get_many(missing), strict=True))
        await self._bring_forward(found)
        return [found.get(k) if v is None else v for k, v in zip(keys, values, strict=True)]

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values in both."""
        await self._front.set_many([(k, v, min(ttl_s, FRONT_TTL_S)) for k, v, ttl_s in items])
        await self._back.set_many(items)

    async def aclose(self) -> None:
        """Close both."""
        await self._front.aclose()
        await self._back.aclose()

    async def _bring_forward(self, found: dict[str, bytes | None]) -> None:
        items = [(key, value, FOUND_TTL_S) for key, value in found.items() if value is not None]
        await self._front.set_many(items)


class SharedLayeredCache(LayeredCache):
    """The same over a cache that a fleet shares."""

    def __init__(self, front: MemoryCache, back: SharedCache) -> None:
        """Ask `front` first, and `back` for the rest and for whose turn it is."""
        super().__init__(front, back)
        self._shared = back
        self.lease_s = back.lease_s

    async def ask(self, keys: Sequence[str], *, leased: set[str]) -> list[Reply]:
        """The value of each key, or whose turn it is."""
        values = await self._front.get_many(keys)
        missing = [key for key, value in zip(keys, values, strict=True) if value is None]
        if not missing:
            return [Turn.CALL if value is None else value for value in values]
        replies = dict(zip(missing, await self._shared.ask(missing, leased=leased), strict=True))
        await self._bring_forward({k: r for k, r in replies.items() if isinstance(r, bytes)})
        return [replies[k] if v is None else v for k, v in zip(keys, values, strict=True)]

    async def renew(self, keys: Sequence[str]) -> None:
        """Keep leases."""
        await self._shared.renew(keys)

    async def release(self, keys: Sequence[str]) -> None:
        """End leases without a value."""
        await self._shared.release(keys)

    async def listen(
        self, ready: Callable[[], None], heard: Callable[[Sequence[str]], None]
    ) -> None:
        """Tell of ended leases that somebody waits for."""
        await self._shared.listen(ready, heard)
