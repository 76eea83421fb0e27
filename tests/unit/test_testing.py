"""`promptfleet.testing`, as users' tests use it."""

from __future__ import annotations

import datetime as dt
import doctest
import re
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import promptfleet.default_client
import promptfleet.testing
from promptfleet import (
    AsyncClient,
    Client,
    IdempotencyConflictError,
    InvalidRequestError,
    JobExpiredError,
    JobFailedError,
    JobNotFoundError,
    JobState,
    Usage,
    WaitTimeoutError,
    cancel,
    delete_conversation,
    enqueue_prompt,
    enqueue_prompts,
    get_conversation,
    get_result,
    wait_for_result,
)
from promptfleet.testing import CANNED, Answer, EnqueuedPrompt, FakeFleet, fake_fleet
from promptfleet_shared.errors import ProviderError


@pytest.fixture
def engine() -> Iterator[sa.Engine]:
    engine = sa.create_engine("sqlite://")
    yield engine
    engine.dispose()


def test_the_functions_need_no_server(fake_promptfleet: FakeFleet) -> None:
    job = enqueue_prompt("hello", tier="basic", max_tokens=5, metadata={"page": 7})
    assert job.result().text == CANNED
    result = get_result(job.id)
    assert result is not None
    assert (result.tier, result.metadata, result.calls) == ("basic", {"page": 7}, 1)
    assert wait_for_result(job.id) == result
    assert not cancel(job.id)
    (prompt,) = fake_promptfleet.enqueued
    assert (prompt.id, prompt.text, prompt.tier) == (job.id, "hello", "basic")
    assert (prompt.options, prompt.metadata) == ({"max_tokens": 5}, {"page": 7})
    assert prompt.messages == [{"role": "user", "content": "hello"}]


def test_a_function_answers() -> None:
    def answer(prompt: EnqueuedPrompt) -> str | Answer | Exception:
        match prompt.text:
            case "fail":
                return ProviderError("Too busy.", code="overloaded", status=529)
            case "raise":
                raise ProviderError(code="rate_limit_exceeded")
            case "rich":
                return Answer(text="x", usage=Usage(input=1, output=2), cost_usd=Decimal("0.5"))
        return f"{prompt.tier}: {prompt.text.upper()}"

    with fake_fleet(answer):
        assert enqueue_prompt("hello", tier="basic").result().text == "basic: HELLO"
        with pytest.raises(JobFailedError, match="overloaded: Too busy"):
            enqueue_prompt("fail").result()
        with pytest.raises(JobFailedError, match="rate_limit_exceeded"):
            enqueue_prompt("raise").result()
        rich = enqueue_prompt("rich").result()
        assert (rich.usage.output, rich.cost_usd) == (2, Decimal("0.5"))
        assert rich.response["choices"][0]["message"]["content"] == "x"


def test_a_mistake_in_the_tests_function_is_seen() -> None:
    def answer(prompt: EnqueuedPrompt) -> str:
        raise KeyError(prompt.text)

    with fake_fleet(answer), pytest.raises(KeyError):
        enqueue_prompt("hello")


def test_answers_on_demand() -> None:
    with fake_fleet(None) as fleet:
        first, second, third, fourth = enqueue_prompts(["a", "b", "c", "d"])
        assert first.state() is JobState.QUEUED
        assert get_result(first.id) is None
        with pytest.raises(WaitTimeoutError):
            first.result(timeout=0)
        fleet.answer(first, "an answer")
        assert first.result(timeout=0).text == "an answer"
        fleet.fail(fleet.enqueued[1], code="refused", message="No.")
        with pytest.raises(JobFailedError, match="refused: No"):
            second.result(timeout=0)
        fleet.expire(third.id)
        with pytest.raises(JobExpiredError):
            third.result(timeout=0)
        assert fourth.cancel()
        with pytest.raises(LookupError):
            fleet.answer(fourth)
        with pytest.raises(LookupError):
            fleet.answer(uuid.uuid4())


def test_an_answer_from_another_thread_is_waited_for() -> None:
    with fake_fleet(None) as fleet:
        job = enqueue_prompt("hello")
        timer = threading.Timer(0.05, fleet.answer, (job, "late"))
        timer.start()
        assert job.result(timeout=20).text == "late"
        timer.join()


