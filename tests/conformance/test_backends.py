"""What every backend does, whether its jobs are in Postgres or in memory."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from promptfleet.backends import AsyncBackend, Backend, Lookup, TokenSource
from promptfleet.memory import AsyncMemoryBackend, MemoryBackend
from promptfleet.postgres import AsyncPostgresBackend, PostgresBackend
from promptfleet.requests import Defaults, make_spec
from promptfleet_shared.errors import IdempotencyConflictError, InvalidRequestError
from promptfleet_shared.jobs import (
    CacheMode,
    CacheOptions,
    ClaimedJob,
    Conversation,
    Doorbell,
    JobError,
    JobSpec,
    JobState,
    Outcome,
    TurnTaken,
    Usage,
)
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.claims import claim
from promptfleet_shared.store.conversations import Ask, take_conversations
from promptfleet_shared.store.finishing import finish


class RecordingBell:
    """Remembers each ring, and whether the job was there for others when it rang."""

    def __init__(self) -> None:
        self.rings: list[list[Doorbell]] = []

    def ring(self, doorbells: Iterable[Doorbell]) -> None:
        if batch := list(doorbells):
            self.rings.append(batch)

    def close(self) -> None:
        pass


class Blocking:
    """An asynchronous backend as the suite's tests see it."""

    def __init__(self, backend: AsyncBackend, runner: asyncio.Runner) -> None:
        self._backend = backend
        self._runner = runner

    @property
    def defaults(self) -> Defaults:
        return self._backend.defaults

    def submit(self, specs: Sequence[JobSpec], session: object | None = None) -> list[uuid.UUID]:
        return self._runner.run(self._backend.submit(specs, session))

    def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        return self._runner.run(self._backend.look_up(ids, with_states=with_states))

    def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        return self._runner.run(self._backend.cancel(ids))

    def token_source(self, job_id: uuid.UUID) -> AbstractContextManager[TokenSource]:
        raise NotImplementedError  # tokens have tests of their own

    def conversation(self, memory_id: str) -> Conversation | None:
        return self._runner.run(self._backend.conversation(memory_id))

    def forget(self, memory_id: str) -> bool:
        return self._runner.run(self._backend.forget(memory_id))

    def close(self) -> None:
        self._runner.run(self._backend.close())


class Subject:
    """A backend under test, and how its jobs are ended and its sessions made."""

    def __init__(
        self,
        backend: Backend,
        rung: Callable[[], list[uuid.UUID]],
        end: Callable[[Outcome], object],
        engine: sa.Engine,
    ) -> None:
        self.backend = backend
        self.rung = rung
        self.end = end
        self.engine = engine

    def spec(self, prompt: str = "hello", **options: Any) -> JobSpec:
        return make_spec(prompt, options, self.backend.defaults)

    def state(self, id_: uuid.UUID) -> JobState | None:
        found = self.backend.look_up([id_], with_states=True)
        if id_ in found.results:
            return found.results[id_].state
        return found.states.get(id_)


def end_in(engine: sa.Engine) -> Callable[[Outcome], object]:
    def end(outcome: Outcome) -> object:
        with engine.begin() as connection:
            (job,) = claim(connection, [outcome.job_id], worker="test", lease_s=45)
            turn = take_turn(connection, job, outcome) if "memory_id" in job.policy else None
            return finish(connection, [outcome._replace(fence=job.fence, turn=turn)])

    return end


def take_turn(connection: sa.Connection, job: ClaimedJob, outcome: Outcome) -> TurnTaken:
    memory_id = job.policy["memory_id"]
    ask = Ask(job.id, job.fence, job.tenant, memory_id, 10**6)
    assert take_conversations(connection, [ask])
    said = [m for m in orjson.loads(job.request)["messages"] if m["role"] != "system"]
    answer = {"role": "assistant", "content": outcome.text}
    return TurnTaken(memory_id, orjson.dumps([*said, answer]))


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=["memory", "async-memory", "postgres", "async-postgres"])
def subject(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Subject]:
    yield from make_subject(request, runner)


def make_subject(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Subject]:
    if "memory" in request.param:
        yield from memory_subject(request.param, runner)
    else:
        yield from postgres_subject(
            request.param,
            runner,
            request.getfixturevalue("settings"),
            request.getfixturevalue("database"),
        )


def memory_subject(param: str, runner: asyncio.Runner) -> Iterator[Subject]:
    accepted: list[uuid.UUID] = []
    memory = MemoryBackend(accepted=lambda specs: accepted.extend(s.id for s in specs))
    backend: Backend = memory
    if param.startswith("async"):
        backend = Blocking(AsyncMemoryBackend(memory), runner)
    engine = sa.create_engine("sqlite://")
    yield Subject(backend, lambda: accepted, memory.finish, engine)
    engine.dispose()


def postgres_subject(
    param: str, runner: asyncio.Runner, settings: Settings, engine: sa.Engine
) -> Iterator[Subject]:
    bell = RecordingBell()
    backend: Backend
    if param.startswith("async"):
        backend = Blocking(AsyncPostgresBackend(settings, bell=bell), runner)
    else:
        backend = PostgresBackend(settings, bell=bell)
    yield Subject(
        backend, lambda: [b.job_id for ring in bell.rings for b in ring], end_in(engine), engine
    )
    backend.close()


