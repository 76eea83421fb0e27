"""Follow the token streams of many jobs at once, over one connection for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator
from typing import Any

from promptfleet.transcripts import Transcript
from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.token_stream import KEY_PREFIX, Entry, stream_key

log = logging.getLogger(__name__)

BLOCK_S = 5.0
"""Seconds that one read waits for news."""
PATIENCE_S = 5.0
"""Seconds beyond that after which a connection is taken for dead."""
RETRY_S = 0.5
ENTRIES_A_READ = 1_000
"""Of each stream."""
MANY = 32
"""Streams from which on reads are spaced out, so that each brings more than one entry."""
SPACE_S = 0.005
WAKE_TTL_S = 60
_START = b"0-0"


class Listener:
    """Somebody who follows a job.

    Attributes:
        transcript: What is known of its stream; shared with all who follow the same job here.
    """

    def __init__(self, transcript: Transcript) -> None:
        """Have heard nothing."""
        self.transcript = transcript
        self._stirred = asyncio.Event()

    def stir(self) -> None:
        """Let `wait` return."""
        self._stirred.set()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for news; false if none came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._stirred.wait()
        except TimeoutError:
            return False
        self._stirred.clear()
        return True


class _Watched:
    """A job's stream, its text so far (once, for all listeners), and who listens."""

    def __init__(self, job_id: uuid.UUID) -> None:
        self.key = stream_key(job_id).encode()
        self.transcript = Transcript()
        self.listeners: set[Listener] = set()
        self.last_id = _START

    def take(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        for entry_id, fields in entries:
            self.last_id = entry_id
            entry = Entry.of(fields)
            if entry is not None:
                self.transcript.add(entry)
        for listener in self.listeners:
            listener.stir()


class StreamWatcher:
    """Reads all watched streams with one command on one connection, on one event loop.

    A job's text is held once, however many listen and however slow they are; what there is of it
    is bounded by its stream. While Redis is away nothing is heard, and nothing raised.
    """

    def __init__(self, url: str, *, retry_s: float = RETRY_S) -> None:
        """Connect with the first watch.

        Args:
            url: The server of the token streams, as in redis://user:password@host:6379/0.
            retry_s: Seconds between two tries while it is away.
        """
        self._retry_s = retry_s
        self._redis = impatient_client(url, connect_s=PATIENCE_S)
        self._watched: dict[bytes, _Watched] = {}
        self._task: asyncio.Task[None] | None = None
        # An entry in this stream ends a read that does not know of a new watch yet.
        self._wake_key = f"{KEY_PREFIX}wake:{uuid.uuid4()}".encode()
        self._wake_id = _START
        self._is_reading = False
        self._wake_up: asyncio.Task[None] | None = None
        self._is_away = False

    @property
    def watched(self) -> int:
        """How many jobs are followed now."""
        return len(self._watched)

    @contextlib.contextmanager
    def watch(self, job_id: uuid.UUID) -> Iterator[Listener]:
        """Follow a job, from its stream's beginning; it must be known to be the caller's tenant's.

        Call it on the event loop.
        """
        key = stream_key(job_id).encode()
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = _Watched(job_id)
            self._include()
        listener = Listener(watched.transcript)
        watched.listeners.add(listener)
        if watched.transcript.length:
            listener.stir()
        try:
            yield listener
        finally:
            watched.listeners.discard(listener)
            if not watched.listeners:
                self._watched.pop(key, None)

    async def aclose(self) -> None:
        """Stop reading and close the connections."""
        tasks = [task for task in (self._task, self._wake_up) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._redis.aclose()

    def _include(self) -> None:
        """See to it that the next read comes now and not when the present one is over."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        elif self._is_reading and self._wake_up is None:
            self._wake_up = asyncio.create_task(self._wake())

    async def _wake(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S), self._redis.pipeline(transaction=False) as pipe:
                pipe.xadd(self._wake_key, {"w": ""}, maxlen=1, approximate=False)
                pipe.expire(self._wake_key, WAKE_TTL_S)
                await pipe.execute()
        except REDIS_FAILURES:
            pass  # then reading fails, too, and its next try knows of the new watch
        finally:
            self._wake_up = None

    async def _run(self) -> None:
        while self._watched:
            try:
                await self._read()
            except REDIS_FAILURES as error:
                self._say_away(error)
                for watched in self._watched.values():
                    watched.last_id = _START  # another server's ids may be smaller
                self._wake_id = _START
                await asyncio.sleep(self._retry_s)
            else:
                self._is_away = False
                if len(self._watched) >= MANY:
                    await asyncio.sleep(SPACE_S)

    async def _read(self) -> None:
        streams: dict[Any, Any] = {key: each.last_id for key, each in self._watched.items()}
        streams[self._wake_key] = self._wake_id
        self._is_reading = True
        try:
            async with asyncio.timeout(BLOCK_S + PATIENCE_S):
                block_ms = int(BLOCK_S * 1000)
                reply: Any = await self._redis.xread(streams, ENTRIES_A_READ, block_ms)
        finally:
            self._is_reading = False
        for key, entries in reply or ():
            if key == self._wake_key:
                self._wake_id = entries[-1][0]
            elif (stream := self._watched.get(key)) is not None:
                stream.take(entries)

    def _say_away(self, error: Exception) -> None:
        if not self._is_away:
            log.warning("streams_unavailable", extra={"error": type(error).__name__})
        self._is_away = True
