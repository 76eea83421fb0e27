"""What a cache is to the workers, and what one that a whole fleet shares can do besides."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

Item = tuple[str, bytes, int]
"""A key, its value, and the seconds (at least 1) to keep it."""


class ResponseCache(Protocol):
    """Values by key, for a time. Keys are ASCII of up to 100 characters; values are any bytes."""

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss. Raises nothing."""
        ...

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values. Raises nothing."""
        ...

    async def aclose(self) -> None:
        """Give back connections."""
        ...


class Turn(enum.Enum):
    """What somebody whose answer is not known yet is to do."""

    CALL = "call"  # nobody else is at it
    WAIT = "wait"  # somebody is at it: the answer will come


Reply = bytes | Turn


class SharedCache(ResponseCache, Protocol):
    """A cache that knows which answers are being waited for, anywhere in the fleet.

    Who is told to call has a lease on the key, for `lease_s` seconds and from then on as long as
    it renews it. A value that is set ends the lease, and so does its release; who waits is told.
    """

    lease_s: float

    async def ask(self, keys: Sequence[str], *, leased: set[str]) -> list[Reply]:
        """The value of each key, or what to do: all in one round trip. Raises nothing.

        Where the cache is out of order, everybody calls, without a lease.

        Args:
            keys: Each of them once.
            leased: Takes in the keys that there is a lease of now.
        """
        ...

    async def renew(self, keys: Sequence[str]) -> None:
        """Keep leases; those that are somebody else's by now stay as they are. Raises nothing."""
        ...

    async def release(self, keys: Sequence[str]) -> None:
        """End leases without a value. Raises nothing."""
        ...

    async def listen(
        self, ready: Callable[[], None], heard: Callable[[Sequence[str]], None]
    ) -> None:
        """Tell of ended leases that somebody waits for, until cancelled.

        Returns, without raising, if the server is lost.

        Args:
            ready: Called once, when nothing will be missed any more.
            heard: Called with keys.
        """
        ...
