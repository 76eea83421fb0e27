"""Write how jobs ended: what ends within some milliseconds goes into one transaction."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.jobs import Doorbell, JobError, JobState, Outcome, Release
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.turns import finish_turns, release_turns

log = logging.getLogger(__name__)

FLUSH_AFTER_S = 0.02
"""Seconds between two flushes, at least, unless `FLUSH_AT` ends wait."""
FLUSH_AT = 200
BUSY_AT = 50
"""Ends in one flush after which the next one waits `BUSY_FLUSH_AFTER_S` for more: a transaction and
a filled cache cost about the same for 50 as for 200."""
BUSY_FLUSH_AFTER_S = 0.05


class Finisher:
    """Collects outcomes and releases, and writes them in batches.

    `on_written` hears of every job once its end is committed, or once the fence has refused it.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        *,
        patience_s: float,
        on_written: Callable[[Sequence[Outcome], set[uuid.UUID]], None],
        on_released: Callable[[Sequence[Release], Sequence[Doorbell]], None],
        ring: Callable[[Sequence[Doorbell]], None],
    ) -> None:
        """Write nothing yet.

        Args:
            database: Used on the loop that `add` is called on.
            patience_s: How long to insist while the database is away: beyond the lease, others
                have the job.
            on_written: Told the outcomes and which of them the fence let through.
            on_released: Told the releases and the doorbells of those that the fence let through.
            ring: Rings for jobs whose turn has come by what was written.
        """
        self._database = database
        self._patience_s = patience_s
        self._on_written = on_written
        self._on_released = on_released
        self._ring = ring
        self._outcomes: list[Outcome] = []
        self._releases: list[Release] = []
        self._timer: asyncio.TimerHandle | None = None
        self._after_s = FLUSH_AFTER_S
        self._flushed_at = float("-inf")
        self._writes: set[asyncio.Task[None]] = set()

    def add(self, end: Outcome | Release) -> None:
        """Take in how a job ended; on the event loop."""
        if isinstance(end, Outcome):
            self._outcomes.append(end)
        else:
            self._releases.append(end)
        if len(self._outcomes) + len(self._releases) >= FLUSH_AT:
            self._flush()
        elif self._timer is None:
            # The first end after a quiet time is written at once; those that follow it, together.
            loop = asyncio.get_running_loop()
            wait_s = max(0.0, self._flushed_at + self._after_s - loop.time())
            self._timer = loop.call_later(wait_s, self._flush)

    async def flush(self) -> None:
        """Write what is there now, and wait for that."""
        self._flush()
        writes = set(self._writes)
        if writes:
            await asyncio.wait(writes)

    async def drain(self) -> None:
        """Write all that is left and wait for it."""
        self._flush()
        while self._writes:
            await asyncio.wait(self._writes)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        outcomes, self._outcomes = self._outcomes, []
        releases, self._releases = self._releases, []
        self._after_s = BUSY_FLUSH_AFTER_S if len(outcomes) >= BUSY_AT else FLUSH_AFTER_S
        self._flushed_at = asyncio.get_running_loop().time()
        if outcomes:
            self._spawn(self._write(outcomes))
        if releases:
            self._spawn(self._release(releases))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, outcomes: list[Outcome]) -> None:
        written: set[uuid.UUID] = set()
        called: list[Doorbell] = []
        try:
            written, called = await self._database.insist(
                lambda connection: finish_turns(connection, outcomes),
                patience_s=self._patience_s,
            )
        except (StoreRefusedError, TypeError, ValueError) as error:  # the latter: not UTF-8
            if len(outcomes) > 1:
                # One outcome that Postgres refuses must not take its neighbours along.
                for outcome in outcomes:
                    await self._write([outcome])
                return
            log.error("result_refused", extra={"job": str(outcomes[0].job_id), "error": str(error)})  # noqa: TRY400 - a traceback could show outputs
            if outcomes[0].state is JobState.SUCCEEDED and _is_about_data(error):
                # Else its lease would lapse, and the same answer be paid for again.
                await self._write([_unstorable(outcomes[0])])
                return
        except StoreUnavailableError:
            log.error("results_not_written", extra={"jobs": len(outcomes)})  # noqa: TRY400 - as above
        self._on_written(outcomes, written)
        if called:
            self._ring(called)

    async def _release(self, releases: list[Release]) -> None:
        doorbells: list[Doorbell] = []
        called: list[Doorbell] = []
        try:
            doorbells, called = await self._database.insist(
                lambda connection: release_turns(connection, releases),
                patience_s=self._patience_s,
            )
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.error("claims_not_released", extra={"jobs": len(releases), "error": str(error)})  # noqa: TRY400 - as above
        self._on_released(releases, doorbells)
        if called:  # not before: a job that is still held here would take its bell for a twin's
            self._ring(called)


def _is_about_data(error: StoreRefusedError | TypeError | ValueError) -> bool:
    return not isinstance(error, StoreRefusedError) or (error.sqlstate or "").startswith("22")


def _unstorable(outcome: Outcome) -> Outcome:
    """What is written in place of an answer that Postgres can't hold."""
    error = JobError(code="bad_response", message="the answer can't be stored as JSON")
    return outcome._replace(
        state=JobState.FAILED, text=None, response=None, finish_reason=None, error=error, turn=None
    )
