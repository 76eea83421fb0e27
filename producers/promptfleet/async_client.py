"""The asynchronous client: the one mirrored pair, verb for verb."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Unpack

from promptfleet.backends import AsyncBackend, substitute
from promptfleet.handles import AsyncPromptJob
from promptfleet.options import PromptOptions, check_option
from promptfleet.requests import Prompt, PromptInput, job_id, job_ids, make_spec, make_specs
from promptfleet.streaming import AsyncTokens, follow_async
from promptfleet.waiting import Watch
from promptfleet_shared.errors import JobNotFoundError, PromptFleetError
from promptfleet_shared.jobs import Conversation, JobState, Result

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import (
        AsyncConnection,
        AsyncEngine,
        AsyncSession,
        async_scoped_session,
    )

    from promptfleet_shared.settings import Settings

    AnyAsyncSession: TypeAlias = AsyncSession | async_scoped_session[Any] | AsyncConnection


class AsyncClient:
    """Submits prompts and reads their results without blocking the event loop.

    A web app makes one and keeps it. It connects at first use, and afresh in another event loop.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        engine: AsyncEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Read the settings; connect to nothing yet. The parameters are those of `Client`."""
        self._settings = settings
        self._engine = engine
        self._clock = clock
        self._sleep = sleep
        self._servers: AsyncBackend | None = None
        self._closed = False
        if substitute() is None:
            self._connect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def enqueue_prompt(
        self,
        prompt: PromptInput,
        *,
        session: AnyAsyncSession | None = None,
        **options: Unpack[PromptOptions],
    ) -> AsyncPromptJob:
        """Accept a prompt; see `Client.enqueue_prompt`."""
        backend = self._backend()
        spec = make_spec(prompt, options, backend.defaults)
        (accepted,) = await backend.submit([spec], session)
        return AsyncPromptJob(id=accepted, tier=spec.tier, _client=self)

    async def enqueue_prompts(
        self,
        prompts: Iterable[PromptInput | Prompt],
        *,
        session: AnyAsyncSession | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[AsyncPromptJob]:
        """Accept many prompts in one transaction; see `Client.enqueue_prompts`."""
        backend = self._backend()
        specs = make_specs(prompts, options, backend.defaults)
        ids = await backend.submit(specs, session) if specs else []
        return [
            AsyncPromptJob(id=accepted, tier=spec.tier, _client=self)
            for spec, accepted in zip(specs, ids, strict=True)
        ]

    async def get_state(self, id: uuid.UUID | str) -> JobState:  # noqa: A002  # what users call it
        """Where the job is now; see `Client.get_state`."""
        wanted = job_id(id)
        found = await self._backend().look_up([wanted], with_states=True)
        if (result := found.results.get(wanted)) is not None:
            return result.state
        if wanted not in found.states:
            raise JobNotFoundError(job_id=wanted)
        return found.states[wanted]

    async def get_result(self, id: uuid.UUID | str) -> Result | None:  # noqa: A002
        """The job's result, or None while it is not final; see `Client.get_result`."""
        wanted = job_id(id)
        found = await self._backend().look_up([wanted], with_states=True)
        if wanted not in found.results and wanted not in found.states:
            raise JobNotFoundError(job_id=wanted)
        return found.results.get(wanted)

    async def get_results(self, ids: Iterable[uuid.UUID | str]) -> dict[uuid.UUID, Result]:
        """The results of those of the jobs that are final."""
        found = await self._backend().look_up(job_ids(ids), with_states=False)
        return found.results

    async def wait_for_result(
        self,
        id: uuid.UUID | str,  # noqa: A002
        timeout: float | None = None,  # noqa: ASYNC109  # the same as in `Client`
    ) -> Result:
        """Wait for the job's end; see `Client.wait_for_result`."""
        return await anext(self.as_completed([id], timeout))

    async def wait_for_results(
        self,
        ids: Iterable[uuid.UUID | str],
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> list[Result]:
        """Wait for all of the jobs; see `Client.wait_for_results`."""
        wanted = job_ids(ids)
        results = {result.job_id: result async for result in self.as_completed(wanted, timeout)}
        return [results[id_] for id_ in wanted]

    def as_completed(
        self, ids: Iterable[uuid.UUID | str], timeout: float | None = None
    ) -> AsyncIterator[Result]:
        """The results of the jobs as they end; see `Client.as_completed`."""
        watch = Watch(job_ids(ids), timeout, clock=self._clock)
        return self._results_of(watch)

    async def _results_of(self, watch: Watch) -> AsyncIterator[Result]:
        while pending := watch.pending:
            found = await self._backend().look_up(pending, with_states=watch.wants_states)
            ended = watch.feed(found)
            for result in ended:
                yield result
            if len(ended) < len(pending):
                await self._sleep(watch.pause())

    def tokens(
        self,
        id: uuid.UUID | str,  # noqa: A002
        timeout: float | None = None,
    ) -> AsyncTokens:
        """The job's text as it comes, for `async for`; see `PromptJob.tokens`."""
        wanted = job_id(id)
        watch = Watch([wanted], timeout, clock=self._clock)
        return AsyncTokens(follow_async(self._backend(), wanted, watch, self._clock))

    async def cancel(self, id: uuid.UUID | str) -> bool:  # noqa: A002
        """Ask for the job's cancellation; see `Client.cancel`."""
        wanted = job_id(id)
        if wanted in await self._backend().cancel([wanted]):
            return True
        await self.get_state(wanted)
        return False

    async def get_conversation(self, memory_id: str) -> Conversation | None:
        """What is remembered under a `memory_id`; see `Client.get_conversation`."""
        wanted = check_option("memory_id", memory_id)
        return await self._backend().conversation(wanted)

    async def delete_conversation(self, memory_id: str) -> bool:
        """Forget a conversation; see `Client.delete_conversation`."""
        wanted = check_option("memory_id", memory_id)
        return await self._backend().forget(wanted)

    async def close(self) -> None:
        """Ring what is left, for two seconds at most, and close the connections."""
        servers, self._servers, self._closed = self._servers, None, True
        if servers is not None:
            await servers.close()

    def _backend(self) -> AsyncBackend:
        if (stand_in := substitute()) is not None:
            return stand_in.async_backend
        return self._servers or self._connect()

    def _connect(self) -> AsyncBackend:
        # Here, since the database's and the queue's libraries take half a second to import.
        from promptfleet.postgres import AsyncPostgresBackend  # noqa: PLC0415
        from promptfleet_shared.settings import load_settings  # noqa: PLC0415

        if self._closed:
            raise PromptFleetError("This client is closed.")
        if self._servers is None:
            settings = self._settings or load_settings()
            self._servers = AsyncPostgresBackend(settings, engine=self._engine)
        return self._servers
