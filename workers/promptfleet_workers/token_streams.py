"""Write the tokens of streaming jobs to Redis as they come: one round trip for all of a worker's.

Nobody waits for this. While Redis is slow or away, what comes is kept for a moment and written
later; beyond that moment the live view of a take ends, and its readers get the rest with the
result.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from promptfleet_shared.jobs import ClaimedJob, JobState, Outcome
from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.store.claims import storable_text
from promptfleet_shared.token_stream import (
    ENDED_TTL_S,
    LIVE_TTL_S,
    MAX_BYTES,
    MAX_ENTRIES,
    stream_key,
)

log = logging.getLogger(__name__)

GATHER_S = 0.01
"""Seconds between two entries of a stream; its first one is written at once."""
LONGEST_GATHER_S = 0.3
GATHER_GROWTH_S = 0.00002
"""What each entry adds to the time until the next one: a long answer comes in larger pieces, so
that an hour of it fits into `MAX_ENTRIES`."""
TIMEOUT_S = 0.5
"""What one round trip may take."""
COOL_DOWN_S = 0.5
"""Seconds without another try after a failure."""
MAX_UNSENT_CHARS = 64 * 1024
"""Of one job, while Redis is away."""
STREAMS_A_WRITE = 256
"""Redis does nothing else meanwhile."""
MAX_LIVE_S = 3_600.0


class _Live:
    """The stream of one claim: which take it is at, and what of it is not written yet."""

    __slots__ = (
        "began_at",
        "call",
        "due_at",
        "entries",
        "fence",
        "is_over",
        "key",
        "sent",
        "sent_bytes",
        "state",
        "unsent",
        "unsent_chars",
    )

    def __init__(self, job: ClaimedJob, began_at: float) -> None:
        self.key = stream_key(job.id)
        self.fence = job.fence
        self.began_at = began_at
        self.call = 0
        self.begin_take()

    def begin_take(self) -> None:
        self.call += 1
        self.unsent: list[str] = []
        self.unsent_chars = 0
        self.sent = 0  # characters
        self.sent_bytes = 0
        self.entries = 0
        self.due_at = 0.0
        self.state: JobState | None = None
        self.is_over = False  # the live view of this take has ended before the take

    @property
    def heard(self) -> int:
        """Characters of the take."""
        return self.sent + self.unsent_chars

    def hear(self, text: str) -> None:
        self.unsent.append(text)
        self.unsent_chars += len(text)

    def give_up(self) -> None:
        """Write no more of this take: readers see a gap, and wait for the result."""
        self.is_over = True
        self.unsent, self.unsent_chars = [], 0


class TokenStreams:
    """The token streams of a worker's jobs; lives on its event loop and raises nothing."""

    def __init__(
        self,
        url: str,
        *,
        gather_s: float = GATHER_S,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first token.

        Args:
            url: The server of the streams, as in redis://user:password@host:6379/0.
            gather_s: Seconds between two entries of a stream, at first.
            timeout_s: Seconds that a round trip may take.
            cool_down_s: Seconds without another try after a failure.
            clock: Gives steady seconds.
        """
        self._gather_s = gather_s
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")
        self._lives: dict[uuid.UUID, _Live] = {}
        self._dirty: dict[_Live, None] = {}
        self._write: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._planned_at = 0.0
        self._is_away = False
        self._redis = impatient_client(url, connect_s=timeout_s)
        files = importlib.resources.files("promptfleet_workers")
        lua = files.joinpath("token_stream_add.lua").read_text("utf-8")
        self._add = self._redis.register_script(lua)

    # -- what happens to jobs ------------------------------------------------------------------

    def begin(self, jobs: Sequence[ClaimedJob]) -> Callable[[str], None] | None:
        """A call for these jobs begins; returns who hears its text.

        None where nobody is to hear: the job did not ask for a stream, or shares its call.
        """
        if len(jobs) != 1 or not jobs[0].stream:
            return None
        live = self._live(jobs[0])
        if live.entries or live.heard or live.is_over:
            live.begin_take()
        return functools.partial(self._hear, live, live.call)

    def ending(self, job: ClaimedJob) -> None:
        """The job's outcome is on its way to the database: `ended` will follow."""
        if job.stream:
            self._live(job)

    def ended(self, outcomes: Iterable[Outcome], written: set[uuid.UUID]) -> None:
        """These outcomes were handled; those of `written` stand in the database."""
        if not self._lives:
            return
        for outcome in outcomes:
            live = self._lives.pop(outcome.job_id, None)
            if live is not None and live.fence == outcome.fence and outcome.job_id in written:
                self._end(live, outcome)

    def drop(self, job_id: uuid.UUID) -> None:
        """The claim was given back or lost: what was heard last matters to nobody."""
        live = self._lives.pop(job_id, None)
        if live is not None:
            live.give_up()

    async def aclose(self) -> None:
        """Write what is left, if that works at once, and close the connection."""
        if self._timer is not None:
            self._timer.cancel()
        if self._write is not None:
            await asyncio.wait({self._write})
        while self._dirty and self._clock() >= self._cold_until:
            await self._send(list(self._dirty)[:STREAMS_A_WRITE])
        await self._redis.aclose()

    def _live(self, job: ClaimedJob) -> _Live:
        live = self._lives.get(job.id)
        if live is None or live.fence != job.fence:
            live = self._lives[job.id] = _Live(job, self._clock())
        return live

    def _hear(self, live: _Live, call: int, text: str) -> None:
        if live.is_over or live.call != call:
            return
        live.hear(storable_text(text) or "")
        if self._is_too_much(live):
            live.give_up()
            self._dirty.pop(live, None)
        elif live not in self._dirty:
            self._dirty[live] = None
            self._plan(live.due_at)

    def _is_too_much(self, live: _Live) -> bool:
        return (
            live.unsent_chars > MAX_UNSENT_CHARS
            or live.sent_bytes + live.unsent_chars > MAX_BYTES
            or live.entries >= MAX_ENTRIES
            or self._clock() - live.began_at > MAX_LIVE_S
        )

    def _end(self, live: _Live, outcome: Outcome) -> None:
        """All that is missing, and the end; a reader whom that does not help reads the result."""
        live.state = outcome.state
        text = storable_text(outcome.text) or ""
        rest = text[live.heard :]
        if not live.is_over and live.sent_bytes + len(rest) <= MAX_BYTES:
            live.hear(rest)
        self._dirty[live] = None
        self._plan(0.0)

    # -- the way to Redis ----------------------------------------------------------------------

    def _plan(self, due_at: float) -> None:
        """Write at this time, or as soon as the write that is under way is over."""
        if self._write is not None:
            return
        due_at = max(due_at, self._cold_until)
        if self._timer is not None:
            if self._planned_at <= due_at:
                return
            self._timer.cancel()
        self._planned_at = due_at
        wait_s = max(0.0, due_at - self._clock())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._start)

    def _start(self) -> None:
        self._timer = None
        now = self._clock()
        due = [live for live in self._dirty if live.due_at <= now or live.state is not None]
        if due:
            self._write = asyncio.create_task(self._send(due[:STREAMS_A_WRITE]))
            self._write.add_done_callback(self._wrote)
        elif self._dirty:
            self._plan(min(live.due_at for live in self._dirty))

    def _wrote(self, _: asyncio.Task[None]) -> None:
        self._write = None
        if self._dirty:
            ending = any(live.state is not None for live in self._dirty)
            self._plan(0.0 if ending else min(live.due_at for live in self._dirty))

    async def _send(self, lives: Sequence[_Live]) -> None:
        """Write an entry for each of these; what fails is tried again, but for ends."""
        args: list[Any] = [MAX_ENTRIES]
        sent = []
        for live in lives:
            del self._dirty[live]
            text = "".join(live.unsent)
            data = text.encode()
            ttl_s = LIVE_TTL_S if live.state is None else ENDED_TTL_S
            args += [live.fence, live.call, live.sent, data, live.state or "", ttl_s]
            sent.append((live, live.call, len(live.unsent), len(text), len(data)))
        try:
            async with asyncio.timeout(self._timeout_s):
                replies: list[int] = await self._add([live.key for live in lives], args)
        except REDIS_FAILURES as error:
            self._cool_down(error)
            self._dirty.update((live, None) for live in lives if live.unsent and not live.state)
            return
        self._is_away = False
        now = self._clock()
        for (live, call, pieces, chars, size), added in zip(sent, replies, strict=True):
            if live.call != call or live.is_over:
                continue
            if not added:
                live.give_up()
                continue
            del live.unsent[:pieces]
            live.unsent_chars -= chars
            live.sent += chars
            live.sent_bytes += size
            live.entries += 1
            gather_s = min(self._gather_s + live.entries * GATHER_GROWTH_S, LONGEST_GATHER_S)
            live.due_at = now + gather_s

    def _cool_down(self, error: Exception) -> None:
        self._cold_until = self._clock() + self._cool_down_s
        if not self._is_away:
            log.warning("streams_unavailable", extra={"error": type(error).__name__})
        self._is_away = True