def test_validation_is_the_real_one() -> None:
    with fake_fleet(tiers=["tiny"], models=["m"], default_tier="tiny") as fleet:
        with pytest.raises(InvalidRequestError, match="its models are m"):
            enqueue_prompt("x", model="gpt")
        assert enqueue_prompt("hello").tier == "tiny"
        with pytest.raises(InvalidRequestError, match="its tiers are tiny"):
            enqueue_prompt("hello", tier="basic")
        with pytest.raises(InvalidRequestError, match=r"^prompts\[1\]"):
            enqueue_prompts(["a", ""])
        with pytest.raises(InvalidRequestError, match="did you mean"):
            enqueue_prompt("hello", teir="tiny")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        with pytest.raises(JobNotFoundError):
            get_result(uuid.uuid4())
        with pytest.raises(JobNotFoundError):
            cancel(uuid.uuid4())
        assert len(fleet.enqueued) == 1


def test_idempotency_is_the_real_one(fake_promptfleet: FakeFleet) -> None:
    first = enqueue_prompt("hello", idempotency_key="k")
    assert enqueue_prompt("hello", idempotency_key="k") == first
    with pytest.raises(IdempotencyConflictError):
        enqueue_prompt("something else", idempotency_key="k")
    fake_promptfleet.assert_enqueued(times=1)


async def test_every_client_uses_it() -> None:
    nowhere = Client()  # made before: a module's own, for example
    with fake_fleet("yes") as fleet:
        assert nowhere.enqueue_prompt("a").result().text == "yes"
        with Client() as client:
            assert client.enqueue_prompt("b").result().text == "yes"
        async with AsyncClient() as async_client:
            job = await async_client.enqueue_prompt("c")
            assert (await job.result()).text == "yes"
            many = await async_client.enqueue_prompts(["d", "e"])
            results = await async_client.wait_for_results([j.id for j in many])
            assert [result.text for result in results] == ["yes", "yes"]
            assert not await job.cancel()
        assert [prompt.text for prompt in fleet.enqueued] == list("abcde")
    nowhere.close()


def test_fleets_nest_and_start_empty() -> None:
    with fake_fleet("outer") as outer:
        with fake_fleet("inner") as inner:
            job = enqueue_prompt("a")
            assert job.result().text == "inner"
        outer.assert_nothing_enqueued()
        with pytest.raises(JobNotFoundError):
            get_result(job.id)
        assert enqueue_prompt("b").result().text == "outer"
        assert len(inner.enqueued) == 1


def test_a_session_decides_when_a_prompt_is_enqueued(
    fake_promptfleet: FakeFleet, engine: sa.Engine
) -> None:
    with Session(engine) as session:
        job = enqueue_prompt("a", session=session)
        fake_promptfleet.assert_nothing_enqueued()
        with pytest.raises(JobNotFoundError):
            job.state()
        session.commit()
        fake_promptfleet.assert_enqueued("a", times=1)
        enqueue_prompt("b", session=session)
        session.rollback()
        nested = session.begin_nested()
        enqueue_prompt("c", session=session)
        nested.rollback()
        session.commit()
    fake_promptfleet.assert_enqueued(times=1)


def test_a_test_that_rolls_everything_back_sees_its_prompts(
    fake_promptfleet: FakeFleet, engine: sa.Engine
) -> None:
    """The usual fixture of SQLAlchemy's users: the session joins an outer transaction."""
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            enqueue_prompt("a", session=session)
            session.commit()
        outer.rollback()
    fake_promptfleet.assert_enqueued("a", times=1)


def test_a_session_needs_no_database(fake_promptfleet: FakeFleet) -> None:
    with Session() as session, session.begin():
        enqueue_prompt("a", session=session)
    fake_promptfleet.assert_enqueued("a")