def test_a_job_is_queued_and_rung_for(subject: Subject) -> None:
    spec = subject.spec()
    assert subject.backend.submit([spec]) == [spec.id]
    assert subject.state(spec.id) is JobState.QUEUED
    assert subject.rung() == [spec.id]


def test_many_jobs_keep_their_order(subject: Subject) -> None:
    specs = [subject.spec(f"number {n}") for n in range(2_500)]
    ids = [spec.id for spec in specs]
    assert subject.backend.submit(specs) == ids
    assert subject.rung() == ids
    found = subject.backend.look_up(ids, with_states=True)
    assert found.states == dict.fromkeys(ids, JobState.QUEUED)
    assert found.results == {}


def test_an_unknown_job_is_neither_here_nor_there(subject: Subject) -> None:
    found = subject.backend.look_up([uuid.uuid4()], with_states=True)
    assert found == Lookup(results={}, states={})


def test_a_result_tells_what_was_asked_and_answered(subject: Subject) -> None:
    spec = subject.spec(tier="basic", metadata={"user": "Ada", "n": [1, 2]})
    subject.backend.submit([spec])
    usage = Usage(input=7, cached=2, output=5, reasoning=1)
    subject.end(
        Outcome(
            job_id=spec.id,
            fence=0,
            state=JobState.SUCCEEDED,
            text="an answer",
            finish_reason="stop",
            usage=usage,
            model="m",
            calls=1,
        )
    )
    found = subject.backend.look_up([spec.id], with_states=True)
    assert found.states == {}
    result = found.results[spec.id]
    assert result.succeeded
    assert (result.job_id, result.tier, result.text) == (spec.id, "basic", "an answer")
    assert (result.usage, result.model, result.finish_reason) == (usage, "m", "stop")
    assert result.metadata == {"user": "Ada", "n": [1, 2]}
    assert (result.attempts, result.calls) == (1, 1)
    assert result.finished_at >= result.created_at
    assert result.created_at.tzinfo is not None


def test_a_failure_carries_its_error(subject: Subject) -> None:
    spec = subject.spec()
    subject.backend.submit([spec])
    error = JobError(code="refused", message="No.", status=400)
    subject.end(Outcome(job_id=spec.id, fence=0, state=JobState.FAILED, error=error))
    result = subject.backend.look_up([spec.id], with_states=False).results[spec.id]
    assert (result.state, result.error, result.text) == (JobState.FAILED, error, None)


def test_the_same_key_and_request_are_one_job(subject: Subject) -> None:
    options: dict[str, Any] = {"idempotency_key": "k", "on_unknown": "fail"}
    first, second = (subject.spec(priority=p, **options) for p in (1, 2))
    assert subject.backend.submit([first]) == [first.id]
    assert subject.backend.submit([second]) == [first.id]
    assert subject.rung() == [first.id]
    assert subject.state(second.id) is None


def test_the_same_key_twice_in_one_call(subject: Subject) -> None:
    first, second = (subject.spec(idempotency_key="k") for _ in range(2))
    assert subject.backend.submit([first, second]) == [first.id, first.id]
    assert subject.rung() == [first.id]


@pytest.mark.parametrize(
    "options",
    [
        {"tier": "basic"},
        {"model": "other"},
        {"max_tokens": 5},
        {"metadata": {"a": 1}},
        {"callback_url": "https://example.com/"},
        {"kind": "completion"},
        {"on_unknown": "fail"},
    ],
)
def test_the_same_key_with_another_request_is_a_conflict(
    subject: Subject, options: dict[str, Any]
) -> None:
    subject.backend.submit([subject.spec(idempotency_key="k")])
    other = subject.spec(idempotency_key="k", **options)
    with pytest.raises(IdempotencyConflictError) as caught:
        subject.backend.submit([other])
    assert caught.value.field == "idempotency_key"
    assert subject.state(other.id) is None


def test_a_conflict_takes_the_whole_call_back(subject: Subject) -> None:
    subject.backend.submit([subject.spec(idempotency_key="k")])
    rung = list(subject.rung())
    innocent = [subject.spec(str(n), idempotency_key=str(n)) for n in range(1_100)]
    with pytest.raises(IdempotencyConflictError):
        subject.backend.submit([*innocent, subject.spec("other", idempotency_key="k")])
    assert subject.rung() == rung
    ids = [spec.id for spec in innocent]
    assert subject.backend.look_up(ids, with_states=True).states == {}
    assert subject.backend.submit(innocent) == ids  # their keys are free


def test_cancel_ends_what_is_queued_once(subject: Subject) -> None:
    specs = [subject.spec(), subject.spec()]
    subject.backend.submit(specs)
    ids = [spec.id for spec in specs]
    assert subject.backend.cancel([*ids, uuid.uuid4()]) == set(ids)
    assert {subject.state(id_) for id_ in ids} == {JobState.CANCELLED}
    assert subject.backend.cancel(ids) == set()


