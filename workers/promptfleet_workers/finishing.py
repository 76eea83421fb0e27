"""Write how jobs ended: what ends within some milliseconds goes into one transaction."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy as sa
from promptfleet_shared.jobs import Doorbell, Outcome, Release
from promptfleet_shared.store import claims as claims_store
from promptfleet_shared.store import finishing as finishing_store
from promptfleet_shared.store.engines import is_disconnect
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine

log = logging.getLogger(__name__)
T = TypeVar("T")

FLUSH_AFTER_S = 0.02
FLUSH_AT = 200


async def insist(
    engine: AsyncEngine, statement: Callable[[sa.Connection], T], *, patience_s: float
) -> T:
    """Run a statement in a transaction, again and again while the database is away.

    For statements that may be repeated: a fence or a state makes the second run change nothing.

    Raises:
        sqlalchemy.exc.DBAPIError: It stayed away for `patience_s`, or refused the statement.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    delay = 0.05
    while True:
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(statement)
        except exc.SQLAlchemyError as error:
            if not is_disconnect(error) or loop.time() + delay > give_up_at:
                raise
            log.warning("database_away", extra={"retry_s": delay, "error": type(error).__name__})
        await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - jitter, no secret
        delay = min(delay * 2, 2.0)


class Finisher:
    """Collects outcomes and releases, and writes them in batches.

    `on_written` hears of every job once its end is committed, or once the fence has refused it.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        patience_s: float,
        on_written: Callable[[Sequence[Outcome], set[uuid.UUID]], None],
        on_released: Callable[[Sequence[Release], Sequence[Doorbell]], None],
    ) -> None:
        """Write nothing yet.

        Args:
            engine: Of the loop that `add` is called on.
            patience_s: How long to insist while the database is away: beyond the lease, others
                have the job.
            on_written: Told the outcomes and which of them the fence let through.
            on_released: Told the releases and the doorbells of those that the fence let through.
        """
        self._engine = engine
        self._patience_s = patience_s
        self._on_written = on_written
        self._on_released = on_released
        self._outcomes: list[Outcome] = []
        self._releases: list[Release] = []
        self._timer: asyncio.TimerHandle | None = None
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
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self._flush)

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
        if outcomes:
            self._spawn(self._write(outcomes))
        if releases:
            self._spawn(self._release(releases))

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, outcomes: list[Outcome]) -> None:
        written: set[uuid.UUID] = set()
        try:
            written = await insist(
                self._engine,
                lambda connection: finishing_store.finish(connection, outcomes),
                patience_s=self._patience_s,
            )
        except exc.SQLAlchemyError as error:
            if len(outcomes) > 1 and not is_disconnect(error):
                # One outcome that Postgres refuses must not take its neighbours along.
                for outcome in outcomes:
                    await self._write([outcome])
                return
            log.error("results_not_written", extra={"jobs": len(outcomes), "error": _name(error)})  # noqa: TRY400 - a traceback could show outputs
        self._on_written(outcomes, written)

    async def _release(self, releases: list[Release]) -> None:
        doorbells: list[Doorbell] = []
        try:
            doorbells = await insist(
                self._engine,
                lambda connection: claims_store.release(connection, releases),
                patience_s=self._patience_s,
            )
        except exc.SQLAlchemyError as error:
            log.error("claims_not_released", extra={"jobs": len(releases), "error": _name(error)})  # noqa: TRY400 - as above
        self._on_released(releases, doorbells)


def _name(error: exc.SQLAlchemyError) -> str:
    return type(getattr(error, "orig", None) or error).__name__
