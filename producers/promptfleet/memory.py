"""Jobs in memory: the twin of the Postgres backend, for users' own tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import functools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from promptfleet.backends import Lookup
from promptfleet.memory_conversations import MemoryConversations
from promptfleet.requests import Defaults
from promptfleet.transcripts import Transcript
from promptfleet_shared.errors import IdempotencyConflictError, InvalidRequestError
from promptfleet_shared.jobs import Conversation, JobSpec, JobState, Outcome, Result
from promptfleet_shared.token_stream import Entry, Take

_WORD = re.compile(r"\s*\S+\s*|\s+")


@dataclasses.dataclass(kw_only=True, slots=True)
class _Row:
    """A job; `result` is there exactly when it is final."""

    spec: JobSpec
    created_at: dt.datetime
    committed: bool = False
    result: Result | None = None


class MemoryBackend:
    """Keeps jobs until it is forgotten itself; nothing runs them but `finish`."""

    def __init__(
        self,
        defaults: Defaults | None = None,
        *,
        accepted: Callable[[Sequence[JobSpec]], object] = len,
    ) -> None:
        """Begin empty.

        Args:
            defaults: What holds for a job that says nothing.
            accepted: Told of new jobs once they are committed; stands for the doorbell.
        """
        self.defaults = defaults or Defaults()
        self._accepted = accepted
        self._lock = threading.RLock()
        self._rows: dict[uuid.UUID, _Row] = {}
        self._by_key: dict[tuple[str, str], uuid.UUID] = {}
        self._conversations = MemoryConversations()

    def submit(self, specs: Sequence[JobSpec], session: object | None = None) -> list[uuid.UUID]:
        """See `Backend`."""
        with self._lock:
            ids = self._insert(specs)
        fresh = [spec for spec, id_ in zip(specs, ids, strict=True) if spec.id == id_]
        if session is None:
            self._commit(fresh)
        else:
            # Here, since only who has a session has SQLAlchemy.
            from promptfleet.memory_transactions import follow  # noqa: PLC0415

            try:
                follow(session, lambda: self._commit(fresh), lambda: self._forget(fresh))
            except InvalidRequestError:
                self._forget(fresh)
                raise
        return ids

    def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        """See `Backend`."""
        found = Lookup(results={}, states={})
        with self._lock:
            for id_ in ids:
                row = self._rows.get(id_)
                if row is None or not row.committed:
                    continue
                if row.result is not None:
                    found.results[id_] = row.result
                elif with_states:
                    found.states[id_] = JobState.QUEUED
        return found

    def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """See `Backend`."""
        with self._lock:
            open_ = {id_ for id_ in ids if self._is_open(id_)}
            for id_ in open_:
                self.finish(Outcome(job_id=id_, fence=0, state=JobState.CANCELLED))
            return open_

    def token_source(self, job_id: uuid.UUID) -> contextlib.AbstractContextManager[_Canned]:
        """See `Backend`: the text of a job with `stream` in words, once it is there."""
        return contextlib.nullcontext(_Canned(functools.partial(self.streamed_text, job_id)))

    def streamed_text(self, job_id: uuid.UUID) -> str | None:
        """The text of a job with `stream`, once it is there."""
        with self._lock:
            row = self._rows[job_id]
            return row.result.text if row.spec.stream and row.result is not None else None

    def conversation(self, memory_id: str) -> Conversation | None:
        """See `Backend`."""
        with self._lock:
            return self._conversations.read(memory_id)

    def forget(self, memory_id: str) -> bool:
        """See `Backend`."""
        with self._lock:
            return self._conversations.forget(memory_id)

    def close(self) -> None:
        """See `Backend`; the jobs stay."""

    def finish(self, outcome: Outcome, *, response: object = None) -> bool:
        """End a job; False if it was final already, or is none."""
        with self._lock:
            if not self._is_open(outcome.job_id):
                return False
            row = self._rows[outcome.job_id]
            row.result = _result(row, outcome, response, self.defaults.now())
            self._conversations.add(row.spec, outcome, row.result.finished_at)
            return True

    def _is_open(self, id_: uuid.UUID) -> bool:
        row = self._rows.get(id_)
        return row is not None and row.committed and row.result is None

    def _insert(self, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
        """All of the jobs or none, as in one transaction."""
        keys: dict[tuple[str, str], uuid.UUID] = {}
        digests: dict[uuid.UUID, str] = {}
        ids = []
        for spec in specs:
            ids.append(spec.id)
            if spec.idempotency_key is None:
                continue
            key = (spec.tenant, spec.idempotency_key)
            first = self._by_key.get(key) or keys.setdefault(key, spec.id)
            digests[spec.id] = _digest(spec)
            if first != spec.id:
                earlier = digests.get(first) or _digest(self._rows[first].spec)
                if earlier != digests[spec.id]:
                    raise IdempotencyConflictError(field="idempotency_key")
            ids[-1] = first
        now = self.defaults.now()
        for spec, id_ in zip(specs, ids, strict=True):
            if spec.id == id_:
                self._rows[id_] = _Row(spec=spec, created_at=now)
        self._by_key |= keys
        return ids

    def _commit(self, specs: Iterable[JobSpec]) -> None:
        fresh = list(specs)
        with self._lock:
            for spec in fresh:
                self._rows[spec.id].committed = True
        if fresh:
            self._accepted(fresh)

    def _forget(self, specs: Iterable[JobSpec]) -> None:
        with self._lock:
            for spec in specs:
                del self._rows[spec.id]
                if spec.idempotency_key is not None:
                    del self._by_key[spec.tenant, spec.idempotency_key]


class AsyncMemoryBackend:
    """The same jobs for asynchronous callers."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend

    @property
    def defaults(self) -> Defaults:
        """See `AsyncBackend`."""
        return self._backend.defaults

    async def submit(
        self, specs: Sequence[JobSpec], session: object | None = None
    ) -> list[uuid.UUID]:
        """See `AsyncBackend`."""
        if session is None:
            return self._backend.submit(specs)
        from promptfleet.memory_transactions import synchronous  # noqa: PLC0415  # as above

        return self._backend.submit(specs, synchronous(session))

    async def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        """See `AsyncBackend`."""
        return self._backend.look_up(ids, with_states=with_states)

    async def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """See `AsyncBackend`."""
        return self._backend.cancel(ids)

    def token_source(self, job_id: uuid.UUID) -> contextlib.AbstractContextManager[_AsyncCanned]:
        """See `AsyncBackend`, and `MemoryBackend`."""
        text = functools.partial(self._backend.streamed_text, job_id)
        return contextlib.nullcontext(_AsyncCanned(text))

    async def conversation(self, memory_id: str) -> Conversation | None:
        """See `AsyncBackend`."""
        return self._backend.conversation(memory_id)

    async def forget(self, memory_id: str) -> bool:
        """See `AsyncBackend`."""
        return self._backend.forget(memory_id)

    async def close(self) -> None:
        """See `AsyncBackend`."""
        self._backend.close()


