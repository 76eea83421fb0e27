"""A cache in a worker's own memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from promptfleet_workers.caching.protocol import Item

MAX_BYTES = 256 * 1024 * 1024
_ITEM_BYTES = 300
"""What an entry takes besides its value: the key, two tuples, its place in the order."""


class MemoryCache:
    """A cache in this process; the least recently used values go first."""

    def __init__(
        self,
        *,
        max_items: int | None = None,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty cache.

        Args:
            max_items: Values that it holds at most.
            max_bytes: What they may take together.
            clock: Gives steady seconds.
        """
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._clock = clock
        self._values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size = 0

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss."""
        now = self._clock()
        return [self._get(key, now) for key in keys]

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values."""
        now = self._clock()
        for key, value, ttl_s in items:
            self._drop(key)
            self._values[key] = (now + ttl_s, value)
            self.size += len(value) + _ITEM_BYTES
        while self._is_full():
            self._drop(next(iter(self._values)))

    async def aclose(self) -> None:
        """Forget everything."""
        self._values.clear()
        self.size = 0

    def _get(self, key: str, now: float) -> bytes | None:
        until, value = self._values.get(key, (now, b""))
        if until <= now:
            self._drop(key)
            return None
        self._values.move_to_end(key)
        return value

    def _drop(self, key: str) -> None:
        known = self._values.pop(key, None)
        if known is not None:
            self.size -= len(known[1]) + _ITEM_BYTES

    def _is_full(self) -> bool:
        if self._max_items is not None and len(self._values) > self._max_items:
            return True
        return self.size > self._max_bytes and bool(self._values)
