"""One call for equal prompts in flight anywhere: the leases a worker holds, and those it waits for.

Who looks for an answer that is not there gets the lease of its key in the same round trip, or is
told to wait. Who waits hears of the answer by a message; since messages get lost, it asks again
every second, too. A lease lasts as long as its worker lives and is at it: a call of minutes is
waited for, and a worker that was killed holds nobody up for longer than the rest of its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from promptfleet_workers.caching.protocol import Reply, SharedCache, Turn

POLL_S = 1.0
"""Between two looks of who waits, whatever messages come."""


class Flight:
    """The fleet's single flight as one worker takes part in it; lives on its event loop."""

    def __init__(
        self,
        cache: SharedCache,
        *,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold nothing yet.

        Args:
            cache: Where values and leases are.
            poll_s: Seconds between two looks of who waits.
            clock: Gives steady seconds.
        """
        self._cache = cache
        self._poll_s = poll_s
        self._clock = clock
        self._led: dict[str, float] = {}
        self._released: list[str] = []
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._news: set[str] = set()
        self._asking = 0
        self._told = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._renewing = self._watching = False

    # -- asking --------------------------------------------------------------------------------

    async def ask(self, keys: Sequence[str]) -> list[Reply]:
        """The value of each key, or what to do; raises nothing."""
        leased: set[str] = set()
        self._asking += 1
        try:
            replies = await self._cache.ask(keys, leased=leased)
        finally:
            self._asking -= 1
        if leased:
            now = self._clock()
            self._led.update((key, now) for key in leased)
            if not self._renewing:
                self._renewing = True
                self._spawn(self._renew())
        return replies

    async def turn(self, key: str) -> Reply:
        """Wait until the key has a value, or its call is ours to make."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        if key in self._news:  # it came before the reply that said to wait
            self._told.set()
        if not self._watching:
            self._watching = True
            self._spawn(self._watch())
        try:
            return await future
        finally:
            if self._waiting.get(key) is future:
                del self._waiting[key]

    # -- leases --------------------------------------------------------------------------------

    def leads(self, key: str) -> bool:
        """True while this worker has the key's lease."""
        return key in self._led

    def settled(self, keys: Sequence[str]) -> None:
        """These keys have values: that was the end of their leases."""
        for key in keys:
            self._led.pop(key, None)

    def release(self, key: str) -> None:
        """No value will come from here; does nothing without a lease."""
        if self._led.pop(key, None) is None:
            return
        self._released.append(key)
        if len(self._released) == 1:
            task = self._spawn(self._release())
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release(self) -> None:
        await asyncio.sleep(0)  # what is released together goes into one round trip
        keys, self._released = self._released, []
        # One may have been taken again meanwhile.
        await self._cache.release([key for key in keys if key not in self._led])

    async def _renew(self) -> None:
        """Keep the leases of calls that take longer than one lasts."""
        pause_s = self._cache.lease_s / 3
        try:
            while self._led:
                await asyncio.sleep(pause_s)
                taken_before = self._clock() - pause_s / 2
                keys = [key for key, taken in self._led.items() if taken < taken_before]
                if keys:
                    await self._cache.renew(keys)
        finally:
            self._renewing = False

    # -- waiting -------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ask for those who wait: when there is news, and every `poll_s`."""
        listening: asyncio.Task[None] | None = None
        try:
            while True:
                if listening is None or listening.done():
                    listening = self._spawn(self._cache.listen(self._ready, self._hear))
                keys = await self._next()
                await self._look(keys)
        finally:
            self._watching = False

    async def _next(self) -> Sequence[str]:
        """The keys to ask for next: those of which there is news, else all that wait."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._told.wait()
        self._told.clear()
        keys = [key for key in self._news if key in self._waiting]
        self._news.difference_update(keys)
        if not self._asking:
            self._news.clear()  # nobody is about to wait for these
        return keys or list(self._waiting)

    async def _look(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        replies = await self.ask(keys)
        for key, reply in zip(keys, replies, strict=True):
            future = self._waiting.get(key)
            if reply is Turn.WAIT:
                continue
            if future is not None and not future.done():
                future.set_result(reply)
            elif reply is Turn.CALL and future is None:
                self.release(key)  # who wanted it is gone

    def _ready(self) -> None:
        self._told.set()  # what ended before somebody listened is looked for now

    def _hear(self, keys: Sequence[str]) -> None:
        if self._asking:  # one of them may be told to wait in a moment
            self._news.update(keys)
        else:
            self._news.update(key for key in keys if key in self._waiting)
        if not self._news.isdisjoint(self._waiting):
            self._told.set()

    # -- the end -------------------------------------------------------------------------------

    async def idle(self) -> None:
        """Wait until all that was released is."""
        while self._releases:
            await asyncio.wait(self._releases)

    async def aclose(self) -> None:
        """Release what is held, and wait no longer."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        keys = [*self._led, *self._released]
        self._led.clear()
        await self._cache.release(keys)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