class _Canned:
    """A text that is there already, in pieces; see `TokenSource`."""

    def __init__(self, text: Callable[[], str | None]) -> None:
        self.transcript = Transcript()
        self._text = text

    def read(self, wait_s: float) -> bool:
        if not self.has_more():
            time.sleep(wait_s)
            return False
        return True

    def has_more(self) -> bool:
        """Go on by a word."""
        at = self.transcript.length
        piece = _WORD.match(self._text() or "", at)
        if piece is not None:
            self.transcript.add(Entry(take=Take(1, 1), at=at, text=piece[0]))
        return piece is not None


class _AsyncCanned:
    """The same; see `AsyncTokenSource`."""

    def __init__(self, text: Callable[[], str | None]) -> None:
        self._canned = _Canned(text)

    @property
    def transcript(self) -> Transcript:
        return self._canned.transcript

    async def read(self, wait_s: float) -> bool:
        if not self._canned.has_more():
            await asyncio.sleep(wait_s)
            return False
        return True


def _digest(spec: JobSpec) -> str:
    # Here, since only who uses keys needs what it imports.
    from promptfleet_shared.store.submissions import request_digest  # noqa: PLC0415

    return request_digest(spec)


def _result(row: _Row, outcome: Outcome, response: object, now: dt.datetime) -> Result:
    spec = row.spec
    ran = outcome.state not in {JobState.CANCELLED, JobState.EXPIRED}
    return Result(
        job_id=spec.id,
        state=outcome.state,
        tier=spec.tier,
        text=outcome.text,
        response=response,
        finish_reason=outcome.finish_reason,
        error=outcome.error,
        model=outcome.model,
        provider=outcome.provider,
        deployment=outcome.deployment,
        usage=outcome.usage,
        cost_usd=outcome.cost_usd,
        cache=outcome.cache,
        attempts=int(ran),
        calls=outcome.calls,
        batch_id=outcome.batch_id,
        batch_size=outcome.batch_size,
        queued_ms=outcome.queued_ms,
        provider_ms=outcome.provider_ms,
        total_ms=(now - row.created_at).total_seconds() * 1000,
        metadata=spec.metadata or {},
        created_at=row.created_at,
        finished_at=now,
        decision=spec.decision,
    )