def test_options_of_the_row_are_kept(subject: Subject) -> None:
    cache = CacheOptions(mode=CacheMode.REFRESH, ttl_s=5, namespace="n")
    spec = subject.spec("\0 is allowed here \N{GRINNING FACE}", cache=cache, priority=9)
    assert subject.backend.submit([spec]) == [spec.id]
    assert subject.state(spec.id) is JobState.QUEUED


@pytest.fixture(params=["memory", "postgres"])
def sync_subject(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Subject]:
    """Sessions of asynchronous callers have tests of their own: test_client.py."""
    yield from make_subject(request, runner)


def test_a_session_commits_its_jobs(sync_subject: Subject) -> None:
    subject = sync_subject
    with Session(subject.engine) as session:
        first, second, third = (subject.spec() for _ in range(3))
        subject.backend.submit([first], session)
        subject.backend.submit([second], session)
        assert subject.state(first.id) is None
        assert subject.rung() == []
        session.commit()
        assert subject.state(first.id) is JobState.QUEUED
        assert subject.rung() == [first.id, second.id]
        subject.backend.submit([third], session)
        session.commit()
        session.commit()
    assert subject.rung() == [first.id, second.id, third.id]


@pytest.mark.parametrize("end", ["rollback", "close", "error"])
def test_a_session_that_does_not_commit_leaves_nothing(sync_subject: Subject, end: str) -> None:
    subject = sync_subject
    spec = subject.spec(idempotency_key="k")
    session = Session(subject.engine)
    if end == "error":
        with contextlib.suppress(ZeroDivisionError), session.begin():
            subject.backend.submit([spec], session)
            raise ZeroDivisionError
    else:
        subject.backend.submit([spec], session)
        getattr(session, end)()
    later = subject.spec(idempotency_key="k")
    assert subject.backend.submit([later], session) == [later.id]
    session.commit()
    session.close()
    assert subject.rung() == [later.id]
    assert subject.state(spec.id) is None


def test_savepoints_of_a_session(sync_subject: Subject) -> None:
    subject = sync_subject
    outside, kept, gone, deep = (subject.spec(name) for name in "abcd")
    with Session(subject.engine) as session, session.begin():
        subject.backend.submit([outside], session)
        with session.begin_nested():
            subject.backend.submit([kept], session)
        nested = session.begin_nested()
        subject.backend.submit([gone], session)
        with session.begin_nested():
            subject.backend.submit([deep], session)
        nested.rollback()
        assert subject.rung() == []
    assert subject.rung() == [outside.id, kept.id]
    assert [subject.state(s.id) for s in (kept, gone, deep)] == [JobState.QUEUED, None, None]


def test_a_savepoint_older_than_the_first_job(sync_subject: Subject) -> None:
    subject = sync_subject
    gone, kept = subject.spec(), subject.spec()
    with subject.engine.connect() as connection:
        nested = connection.begin_nested()
        subject.backend.submit([gone], connection)
        nested.rollback()
        subject.backend.submit([kept], connection)
        connection.commit()
    assert subject.rung() == [kept.id]


def test_a_connection_commits_its_jobs(sync_subject: Subject) -> None:
    subject = sync_subject
    kept, gone, again = (subject.spec() for _ in range(3))
    with subject.engine.connect() as connection:
        subject.backend.submit([kept], connection)
        connection.commit()
        subject.backend.submit([gone], connection)
        connection.rollback()
        subject.backend.submit([again], connection)
        connection.commit()
    assert subject.rung() == [kept.id, again.id]
    assert subject.state(gone.id) is None


def test_something_else_is_no_session(sync_subject: Subject) -> None:
    spec = sync_subject.spec(idempotency_key="k")
    with pytest.raises(InvalidRequestError, match=r"^session: ") as caught:
        sync_subject.backend.submit([spec], object())
    assert caught.value.field == "session"
    assert sync_subject.rung() == []
    assert sync_subject.backend.submit([spec]) == [spec.id]


def test_a_conversation_remembers_its_turns_until_it_is_forgotten(subject: Subject) -> None:
    assert subject.backend.conversation("chat") is None
    assert not subject.backend.forget("chat")
    specs = [subject.spec(text, system="Be brief.", memory_id="chat") for text in ("one", "two")]
    subject.backend.submit([*specs, subject.spec("elsewhere", memory_id="other")])
    for spec, text in zip(specs, ("1", "2"), strict=True):
        subject.end(Outcome(job_id=spec.id, fence=0, state=JobState.SUCCEEDED, text=text))

    found = subject.backend.conversation("chat")

    assert found is not None
    assert [turn.job_id for turn in found.turns] == [spec.id for spec in specs]
    assert found.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    assert (found.memory_id, found.summary) == ("chat", None)
    assert found.created_at <= found.turns[0].created_at <= found.updated_at
    assert subject.backend.forget("chat")
    assert subject.backend.conversation("chat") is None


def test_a_turn_without_an_answer_is_not_remembered(subject: Subject) -> None:
    spec = subject.spec("one", memory_id="chat")
    subject.backend.submit([spec])
    subject.backend.cancel([spec.id])
    found = subject.backend.conversation("chat")
    assert found is None or found.turns == []
