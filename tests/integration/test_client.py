"""Clients on a real Postgres and a real Valkey."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from promptfleet import (
    AsyncClient,
    Client,
    ConfigurationError,
    IdempotencyConflictError,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobState,
    StoreRefusedError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from promptfleet.dev_stack import free_port
from promptfleet_shared.jobs import JobError, Outcome
from promptfleet_shared.queueing import PARKING_KEY
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.claims import claim
from promptfleet_shared.store.engines import make_async_engine, make_engine
from promptfleet_shared.store.finishing import finish

DEADLINE_S = 20.0


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture
async def async_client(settings: Settings) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings) as client:
        yield client


@pytest.fixture
async def async_database(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = make_async_engine(database_url, application_name="tests")
    yield engine
    await engine.dispose()


@pytest.fixture(autouse=True)
def rings_at_once(broker_url: str) -> None:
    ring_at_once(broker_url)


def ring_at_once(broker_url: str) -> None:
    """As in a fleet without fairness: nothing is parked where no worker would move it on."""
    with redis.Redis.from_url(broker_url) as connection:
        connection.hset(f"{PARKING_KEY}:config", mapping={"id": "off", "off": "1"})


def messages_in(broker_url: str) -> list[list[str]]:
    """The ids of each doorbell that waits in a queue, as kombu wrote it."""
    with redis.Redis.from_url(broker_url) as connection:
        found = []
        for key in connection.scan_iter("prompts.*"):
            for raw in connection.lrange(key, 0, -1):
                arguments = json.loads(base64.b64decode(json.loads(raw)["body"]))
                found.append(arguments[0][0])
        return found


def rung_in(broker_url: str) -> list[str]:
    return [id_ for message in messages_in(broker_url) for id_ in message]


def rows_in(database: sa.Engine) -> set[uuid.UUID]:
    with database.connect() as connection:
        return set(connection.execute(sa.text("SELECT id FROM jobs")).scalars())


def end(database: sa.Engine, id_: uuid.UUID, text: str | None = "done") -> None:
    state, error = JobState.SUCCEEDED, None
    if text is None:
        state, error = JobState.FAILED, JobError(code="no_luck", message="It was not to be.")
    with database.begin() as connection:
        (job,) = claim(connection, [id_], worker="test", lease_s=45)
        finish(
            connection,
            [Outcome(job_id=id_, fence=job.fence, state=state, text=text, error=error)],
        )


def cut_connections(admin: sa.Engine) -> None:
    """What a restart of Postgres does to those who have pooled connections."""
    with admin.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'promptfleet'"
            )
        )


# -- doorbells ----------------------------------------------------------------------------------


def test_bulk_rings_once_for_each_hundred(
    settings: Settings, database: sa.Engine, broker_url: str
) -> None:
    with Client(settings) as client:
        jobs = client.enqueue_prompts((f"number {n}" for n in range(1_050)), tier="basic")
    messages = messages_in(broker_url)
    assert sorted(len(message) for message in messages) == [50, *[100] * 10]
    assert sorted(rung_in(broker_url)) == sorted(str(job.id) for job in jobs)
    assert rows_in(database) == {job.id for job in jobs}
    assert [job.id for job in jobs] == sorted(job.id for job in jobs)


def test_concurrent_calls_share_doorbells(settings: Settings, broker_url: str) -> None:
    slow = settings.model_copy(update={"doorbell_window_ms": 10_000.0})
    with Client(slow) as client:
        ids = [str(client.enqueue_prompt("hello").id) for _ in range(60)]
        assert messages_in(broker_url) == []  # the window is open until close() hurries
    assert [len(message) for message in messages_in(broker_url)] == [60]
    assert sorted(rung_in(broker_url)) == sorted(ids)


def test_priorities_and_tiers_ring_apart(settings: Settings, broker_url: str) -> None:
    with Client(settings) as client:
        client.enqueue_prompts([{"prompt": "a", "priority": 9}, "b"], tier="basic")
        client.enqueue_prompt("c", tier="advanced")
    assert [len(message) for message in messages_in(broker_url)] == [1, 1, 1]


def test_without_a_broker_the_call_succeeds_soon(settings: Settings, database: sa.Engine) -> None:
    nowhere = SecretStr(f"redis://127.0.0.1:{free_port()}/0")
    with Client(settings.model_copy(update={"broker_url": nowhere})) as client:
        client.enqueue_prompt("the first call connects")
        started = time.monotonic()
        jobs = [client.enqueue_prompt("hello") for _ in range(5)]
        assert time.monotonic() - started < 2.0
        assert {job.id for job in jobs} < rows_in(database)
        started = time.monotonic()
    assert time.monotonic() - started < 5.0  # close() gives the broker two seconds


# -- the database -------------------------------------------------------------------------------


def test_without_a_database_nothing_is_accepted(broker_url: str) -> None:
    nowhere = SecretStr(f"postgresql://x:y@127.0.0.1:{free_port()}/x")
    settings = Settings(database_url=nowhere, broker_url=SecretStr(broker_url))
    with Client(settings) as client:
        calls: list[Callable[[], object]] = [
            lambda: client.enqueue_prompt("hello"),
            lambda: client.enqueue_prompts(["hello"]),
            lambda: client.get_result(uuid.uuid4()),
            lambda: client.cancel(uuid.uuid4()),
            lambda: client.wait_for_result(uuid.uuid4(), timeout=60),
        ]
        started = time.monotonic()
        for call in calls:
            with pytest.raises(StoreUnavailableError):
                call()
        assert time.monotonic() - started < 5.0
    assert messages_in(broker_url) == []


async def test_without_a_database_nothing_is_accepted_async(broker_url: str) -> None:
    nowhere = SecretStr(f"postgresql://x:y@127.0.0.1:{free_port()}/x")
    settings = Settings(database_url=nowhere, broker_url=SecretStr(broker_url))
    async with AsyncClient(settings) as client:
        with pytest.raises(StoreUnavailableError):
            await client.enqueue_prompt("hello")
        with pytest.raises(StoreUnavailableError):
            await client.get_result(uuid.uuid4())
    assert messages_in(broker_url) == []


def test_without_tables_it_says_what_to_do(settings: Settings, database: sa.Engine) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("DROP TABLE jobs"))
    with Client(settings) as client, pytest.raises(ConfigurationError, match="promptfleet migrate"):
        client.enqueue_prompt("hello")


def test_a_refused_statement_shows_no_prompt(settings: Settings, database: sa.Engine) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs ADD CHECK (tier <> 'basic')"))
    with Client(settings, engine=database) as client:
        with pytest.raises(StoreRefusedError, match="CheckViolation") as caught:
            client.enqueue_prompt("the " + "secret of the prompt", tier="basic")
        shown = "".join(traceback.TracebackException.from_exception(caught.value).format())
        assert "the secret" not in shown
        assert client.enqueue_prompt("hello", tier="standard").state() is JobState.QUEUED


def test_stale_connections_are_replaced(
    client: Client, database: sa.Engine, admin: sa.Engine
) -> None:
    job = client.enqueue_prompt("hello")
    cut_connections(admin)
    other = client.enqueue_prompt("hello again")
    cut_connections(admin)
    assert other.state() is JobState.QUEUED
    cut_connections(admin)
    assert job.cancel()
    cut_connections(admin)
    many = client.enqueue_prompts([f"{n}" for n in range(1_001)])
    assert rows_in(database) == {job.id, other.id, *(j.id for j in many)}


async def test_stale_connections_are_replaced_async(
    async_client: AsyncClient, database: sa.Engine, admin: sa.Engine
) -> None:
    job = await async_client.enqueue_prompt("hello")
    cut_connections(admin)
    other = await async_client.enqueue_prompt("hello again")
    cut_connections(admin)
    assert await other.state() is JobState.QUEUED
    cut_connections(admin)
    many = await async_client.enqueue_prompts([f"{n}" for n in range(1_001)])
    assert rows_in(database) == {job.id, other.id, *(j.id for j in many)}


@pytest.mark.parametrize("key", [None, "k"])
def test_a_connection_that_is_lost_after_the_commit(
    settings: Settings, database: sa.Engine, database_url: str, broker_url: str, key: str | None
) -> None:
    """The first try was committed and nobody knows: the second must not do it again."""
    engine = make_engine(database_url, application_name="promptfleet")
    lost: list[bool] = []

    def lose(connection: sa.Connection, cursor: Any, statement: str, *_: object) -> None:
        if "INSERT" in statement and not lost:
            lost.append(True)
            cursor.connection.close()
            raise exc.OperationalError(statement, None, Exception(), connection_invalidated=True)

    event.listen(engine, "after_cursor_execute", lose)
    with Client(settings, engine=engine) as client:
        job = client.enqueue_prompt("hello", idempotency_key=key)
    engine.dispose()
    assert lost == [True]
    assert rows_in(database) == {job.id}
    assert rung_in(broker_url) == [str(job.id)]


def test_a_client_leaves_a_callers_engine_open(settings: Settings, database: sa.Engine) -> None:
    with database.connect() as connection, Client(settings, engine=database) as client:
        job = client.enqueue_prompt("hello")
        client.close()
        assert connection.execute(sa.text("SELECT id FROM jobs")).scalar() == job.id


def test_tenants_do_not_see_each_other(settings: Settings) -> None:
    with Client(settings) as ours, Client(settings.model_copy(update={"tenant": "b"})) as theirs:
        job = ours.enqueue_prompt("hello", idempotency_key="k")
        with pytest.raises(JobNotFoundError):
            theirs.get_result(job.id)
        with pytest.raises(JobNotFoundError):
            theirs.cancel(job.id)
        assert theirs.get_results([job.id]) == {}
        assert theirs.enqueue_prompt("another", idempotency_key="k").id != job.id
        assert job.state() is JobState.QUEUED


def test_tiers_are_those_of_the_configuration(settings: Settings, tmp_path: Path) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text(
        'default_tier = "tiny"\n[tiers.tiny]\nmodels = ["m"]\n'
        '[models.m]\ndeployments = [{ base_url = "http://127.0.0.1:1/v1" }]\n',
        encoding="utf-8",
    )
    with Client(settings.model_copy(update={"config": config})) as client:
        assert client.enqueue_prompt("hello").tier == "tiny"
        with pytest.raises(InvalidRequestError, match="its tiers are tiny"):
            client.enqueue_prompt("hello", tier="basic")
        with pytest.raises(InvalidRequestError, match="its models are m"):
            client.enqueue_prompt("hello", model="gpt")
        assert client.enqueue_prompt("hello", model="m").tier == "tiny"


# -- idempotency --------------------------------------------------------------------------------


def test_one_key_from_many_threads_is_one_job(
    client: Client, database: sa.Engine, broker_url: str
) -> None:
    start = threading.Barrier(8)
    ids: list[uuid.UUID] = []

    def submit() -> None:
        start.wait(DEADLINE_S)
        ids.append(client.enqueue_prompt("hello", idempotency_key="k").id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(ids) == 8
    assert set(ids) == rows_in(database)
    assert len(set(ids)) == 1
    with pytest.raises(IdempotencyConflictError, match="idempotency key"):
        client.enqueue_prompt("something else", idempotency_key="k")
    client.close()
    assert rung_in(broker_url) == [str(ids[0])]


# -- results ------------------------------------------------------------------------------------


def test_a_job_from_beginning_to_end(client: Client, database: sa.Engine) -> None:
    job = client.enqueue_prompt("What is the answer?", tier="basic", metadata={"page": 7})
    assert repr(job) == f"PromptJob(id={job.id!r}, tier='basic')"
    assert job.state() is JobState.QUEUED
    assert client.get_result(job.id) is None
    end(database, job.id, "42")
    assert job.state() is JobState.SUCCEEDED
    result = client.get_result(str(job.id))
    assert result is not None
    assert (result.text, result.metadata) == ("42", {"page": 7})
    assert job.result(timeout=5) == result == job.wait()
    assert not job.cancel()


def test_results_of_what_did_not_succeed(client: Client, database: sa.Engine) -> None:
    cancelled, failed = client.enqueue_prompts(["a", "b"])
    assert cancelled.cancel()
    end(database, failed.id, None)
    assert cancelled.wait(1).state is JobState.CANCELLED
    with pytest.raises(JobCancelledError) as caught:
        cancelled.result(1)
    assert caught.value.facts["job_id"] == cancelled.id
    with pytest.raises(JobFailedError, match="no_luck: It was not to be") as caught_failure:
        failed.result(1)
    assert caught_failure.value.facts["error"] == JobError(
        code="no_luck", message="It was not to be."
    )


def test_waiting_ends_when_the_job_does(client: Client, database: sa.Engine) -> None:
    job = client.enqueue_prompt("hello")
    timer = threading.Timer(0.1, end, (database, job.id))
    timer.start()
    assert job.result(timeout=DEADLINE_S).text == "done"
    timer.join()


def test_waiting_gives_up_and_the_job_goes_on(client: Client) -> None:
    job = client.enqueue_prompt("hello")
    with pytest.raises(WaitTimeoutError) as caught:
        job.result(timeout=0.05)
    assert caught.value.facts["job_ids"] == (job.id,)
    assert job.state() is JobState.QUEUED


def test_nobody_waits_for_a_job_that_is_none(client: Client) -> None:
    with pytest.raises(JobNotFoundError):
        client.wait_for_result(uuid.uuid4())
    with pytest.raises(JobNotFoundError):
        client.get_result(uuid.uuid4())


def test_as_completed_yields_in_the_order_of_ends(client: Client, database: sa.Engine) -> None:
    first, second, third = client.enqueue_prompts(["a", "b", "c"])
    end(database, second.id)
    completed = client.as_completed([j.id for j in (first, second, third, first)], DEADLINE_S)
    assert next(completed).job_id == second.id
    end(database, third.id)
    assert next(completed).job_id == third.id
    end(database, first.id)
    assert [result.job_id for result in completed] == [first.id]
    results = client.wait_for_results([third.id, first.id, third.id], 1)
    assert [result.job_id for result in results] == [third.id, first.id, third.id]


def test_many_jobs_are_waited_for_with_few_statements(
    settings: Settings, database: sa.Engine
) -> None:
    statements: list[str] = []
    event.listen(
        database,
        "before_cursor_execute",
        lambda connection, cursor, statement, *_: statements.append(statement),
    )
    with Client(settings, engine=database) as client:
        jobs = client.enqueue_prompts([f"{n}" for n in range(500)])
        for job in jobs:
            job.cancel()
        statements.clear()
        assert len(client.wait_for_results([job.id for job in jobs], 5)) == 500
    assert len(statements) == 2


async def test_a_job_from_beginning_to_end_async(
    async_client: AsyncClient, database: sa.Engine
) -> None:
    job = await async_client.enqueue_prompt("What is the answer?", tier="basic")
    other, third = await async_client.enqueue_prompts(["a", {"prompt": "b", "tier": "advanced"}])
    assert (job.tier, other.tier, third.tier) == ("basic", "standard", "advanced")
    assert await job.state() is JobState.QUEUED
    assert await async_client.get_result(job.id) is None
    end(database, job.id, "42")
    assert (await job.result(5)).text == "42"
    with pytest.raises(WaitTimeoutError):
        await other.result(timeout=0.02)
    assert await other.cancel()
    assert not await other.cancel()
    with pytest.raises(JobCancelledError):
        await other.result(1)
    waiting = asyncio.create_task(third.wait(DEADLINE_S))
    end(database, third.id, None)
    assert (await waiting).state is JobState.FAILED
    found = await async_client.get_results([job.id, other.id, uuid.uuid4()])
    assert found.keys() == {job.id, other.id}
    results = await async_client.wait_for_results([third.id, job.id], 1)
    assert [result.job_id for result in results] == [third.id, job.id]
    with pytest.raises(JobNotFoundError):
        await async_client.cancel(uuid.uuid4())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the first loop ended with its connections
def test_one_async_client_in_two_event_loops(settings: Settings, database: sa.Engine) -> None:
    client = AsyncClient(settings)

    async def submit() -> uuid.UUID:
        return (await client.enqueue_prompt("hello")).id

    ids = {asyncio.run(submit()), asyncio.run(submit())}

    async def last() -> uuid.UUID:
        id_ = await submit()
        await client.close()
        return id_

    ids.add(asyncio.run(last()))
    assert rows_in(database) == ids
    gc.collect()


# -- the caller's transaction -------------------------------------------------------------------


def test_a_session_rings_once_and_after_its_commit(
    settings: Settings, database: sa.Engine, broker_url: str
) -> None:
    with Client(settings) as client:
        with Session(database) as session, session.begin():
            first = client.enqueue_prompt("a", session=session)
            (second,) = client.enqueue_prompts(["b"], session=session)
            assert rows_in(database) == set()
            with pytest.raises(JobNotFoundError):
                first.state()
        assert rows_in(database) == {first.id, second.id}
    assert [len(message) for message in messages_in(broker_url)] == [2]


def test_a_scoped_session(settings: Settings, database: sa.Engine, broker_url: str) -> None:
    sessions = scoped_session(sessionmaker(database))
    with Client(settings) as client:
        client.enqueue_prompt("a", session=sessions)
        sessions.rollback()
        job = client.enqueue_prompt("b", session=sessions)
        sessions.commit()
        sessions.remove()
    assert rung_in(broker_url) == [str(job.id)]


def test_a_commit_that_fails_rings_for_nothing(
    settings: Settings, database: sa.Engine, broker_url: str
) -> None:
    with database.begin() as connection:
        connection.execute(
            sa.text("CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        )
    with Client(settings) as client:
        session = Session(database)
        session.execute(sa.text("INSERT INTO once VALUES (1), (1)"))
        client.enqueue_prompt("hello", session=session)
        with pytest.raises(exc.IntegrityError):
            session.commit()
        session.close()
        assert rows_in(database) == set()
        with Session(database) as session, session.begin():
            job = client.enqueue_prompt("hello", session=session)
    assert rung_in(broker_url) == [str(job.id)]


def test_a_conflict_leaves_the_callers_transaction_alive(
    client: Client, database: sa.Engine
) -> None:
    client.enqueue_prompt("a", idempotency_key="k")
    with Session(database) as session, session.begin():
        job = client.enqueue_prompt("b", session=session)
        with pytest.raises(IdempotencyConflictError):
            client.enqueue_prompts(
                ["lost", {"prompt": "c", "idempotency_key": "k"}], session=session
            )
    assert job.state() is JobState.QUEUED
    assert len(rows_in(database)) == 2


def test_an_outer_transaction_decides(
    settings: Settings, database: sa.Engine, broker_url: str
) -> None:
    """A session that joined a connection's transaction commits nothing by itself."""
    with Client(settings) as client:
        with database.connect() as connection, connection.begin() as outer:
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                client.enqueue_prompt("hello", session=session)
                session.commit()
            outer.rollback()
        assert rows_in(database) == set()
    assert messages_in(broker_url) == []


