"""Gather ids into batches: a pure window, and the batcher that drives it on the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future

from promptfleet_shared.fleet import BatchOptions
from promptfleet_shared.queueing import MAX_IDS

AHEAD_S = 0.2
"""How far a worker looks ahead: it holds what will end within so many seconds."""
PACE_S = 0.25
"""Over how many seconds, at least, the pace of ending calls is measured."""


class DoorbellWait:
    """What a Celery task waits for: that every id of its message is settled."""

    __slots__ = ("_remaining", "done", "why")

    def __init__(self, ids: int, why: Mapping[str, object] | None = None) -> None:
        """Wait for so many ids; `why` is what they have waited for, if for anybody else."""
        self.why = why
        self.done: Future[None] = Future()
        self._remaining = ids
        if not ids:
            self.done.set_result(None)

    def settle(self) -> None:
        """One id is finished, given back or stale."""
        self._remaining -= 1
        if not self._remaining and not self.done.done():
            self.done.set_result(None)

    def abandon(self) -> None:
        """Wait no longer: this worker ends, and leases take care of what is left."""
        if not self.done.done():
            self.done.set_result(None)


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """An id on its way through the worker, and who waits for it."""

    job_id: uuid.UUID
    wait: DoorbellWait


class BatchWindow:
    """Decides when a batch is whole; pure, so its clock is a parameter.

    A batch is whole when it has `max_batch_size` tickets, or `batch_window_ms` after its first.
    """

    def __init__(self, options: BatchOptions) -> None:
        """Open at the first ticket."""
        self._size = options.max_batch_size
        self._window_s = options.batch_window_ms / 1000
        self._tickets: list[Ticket] = []
        self.closes_at: float | None = None

    def add(self, tickets: Sequence[Ticket], now: float) -> list[list[Ticket]]:
        """Take tickets in; returns the batches that became whole."""
        if self.closes_at is None and tickets:
            self.closes_at = now + self._window_s
        self._tickets.extend(tickets)
        whole = []
        while len(self._tickets) >= self._size:
            whole.append(self._tickets[: self._size])
            del self._tickets[: self._size]
            self.closes_at = now + self._window_s if self._tickets else None
        return whole

    def close(self, now: float) -> list[Ticket]:
        """The tickets whose window is over by `now`; none if it is not."""
        if self.closes_at is None or now < self.closes_at:
            return []
        tickets, self._tickets = self._tickets, []
        self.closes_at = None
        return tickets

    def clear(self) -> list[Ticket]:
        """All that waits, window or not."""
        tickets, self._tickets = self._tickets, []
        self.closes_at = None
        return tickets


class Slots:
    """How many jobs a worker holds, against how many it may: what opens and shuts its queues.

    A worker that took more ids than it can call would keep them from an idle one. All that it may
    hold beyond its calls is what will end within a fifth of a second at its present pace, to
    bridge the time from a call's end to the next one's claim. A job that has ended gives its slot
    back before it is written; but while the database lags behind by as many jobs again, no more
    are taken.

    Some of the calls may be kept free for interactive jobs: nobody else takes those slots, and who
    has one takes none of the others.
    """

    def __init__(
        self, calls: int, *, reserve: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """For a worker that may have `calls` provider calls in flight; `clock` in seconds.

        Args:
            calls: At least 1.
            reserve: How many of them are for interactive jobs only; less than all.
            clock: In seconds.
        """
        self._calls = calls - reserve
        self._clock = clock
        self.reserve = reserve
        self._reserved: set[uuid.UUID] = set()
        self._held = 0
        self._unwritten = 0
        self._shut = False
        self._lock = threading.Lock()
        self._ahead = 0
        self._ended = 0
        self._measured_at = clock()

    @property
    def wants_work(self) -> bool:
        """True if the next doorbell is worth taking from the queue."""
        self._measure()
        worth = max(1, min(self._ahead, MAX_IDS))
        return self.free >= worth and self._unwritten <= self._calls + MAX_IDS

    @property
    def wants_interactive(self) -> bool:
        """True if an interactive job's doorbell is worth taking into the reserve."""
        room = 0 if self._shut else self.reserve - len(self._reserved)
        return room > 0 and self._unwritten <= self._calls + MAX_IDS

    @property
    def free(self) -> int:
        """Ids that may be taken now."""
        return 0 if self._shut else max(0, self._calls + self._ahead - self._held)

    @property
    def unwritten(self) -> int:
        """Jobs that have ended here, and whose ends are still to be written."""
        return self._unwritten

    def take(self, wanted: int) -> int:
        """Take up to `wanted` slots; returns how many there were. From any thread."""
        with self._lock:
            taken = min(wanted, self.free)
            self._held += taken
        return taken

    def take_reserved(self, ids: Sequence[uuid.UUID]) -> int:
        """Take slots of the reserve for the first of these jobs; returns for how many."""
        with self._lock:
            room = 0 if self._shut else max(0, self.reserve - len(self._reserved))
            self._reserved.update(ids[:room])
        return min(room, len(ids))

    def give_back(self, job_id: uuid.UUID | None = None) -> None:
        """One slot is free again; one of the reserve, if that is where the job was."""
        with self._lock:
            if job_id in self._reserved:
                self._reserved.discard(job_id)
            else:
                self._held -= 1

    def ended(self, job_id: uuid.UUID | None = None) -> None:
        """A job's slot is free again, and its end is still to be written."""
        self._unwritten += 1
        self._ended += 1
        self.give_back(job_id)

    def written(self) -> None:
        """The end of a job is written."""
        self._unwritten -= 1

    def shut(self) -> None:
        """Hand out no slot any more."""
        self._shut = True

    def _measure(self) -> None:
        now = self._clock()
        elapsed_s = now - self._measured_at
        if elapsed_s >= PACE_S:
            pace = self._ended / elapsed_s
            self._ended = 0
            self._measured_at = now
            # Quick to grow and slow to shrink: calls that began together end together.
            self._ahead = max(int(pace * AHEAD_S), self._ahead * 3 // 4)
            self._ahead = min(self._ahead, max(self._calls // 2, 2 * MAX_IDS))


FlushBatch = Callable[[str, list[Ticket]], Awaitable[None]]


class Batcher:
    """The windows of a worker's tiers; hands whole batches to the pipeline."""

    def __init__(self, options: Callable[[str], BatchOptions], flush: FlushBatch) -> None:
        """Make a window a tier, at its first ticket.

        Args:
            options: A tier's batch options.
            flush: What takes a batch; it must not raise.
        """
        self._options = options
        self._flush = flush
        self._windows: dict[str, BatchWindow] = {}
        self._limits: dict[str, asyncio.Semaphore] = {}
        self._running: set[asyncio.Task[None]] = set()

    def add(self, tier: str, tickets: Sequence[Ticket]) -> None:
        """Gather tickets; on the event loop."""
        loop = asyncio.get_running_loop()
        window = self._windows.get(tier)
        if window is None:
            window = self._windows[tier] = BatchWindow(self._options(tier))
        was_open = window.closes_at
        for batch in window.add(tickets, loop.time()):
            self._start(tier, batch)
        if window.closes_at is not None and window.closes_at != was_open:
            loop.call_at(window.closes_at, self._close, tier, window, window.closes_at)

    def clear(self) -> list[tuple[str, list[Ticket]]]:
        """Take back all that is gathered and not yet flushed, for a worker that drains."""
        return [(tier, window.clear()) for tier, window in self._windows.items()]

    async def idle(self) -> None:
        """Wait until no batch is being flushed."""
        while self._running:
            await asyncio.wait(self._running)

    def _close(self, tier: str, window: BatchWindow, due_at: float) -> None:
        if window.closes_at != due_at:
            return  # it was full before, and is another window by now
        # The loop's clock may stand a hair before the time it was asked to call at.
        loop = asyncio.get_running_loop()
        batch = window.close(loop.time() + 0.0005)
        if batch:
            self._start(tier, batch)
        else:  # by more than a hair, on a busy machine
            loop.call_at(due_at + 0.001, self._close, tier, window, due_at)

    def _start(self, tier: str, batch: list[Ticket]) -> None:
        task = asyncio.create_task(self._run(tier, batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, tier: str, batch: list[Ticket]) -> None:
        limit = self._limits.get(tier)
        if limit is None:
            bound = self._options(tier).max_concurrent_batches
            limit = self._limits[tier] = asyncio.Semaphore(bound)
        async with limit:
            await self._flush(tier, batch)
