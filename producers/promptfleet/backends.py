"""The seam between clients and where jobs are kept: Postgres and a doorbell, or memory."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from promptfleet.requests import Defaults
from promptfleet.transcripts import Transcript
from promptfleet_shared.jobs import Conversation, Doorbell, JobSpec, JobState, Result


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """What is known of some jobs at one moment.

    Attributes:
        results: Of those that are final.
        states: Of those that exist and have no result yet; empty where it was not asked for.
    """

    results: dict[uuid.UUID, Result]
    states: dict[uuid.UUID, JobState]


class TokenSource(Protocol):
    """Where one job's tokens come from."""

    @property
    def transcript(self) -> Transcript:
        """What was read."""
        ...

    def read(self, wait_s: float) -> bool:
        """Read what has come, waiting so long for it; false if that is nothing. Raises nothing."""
        ...


class AsyncTokenSource(Protocol):
    """The same for asynchronous callers; see `TokenSource`."""

    @property
    def transcript(self) -> Transcript:
        """What was read."""
        ...

    async def read(self, wait_s: float) -> bool:
        """Read what has come, waiting so long for it; false if that is nothing. Raises nothing."""
        ...


class Backend(Protocol):
    """Keeps jobs for synchronous callers; safe to use from many threads."""

    @property
    def defaults(self) -> Defaults:
        """What holds for a job that says nothing."""
        ...

    def submit(self, specs: Sequence[JobSpec], session: object | None = None) -> list[uuid.UUID]:
        """Accept the jobs, all or none, and ring for them.

        Args:
            specs: The jobs.
            session: The caller's SQLAlchemy session or connection: the jobs join its transaction
                and the doorbell rings after its commit.

        Returns:
            The id of each spec's job: its own, or the one accepted earlier under its key.

        Raises:
            IdempotencyConflictError: A key was used with another request.
            StoreUnavailableError: Nothing was accepted, unless `unknown_outcome`.
        """
        ...

    def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        """What became of the jobs."""
        ...

    def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """Ask for cancellation; those that were not final yet."""
        ...

    def token_source(self, job_id: uuid.UUID) -> AbstractContextManager[TokenSource]:
        """Where the tokens of a job come from; it was looked up before, so it is the tenant's."""
        ...

    def conversation(self, memory_id: str) -> Conversation | None:
        """What is remembered under this id; None if nothing is."""
        ...

    def forget(self, memory_id: str) -> bool:
        """Delete a conversation; false if there is none."""
        ...

    def close(self) -> None:
        """Ring what is left and give connections back."""
        ...


class AsyncBackend(Protocol):
    """The same for asynchronous callers; see `Backend`."""

    @property
    def defaults(self) -> Defaults:
        """What holds for a job that says nothing."""
        ...

    async def submit(
        self, specs: Sequence[JobSpec], session: object | None = None
    ) -> list[uuid.UUID]:
        """Accept the jobs, all or none, and ring for them."""
        ...

    async def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        """What became of the jobs."""
        ...

    async def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """Ask for cancellation; those that were not final yet."""
        ...

    def token_source(self, job_id: uuid.UUID) -> AbstractContextManager[AsyncTokenSource]:
        """Where the tokens of a job come from; it was looked up before, so it is the tenant's."""
        ...

    async def conversation(self, memory_id: str) -> Conversation | None:
        """What is remembered under this id; None if nothing is."""
        ...

    async def forget(self, memory_id: str) -> bool:
        """Delete a conversation; false if there is none."""
        ...

    async def close(self) -> None:
        """Ring what is left and give connections back."""
        ...


class Bell(Protocol):
    """Rings in the background; `promptfleet_shared.queueing.Ringer` is the real one."""

    def ring(self, doorbells: Iterable[Doorbell]) -> None:
        """Ring soon; never fails and never waits."""
        ...

    def close(self) -> None:
        """Ring what is left."""
        ...


class Substitute(Protocol):
    """What stands in for the servers of every client, e.g. under `promptfleet.testing`."""

    @property
    def backend(self) -> Backend:
        """For synchronous clients."""
        ...

    @property
    def async_backend(self) -> AsyncBackend:
        """For asynchronous clients."""
        ...


_substitutes: list[Substitute] = []


def substitute() -> Substitute | None:
    """What stands in for the servers now, if anything."""
    return _substitutes[-1] if _substitutes else None


def install(stand_in: Substitute) -> None:
    """Let every client of this process use it from now on."""
    _substitutes.append(stand_in)


def uninstall(stand_in: Substitute) -> None:
    """Back to what was before."""
    _substitutes.remove(stand_in)


def doorbells(specs: Sequence[JobSpec], ids: Sequence[uuid.UUID]) -> list[Doorbell]:
    """A doorbell for each job that is new; who has an earlier job's id was rung for already."""
    return [
        Doorbell(
            job_id=spec.id,
            tier=spec.tier,
            priority=spec.priority,
            tenant=spec.tenant,
            concurrency_key=spec.concurrency_key,
        )
        for spec, job_id in zip(specs, ids, strict=True)
        if spec.id == job_id
    ]
