"""Answers as they grow, for any number of clients of this process: `StreamHub.follow`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Protocol

import sqlalchemy as sa

from promptfleet.api.stores import Stores
from promptfleet.stream_watcher import Listener, StreamWatcher
from promptfleet.transcripts import Reader
from promptfleet_shared.errors import JobNotFoundError, PromptFleetError
from promptfleet_shared.jobs import Result
from promptfleet_shared.store.results import read_results, request_cancel, states
from promptfleet_shared.token_stream import StreamEvent

log = logging.getLogger(__name__)


WAIT_S = 3_600.0


class Results(Protocol):
    """Who tells how jobs ended."""

    async def wait(
        self, tenant: str, ids: Sequence[uuid.UUID], timeout_s: float, /
    ) -> Mapping[uuid.UUID, Result]:
        """The results of those that have ended when all have, or the time is up."""
        ...


class StreamHub:
    """Reads the streams of all followed jobs over one connection, and hands them to any number.

    What a slow client has not read yet is held once, with the job, and comes to it as one piece.
    """

    def __init__(self, url: str, *, stores: Stores, results: Results) -> None:
        """Connect at first use.

        Args:
            url: The server of the token streams.
            stores: Knows whose a job is.
            results: Tells of ends that the streams don't.
        """
        self._watcher = StreamWatcher(url)
        self._stores = stores
        self._results = results
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def followed(self) -> int:
        """How many jobs are followed now."""
        return self._watcher.watched

    async def find(self, tenant: str, job_id: uuid.UUID) -> Result | None:
        """The job's result, or None while it has none.

        Raises:
            JobNotFoundError: There is no such job, or it is another tenant's.
            StoreUnavailableError: The database can't be reached.
        """

        def look_up(connection: sa.Connection) -> tuple[bool, Result | None]:
            known = states(connection, [job_id], tenant=tenant)  # first: it may end in between
            return job_id in known, read_results(connection, [job_id], tenant=tenant).get(job_id)

        is_there, result = await self._stores.run(tenant, look_up)
        if result is None and not is_there:
            raise JobNotFoundError(job_id=job_id)
        return result

    async def follow(
        self, tenant: str, job_id: uuid.UUID, *, after: str | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """A job's text as it comes: TOKEN events, a RESET where it begins anew, an END at last.

        The END carries the job's result, and all TOKENs since the last RESET together are the text
        of a successful one. A job that was not submitted with `stream=True`, or whose stream was
        lost, has its text in one piece when it ends. Close the generator (`contextlib.aclosing`)
        if you leave before its end.

        Args:
            tenant: Who asks.
            job_id: The job; another tenant's is not found.
            after: The id of the last event that was seen, on any process; None for all of them.

        Raises:
            JobNotFoundError: There is no such job, or it is another tenant's.
            StoreUnavailableError: The database can't be reached.
        """
        result = await self.find(tenant, job_id)
        reader = Reader(after)
        if result is None:
            with (
                self._watcher.watch(job_id) as listener,
                self._end_of(tenant, job_id, listener) as end,
            ):
                while not (end.done() or listener.transcript.state):
                    for event in reader.read(listener.transcript):
                        yield event
                    await listener.wait()
                for event in reader.read(listener.transcript):
                    yield event
                result = end.result() if end.done() else await self.find(tenant, job_id)
                result = result or await end
        for event in reader.settle(result):
            yield event

    @contextlib.contextmanager
    def _end_of(
        self, tenant: str, job_id: uuid.UUID, listener: Listener
    ) -> Iterator[asyncio.Task[Result]]:
        """The job's end, of which the listener is told, too."""

        async def wait() -> Result:
            while True:
                found = await self._results.wait(tenant, [job_id], WAIT_S)
                if job_id in found:
                    return found[job_id]

        def ended(task: asyncio.Task[Result]) -> None:
            listener.stir()
            if not task.cancelled():
                task.exception()  # whoever asks for the result hears of it

        end = asyncio.create_task(wait())
        end.add_done_callback(ended)
        try:
            yield end
        finally:
            end.cancel()

    def cancel_soon(self, tenant: str, job_id: uuid.UUID) -> None:
        """Ask for the job's cancellation, in the background."""
        task = asyncio.create_task(self._cancel(tenant, job_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, tenant: str, job_id: uuid.UUID) -> None:
        try:
            await self._stores.run(tenant, lambda c: request_cancel(c, [job_id], tenant=tenant))
        except PromptFleetError as error:
            log.warning("not_cancelled", extra={"job": str(job_id), "error": error.code})

    async def aclose(self) -> None:
        """Let cancellations end, and close the connections."""
        if self._cancelling:
            await asyncio.wait(self._cancelling)
        await self._watcher.aclose()
