"""What this worker holds: claims, their heartbeat, and the abort of what it lost."""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.jobs import ClaimedJob
from promptfleet_shared.store import claims as store
from promptfleet_shared.store.database import Database

log = logging.getLogger(__name__)


FRESH_S = 4.5
"""Seconds that the database's word on a claim is good for: a call starts within them or waits."""


class Abort(enum.Enum):
    """Why a running job is given up."""

    FENCED = "fenced"  # the lease lapsed and somebody else may have it
    CANCELLED = "cancelled"  # its owner asked for it
    DRAINED = "drained"  # this worker shuts down


class Claims:
    """The jobs that this worker holds, and the task that works on each."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._held: dict[uuid.UUID, int] = {}
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._aborted: dict[uuid.UUID, Abort] = {}
        self._confirmed_at = -FRESH_S
        self._confirmed = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    def hold(self, jobs: Iterable[ClaimedJob]) -> None:
        """Take note of fresh claims."""
        for job in jobs:
            self._held[job.id] = job.fence
        if self._held:
            self.idle.clear()

    def let_go(self, ids: Iterable[uuid.UUID]) -> None:
        """Forget claims that are finished, released or lost."""
        for job_id in ids:
            self._held.pop(job_id, None)
            self._aborted.pop(job_id, None)
        if not self._held:
            self.idle.set()

    def work(self, task: asyncio.Task[None], jobs: Iterable[ClaimedJob]) -> None:
        """Name the task that is cancelled when these jobs (all of them) are aborted."""
        for job in jobs:
            self._tasks[job.id] = task

    def rest(self, jobs: Iterable[ClaimedJob]) -> None:
        """No task works on these jobs any more."""
        for job in jobs:
            self._tasks.pop(job.id, None)

    def has_task(self, job_id: uuid.UUID) -> bool:
        """True while a task works on the job."""
        return job_id in self._tasks

    def aborted(self, job_id: uuid.UUID) -> Abort | None:
        """Why the job was given up, if it was."""
        return self._aborted.get(job_id)

    def abort(self, job_id: uuid.UUID, reason: Abort) -> None:
        """Give a job up; its task is cancelled unless it works for another one, too."""
        if job_id not in self._held or job_id in self._aborted:
            return
        self._aborted[job_id] = reason
        task = self._tasks.get(job_id)
        if task is None:
            return
        others = (other for other, its in self._tasks.items() if its is task)
        if all(other in self._aborted for other in others):
            task.cancel()

    def abort_all(self, reason: Abort) -> None:
        """Give up all that is held."""
        for job_id in list(self._held):
            self.abort(job_id, reason)

    def is_fresh(self, claimed_at: float) -> bool:
        """True if the database has confirmed a claim just now, by itself or by a heartbeat.

        A claim that is not fresh may be lost or cancelled without our knowing: after a pause of
        this process, or while the database is away.

        Args:
            claimed_at: When the claim was asked for, by `time.monotonic`.
        """
        return time.monotonic() - max(claimed_at, self._confirmed_at) < FRESH_S

    async def confirmation(self) -> None:
        """Wait for the next heartbeat that the database answers."""
        await self._confirmed.wait()

    def confirm(self, asked_at: float) -> None:
        """All that is held and not aborted was ours at this moment, by `time.monotonic`."""
        self._confirmed_at = asked_at
        self._confirmed.set()
        self._confirmed.clear()

    def holds(self, job_id: uuid.UUID) -> bool:
        """True until the job is finished, released or lost."""
        return job_id in self._held

    def fences(self) -> dict[uuid.UUID, int]:
        """The fence of each held job; safe to call from another thread."""
        return dict(self._held)

    def still_held(self, job_id: uuid.UUID, fence: int) -> bool:
        """True if the job is held under this very fence."""
        return self._held.get(job_id) == fence


class Heartbeat:
    """Extends the leases from a thread and a connection that no slow call can block."""

    def __init__(
        self,
        database: Database,
        claims: Claims,
        *,
        lease_s: float,
        on_loop: Callable[..., None],
    ) -> None:
        """Start nothing yet.

        Args:
            database: For this thread alone.
            claims: What to keep alive.
            lease_s: Seconds that each beat gives.
            on_loop: Calls a function on the event loop's thread.
        """
        self._database = database
        self._claims = claims
        self._lease_s = lease_s
        self._on_loop = on_loop
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="promptfleet-heartbeat", daemon=True)

    @property
    def interval_s(self) -> float:
        """Seconds between beats: a quarter of the lease, and twice while a claim is fresh."""
        return min(self._lease_s / 4, FRESH_S / 2)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                self.beat()
            except (StoreRefusedError, StoreUnavailableError) as error:
                # The leases run on: if this lasts, others take over and the fence tells us.
                log.warning("heartbeat_failed", extra={"error": str(error)})

    def beat(self) -> None:
        """Extend all leases once, and abort what was lost or cancelled."""
        held = self._claims.fences()
        if not held:
            return
        asked_at = time.monotonic()
        alive = self._database.run(
            lambda connection: store.heartbeat(connection, held, lease_s=self._lease_s)
        )
        for job_id, fence in held.items():
            cancelled = alive.get(job_id)
            if cancelled is None:
                self._on_loop(self._lost, job_id, fence)
            elif cancelled:
                self._on_loop(self._claims.abort, job_id, Abort.CANCELLED)
        self._on_loop(self._claims.confirm, asked_at)

    def _lost(self, job_id: uuid.UUID, fence: int) -> None:
        # A job that finished during the beat is missing too, but is no longer held.
        if self._claims.still_held(job_id, fence):
            self._claims.abort(job_id, Abort.FENCED)