def test_autocommit_rings_at_once(settings: Settings, database: sa.Engine, broker_url: str) -> None:
    with Client(settings) as client:
        engine = database.execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            job = client.enqueue_prompt("hello", session=connection)
            assert job.state() is JobState.QUEUED
    assert rung_in(broker_url) == [str(job.id)]


async def test_asynchronous_sessions(
    settings: Settings, async_database: AsyncEngine, database: sa.Engine, broker_url: str
) -> None:
    async with AsyncClient(settings) as client:
        async with AsyncSession(async_database) as session:
            await client.enqueue_prompt("gone", session=session)
            await session.rollback()
            kept = await client.enqueue_prompt("kept", session=session)
            nested = await session.begin_nested()
            await client.enqueue_prompt("gone", session=session)
            await nested.rollback()
            also = await client.enqueue_prompts(["kept"], session=session)
            assert rows_in(database) == set()
            await session.commit()
            assert rows_in(database) == {kept.id, also[0].id}
        async with async_database.begin() as connection:
            last = await client.enqueue_prompt("kept", session=connection)
        async with AsyncSession(async_database) as session:
            await client.enqueue_prompt("gone", session=session)
    assert rows_in(database) == {kept.id, also[0].id, last.id}
    assert sorted(rung_in(broker_url)) == sorted(str(id_) for id_ in rows_in(database))


