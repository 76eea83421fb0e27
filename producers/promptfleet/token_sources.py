"""Where a client reads a job's tokens: in Redis, for synchronous and for asynchronous callers."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from promptfleet.stream_watcher import Listener, StreamWatcher
from promptfleet.transcripts import Transcript
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.token_stream import Entry, stream_key

ENTRIES_A_READ = 1_000
CONNECT_TIMEOUT_S = 1.0
SOCKET_TIMEOUT_S = 5.0
"""More than any single wait."""
COOL_DOWN_S = 1.0
"""Without another try after a failure."""
_START = b"0-0"


class TokenSources:
    """The streams of jobs for synchronous callers, over connections that are opened when needed.

    Safe from many threads, and over forks.
    """

    def __init__(self, url: str) -> None:
        """Connect to nothing yet; `url` as in redis://user:password@host:6379/0."""
        self._redis = redis.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # the next read is the retry
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
        )

    def of(self, job_id: uuid.UUID) -> contextlib.AbstractContextManager[RedisTokenSource]:
        """The stream of a job, which must be known to be the caller's tenant's."""
        return contextlib.nullcontext(RedisTokenSource(self._redis, job_id))

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


class AsyncTokenSources:
    """The same for asynchronous callers of one event loop: one connection for all streams."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet."""
        self._watcher = StreamWatcher(url)

    @contextlib.contextmanager
    def of(self, job_id: uuid.UUID) -> Iterator[WatchedTokenSource]:
        """The stream of a job, which must be known to be the caller's tenant's."""
        with self._watcher.watch(job_id) as listener:
            yield WatchedTokenSource(listener)

    async def close(self) -> None:
        """Close the connections."""
        await self._watcher.aclose()


class RedisTokenSource:
    """One job's stream for one thread; see `TokenSource`.

    Attributes:
        transcript: What was read.
    """

    def __init__(
        self,
        connections: redis.Redis,
        job_id: uuid.UUID,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Read nothing yet; the job must be known to be the caller's tenant's."""
        self.transcript = Transcript()
        self._redis = connections
        self._key = stream_key(job_id)
        self._last_id = _START
        self._clock = clock
        self._sleep = sleep
        self._cold_until = float("-inf")

    def read(self, wait_s: float) -> bool:
        """See `TokenSource`; while Redis is away, nothing comes."""
        if self._clock() < self._cold_until:
            self._sleep(wait_s)
            return False
        # A block of 0 would wait for ever.
        block_ms = max(1, int(wait_s * 1000)) if wait_s > 0 else None
        try:
            streams: dict[Any, Any] = {self._key: self._last_id}
            reply: Any = self._redis.xread(streams, ENTRIES_A_READ, block_ms)
        except REDIS_FAILURES:
            self._cold_until = self._clock() + COOL_DOWN_S
            self._last_id = _START  # another server's ids may be smaller
            return False
        if not reply:
            return False
        for entry_id, fields in reply[0][1]:
            self._last_id = entry_id
            entry = Entry.of(fields)
            if entry is not None:
                self.transcript.add(entry)
        return True


class WatchedTokenSource:
    """One of the streams that a `StreamWatcher` reads; see `AsyncTokenSource`."""

    def __init__(self, listener: Listener) -> None:
        """Hear what the listener hears."""
        self._listener = listener

    @property
    def transcript(self) -> Transcript:
        """What was read."""
        return self._listener.transcript

    async def read(self, wait_s: float) -> bool:
        """See `AsyncTokenSource`."""
        return await self._listener.wait(wait_s) if wait_s > 0 else False