def test_assertions_say_what_was_there_instead(fake_promptfleet: FakeFleet) -> None:
    fake_promptfleet.assert_nothing_enqueued()
    enqueue_prompts(["a", "b"], tier="basic", metadata={"run": 1, "x": 2}, temperature=0.5)
    enqueue_prompt("c", tier="advanced", model="big", system="Be brief.")
    assert fake_promptfleet.assert_enqueued("b", tier="basic").text == "b"
    fake_promptfleet.assert_enqueued(metadata={"run": 1}, options={"temperature": 0.5}, times=2)
    fake_promptfleet.assert_enqueued(
        model="big",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "c"},
        ],
    )
    with pytest.raises(AssertionError, match=r"tier='standard', found 0 among:\n  'a' tier=basic"):
        fake_promptfleet.assert_enqueued("a", tier="standard")
    with pytest.raises(AssertionError, match="expected 1 prompt"):
        fake_promptfleet.assert_enqueued(tier="basic", times=1)
    with pytest.raises(AssertionError, match="found 0"):
        fake_promptfleet.assert_enqueued(metadata={"run": 2})
    with pytest.raises(AssertionError, match="found 3"):
        fake_promptfleet.assert_nothing_enqueued()


def test_the_text_of_every_kind(fake_promptfleet: FakeFleet) -> None:
    parts = [
        {"type": "text", "text": "look "},
        {"type": "image_url"},
        {"type": "text", "text": "!"},
    ]
    enqueue_prompt([{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}])
    enqueue_prompt("complete", kind="completion")
    enqueue_prompt("embed", kind="embedding")
    enqueue_prompt([{"role": "system", "content": "x"}])
    assert [p.text for p in fake_promptfleet.enqueued] == ["look !", "complete", "embed", ""]


def test_the_clock_is_the_tests() -> None:
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    with fake_fleet(now=lambda: now) as fleet:
        job = enqueue_prompt("x", deadline=now + dt.timedelta(hours=1))
        assert fleet.enqueued[0].deadline_s == 3600.0
        assert job.result().created_at == now


def test_the_fixture_needs_no_import_and_no_environment(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(
        textwrap.dedent("""
            import sys
            from promptfleet import enqueue_prompt

            def test_app(fake_promptfleet):
                fake_promptfleet.answers = "Hi."
                assert enqueue_prompt("hello").result().text == "Hi."
                fake_promptfleet.assert_enqueued("hello")
                for module in ("celery", "sqlalchemy", "psycopg"):
                    assert module not in sys.modules
        """),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:celery", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("module", [promptfleet.testing, promptfleet.default_client])
def test_examples_do_what_they_say(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert results.attempted > 0
    assert results.failed == 0


async def test_conversations_are_remembered() -> None:
    with fake_fleet(lambda prompt: prompt.text.upper()):
        enqueue_prompt("hello", memory_id="user-7")
        async with AsyncClient() as client:
            await client.enqueue_prompt("and now?", memory_id="user-7")
            found = await client.get_conversation("user-7")
            assert found == get_conversation("user-7")
            assert found is not None
            said = [message["content"] for message in found.messages]
            assert said == ["hello", "HELLO", "and now?", "AND NOW?"]
            assert await client.delete_conversation("user-7")
        assert get_conversation("user-7") is None
        assert not delete_conversation("user-7")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"memory_id": ""}, "memory_id"),
        ({"memory_id": 7}, "memory_id"),
        ({"memory": {"max_tokens": 5}}, "memory"),
        ({"memory_id": "a", "memory": {"max_tokens": 0}}, "memory.max_tokens"),
        ({"memory_id": "a", "memory": {"strategy": "all"}}, "memory.strategy"),
        ({"memory_id": "a", "memory": {"secret": 1}}, "memory"),
        ({"memory_id": "a", "kind": "embedding"}, "memory_id"),
        ({"memory_id": "a", "service": "batch"}, "memory_id"),
        ({"context": "shorten"}, "context"),
        ({"context": {"policy": "shorten"}}, "context.policy"),
        ({"context": {"relevance": "magic"}}, "context.relevance"),
        ({"context": ["truncate"]}, "context"),
    ],
)
def test_what_context_and_memory_may_not_be(options: dict[str, Any], field: str) -> None:
    with fake_fleet(), pytest.raises(InvalidRequestError, match=re.escape(field)) as caught:
        enqueue_prompt("hello", **options)
    assert caught.value.field == field
    assert "secret" not in caught.value.message