async def test_a_sync_client_within_run_sync(
    settings: Settings, async_database: AsyncEngine, database: sa.Engine, broker_url: str
) -> None:
    with Client(settings) as client:
        async with AsyncSession(async_database) as session, session.begin():
            job = await session.run_sync(lambda s: client.enqueue_prompt("hello", session=s))
    assert rows_in(database) == {job.id}
    assert rung_in(broker_url) == [str(job.id)]


async def test_sessions_of_the_other_kind_are_refused(
    settings: Settings, async_database: AsyncEngine, database: sa.Engine
) -> None:
    a_sync: Any = Session(database)
    an_async: Any = AsyncSession(async_database)
    with Client(settings) as client, pytest.raises(InvalidRequestError, match="AsyncClient"):
        client.enqueue_prompt("hello", session=an_async)
    async with AsyncClient(settings) as async_client:
        with pytest.raises(InvalidRequestError, match=r"belongs to Client"):
            await async_client.enqueue_prompt("hello", session=a_sync)
    a_sync.close()
    await an_async.close()


# -- processes ----------------------------------------------------------------------------------


def run_script(text: str, settings: Settings, where: Path) -> str:
    environment = {
        **os.environ,
        "PROMPTFLEET_DATABASE_URL": settings.database_url.get_secret_value(),
        "PROMPTFLEET_BROKER_URL": settings.broker_url.get_secret_value(),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env=environment,
        cwd=where,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_doorbell_is_rung_at_exit(
    settings: Settings, database: sa.Engine, broker_url: str, tmp_path: Path
) -> None:
    slow = "import os; os.environ['PROMPTFLEET_DOORBELL_WINDOW_MS'] = '60000'\n"
    script = "from promptfleet import enqueue_prompt; print(enqueue_prompt('hello').id)"
    printed = run_script(slow + script, settings, tmp_path).strip()
    assert {str(id_) for id_ in rows_in(database)} == {printed}
    assert rung_in(broker_url) == [printed]


def test_forked_workers_each_submit_and_ring(
    settings: Settings, database: sa.Engine, broker_url: str, tmp_path: Path
) -> None:
    """As gunicorn does with --preload, after the parent has used the client."""
    script = """
        import asyncio, os, sys
        from promptfleet import AsyncClient, enqueue_prompt, enqueue_prompts, get_result
        before = enqueue_prompt("from the parent, before")
        shared = AsyncClient()
        children = []
        for n in range(3):
            child = os.fork()
            if child == 0:
                for _ in range(10):
                    job = enqueue_prompt("from a child")
                    assert job.state() == "queued"
                enqueue_prompts(["many"] * 10)
                assert get_result(before.id) is None
                async def submit():
                    async with shared:
                        await shared.enqueue_prompt("async")
                asyncio.run(submit())
                sys.exit()
            children.append(child)
        for _ in range(10):
            enqueue_prompt("from the parent, meanwhile")
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        assert enqueue_prompt("from the parent, after").state() == "queued"
    """
    run_script(script, settings, tmp_path)
    rows = {str(id_) for id_ in rows_in(database)}
    assert len(rows) == 1 + 3 * 21 + 10 + 1
    assert sorted(rung_in(broker_url)) == sorted(rows)


# -- speed: printed, since machines differ --------------------------------------------------------


def test_how_long_a_call_takes(client: Client) -> None:
    client.enqueue_prompt("the first call connects")
    samples = []
    for _ in range(300):
        started = time.perf_counter()
        client.enqueue_prompt("Say hello to the world.", tier="basic")
        samples.append((time.perf_counter() - started) * 1000)
    prompts = [f"Say hello to number {n}." for n in range(10_000)]
    started = time.perf_counter()
    jobs = client.enqueue_prompts(prompts)
    rate = len(jobs) / (time.perf_counter() - started)
    print(f"enqueue_prompt p50 {statistics.median(samples):.2f} ms;", end=" ")
    print(f"enqueue_prompts {rate:,.0f} prompts/s")
    assert len(jobs) == 10_000
