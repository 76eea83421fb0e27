"""The synchronous client."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Unpack

from promptfleet.backends import Backend, substitute
from promptfleet.handles import PromptJob
from promptfleet.options import PromptOptions, check_option
from promptfleet.requests import Prompt, PromptInput, job_id, job_ids, make_spec, make_specs
from promptfleet.streaming import Tokens, follow
from promptfleet.waiting import Watch
from promptfleet_shared.errors import JobNotFoundError, PromptFleetError
from promptfleet_shared.jobs import Conversation, JobState, Result

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session, scoped_session

    from promptfleet_shared.settings import Settings

    SyncSession: TypeAlias = Session | scoped_session[Any] | sa.Connection


class Client:
    """Submits prompts and reads their results; safe to use from many threads and to fork.

    A web app makes one and keeps it. It connects at first use.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        engine: sa.Engine | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Read the settings; connect to nothing yet.

        Args:
            settings: By default those of the environment.
            engine: An engine of the caller's for the database; by default one is made.
            clock: Monotonic seconds, for waiting.
            sleep: Waits so many seconds.

        Raises:
            ConfigurationError: A setting or fleet.toml is wrong.
        """
        self._settings = settings
        self._engine = engine
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._servers: Backend | None = None
        self._closed = False
        if substitute() is None:
            self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def enqueue_prompt(
        self,
        prompt: PromptInput,
        *,
        session: SyncSession | None = None,
        **options: Unpack[PromptOptions],
    ) -> PromptJob:
        """Accept a prompt: once this returns, the job is never lost.

        Args:
            prompt: The prompt's text, or the messages of a chat.
            session: A SQLAlchemy session or connection of the caller's: the job joins its
                transaction, and workers hear of it after the commit.
            options: See `PromptOptions`.

        Raises:
            InvalidRequestError: `field` names what is wrong.
            IdempotencyConflictError: The key was used with another request.
            StoreUnavailableError: The database can't be reached. Nothing was accepted, unless
                `unknown_outcome` says that nobody knows: then the same key makes a repeat safe.
        """
        backend = self._backend()
        spec = make_spec(prompt, options, backend.defaults)
        (accepted,) = backend.submit([spec], session)
        return PromptJob(id=accepted, tier=spec.tier, _client=self)

    def enqueue_prompts(
        self,
        prompts: Iterable[PromptInput | Prompt],
        *,
        session: SyncSession | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[PromptJob]:
        """Accept many prompts in one transaction: all of them, or none.

        Args:
            prompts: Texts, lists of messages, or mappings with `prompt` or `messages` and options
                of their own.
            session: As for `enqueue_prompt`.
            options: Shared by all prompts; a prompt's own options win.

        Returns:
            A handle for each prompt, in order.

        Raises:
            InvalidRequestError: `field` names the prompt and what is wrong with it.
            IdempotencyConflictError: A key was used with another request.
            StoreUnavailableError: The database can't be reached. Nothing was accepted, unless
                `unknown_outcome` says that nobody knows: then the same key makes a repeat safe.
        """
        backend = self._backend()
        specs = make_specs(prompts, options, backend.defaults)
        ids = backend.submit(specs, session) if specs else []
        return [
            PromptJob(id=accepted, tier=spec.tier, _client=self)
            for spec, accepted in zip(specs, ids, strict=True)
        ]

    def get_state(self, id: uuid.UUID | str) -> JobState:  # noqa: A002  # what users call it
        """Where the job is now.

        Raises:
            JobNotFoundError: There is no such job.
        """
        wanted = job_id(id)
        found = self._backend().look_up([wanted], with_states=True)
        if (result := found.results.get(wanted)) is not None:
            return result.state
        if wanted not in found.states:
            raise JobNotFoundError(job_id=wanted)
        return found.states[wanted]

    def get_result(self, id: uuid.UUID | str) -> Result | None:  # noqa: A002
        """The job's result, or None while it is not final.

        Raises:
            JobNotFoundError: There is no such job.
        """
        wanted = job_id(id)
        found = self._backend().look_up([wanted], with_states=True)
        if wanted not in found.results and wanted not in found.states:
            raise JobNotFoundError(job_id=wanted)
        return found.results.get(wanted)

    def get_results(self, ids: Iterable[uuid.UUID | str]) -> dict[uuid.UUID, Result]:
        """The results of those of the jobs that are final."""
        return self._backend().look_up(job_ids(ids), with_states=False).results

    def wait_for_result(
        self,
        id: uuid.UUID | str,  # noqa: A002
        timeout: float | None = None,
    ) -> Result:
        """Wait for the job's end and return its result, whatever its state.

        Args:
            id: The job.
            timeout: Seconds; None waits as long as it takes.

        Raises:
            JobNotFoundError: There is no such job.
            WaitTimeoutError: The job is not final yet; it goes on.
        """
        return next(self.as_completed([id], timeout))

    def wait_for_results(
        self, ids: Iterable[uuid.UUID | str], timeout: float | None = None
    ) -> list[Result]:
        """Wait for all of the jobs; their results in the order of `ids`.

        Raises:
            JobNotFoundError: One of the jobs does not exist.
            WaitTimeoutError: `job_ids` are not final yet; they go on.
        """
        wanted = job_ids(ids)
        results = {result.job_id: result for result in self.as_completed(wanted, timeout)}
        return [results[id_] for id_ in wanted]

    def as_completed(
        self, ids: Iterable[uuid.UUID | str], timeout: float | None = None
    ) -> Iterator[Result]:
        """The results of the jobs as they end, looked up many at once.

        Raises:
            JobNotFoundError: One of the jobs does not exist.
            WaitTimeoutError: `job_ids` are not final yet; they go on.
        """
        watch = Watch(job_ids(ids), timeout, clock=self._clock)
        return self._results_of(watch)

    def _results_of(self, watch: Watch) -> Iterator[Result]:
        while pending := watch.pending:
            found = self._backend().look_up(pending, with_states=watch.wants_states)
            ended = watch.feed(found)
            yield from ended
            if len(ended) < len(pending):
                self._sleep(watch.pause())

    def tokens(self, id: uuid.UUID | str, timeout: float | None = None) -> Tokens:  # noqa: A002
        """The job's text as it comes, to iterate over; see `PromptJob.tokens`.

        Args:
            id: The job.
            timeout: Seconds until its end; None waits as long as it takes.
        """
        wanted = job_id(id)
        watch = Watch([wanted], timeout, clock=self._clock)
        return Tokens(follow(self._backend(), wanted, watch, self._clock))

    def cancel(self, id: uuid.UUID | str) -> bool:  # noqa: A002
        """Ask for the job's cancellation.

        Returns:
            True if it is cancelled or its worker will be told; False if it was final already.

        Raises:
            JobNotFoundError: There is no such job.
        """
        wanted = job_id(id)
        if wanted in self._backend().cancel([wanted]):
            return True
        self.get_state(wanted)
        return False

    def get_conversation(self, memory_id: str) -> Conversation | None:
        """What is remembered under a `memory_id`; None if nothing is.

        Args:
            memory_id: As it was given to `enqueue_prompt`.

        Raises:
            InvalidRequestError: It is no such id.
            StoreUnavailableError: The database can't be reached.
        """
        wanted = check_option("memory_id", memory_id)
        return self._backend().conversation(wanted)

    def delete_conversation(self, memory_id: str) -> bool:
        """Forget a conversation: its turns and its summary. Jobs and results stay.

        A job of it that is under way goes on, and its turn is not remembered.

        Returns:
            True if there was one.

        Raises:
            InvalidRequestError: It is no such id.
            StoreUnavailableError: The database can't be reached; try again.
        """
        wanted = check_option("memory_id", memory_id)
        return self._backend().forget(wanted)

    def close(self) -> None:
        """Ring what is left, for two seconds at most, and close the connections."""
        with self._lock:
            servers, self._servers, self._closed = self._servers, None, True
        if servers is not None:
            servers.close()

    def _backend(self) -> Backend:
        if (stand_in := substitute()) is not None:
            return stand_in.backend
        return self._servers or self._connect()

    def _connect(self) -> Backend:
        # Here, since the database's and the queue's libraries take half a second to import.
        from promptfleet.postgres import PostgresBackend  # noqa: PLC0415
        from promptfleet_shared.settings import load_settings  # noqa: PLC0415

        with self._lock:
            if self._closed:
                raise PromptFleetError("This client is closed.")
            if self._servers is None:
                settings = self._settings or load_settings()
                self._servers = PostgresBackend(settings, engine=self._engine)
            return self._servers
