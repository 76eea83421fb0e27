"""Conversations and context windows in real workers, with a provider, Postgres and Valkey."""

from __future__ import annotations

import dataclasses
import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
import sqlalchemy as sa
from celery import Celery
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.rows import job_row, ledger_rows, spec
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.jobs import (
    CacheMode,
    CacheOptions,
    Conversation,
    Doorbell,
    JobKind,
    JobSpec,
    JobState,
    Result,
)
from promptfleet_shared.queueing import make_celery, publish
from promptfleet_shared.store.conversations import read_conversation
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.results import read_results
from promptfleet_shared.store.submissions import insert_jobs
from promptfleet_workers.context.fitter import FIRST_SLEEP_S

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 1
[tiers.basic]
models = ["open"]
[tiers.narrow]
models = ["narrow", "wide"]
[tiers.cheap]
models = ["open"]
[models.open]
price_as = "free"
deployments = [{{ base_url = "{url}" }}]
[models.narrow]
price_as = "openai/gpt-4o-mini"
context_window = 300
deployments = [{{ base_url = "{url}", model = "gpt-4o-mini" }}]
[models.wide]
context_window = 600
deployments = [{{ base_url = "{url}", model = "gpt-4o" }}]
[context]
policy = "truncate"
reserve_output_tokens = 50
summary_tier = "cheap"
summary_tokens = 40
[memory]
max_tokens = 2000
"""
TIERS = ("basic", "narrow", "cheap")
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where the workers of this module work, and how a test submits to them."""

    directory: Path
    database_url: str
    broker_url: str
    database: sa.Engine
    celery: Celery
    provider: Provider

    def submit(self, *specs: JobSpec) -> list[uuid.UUID]:
        with self.database.begin() as connection:
            ids = insert_jobs(connection, specs)
        bells = [Doorbell(job_id=s.id, tier=s.tier, priority=s.priority) for s in specs]
        publish(self.celery, bells)
        return ids

    def results(self, ids: Sequence[uuid.UUID]) -> list[Result]:
        def all_there() -> list[Result]:
            with self.database.connect() as connection:
                found = read_results(connection, ids, tenant="default")
            return [found[job_id] for job_id in ids] if len(found) == len(ids) else []

        return eventually(all_there, "all results are there", timeout_s=30)

    def run(self, *specs: JobSpec) -> list[Result]:
        return self.results(self.submit(*specs))

    def conversation(self, memory_id: str) -> Conversation | None:
        with self.database.connect() as connection:
            return read_conversation(connection, memory_id, tenant="default")

    def said(self, memory_id: str) -> list[str]:
        """What the users said, in order."""
        found = self.conversation(memory_id)
        messages = found.messages if found else []
        return [message["content"] for message in messages if message["role"] == "user"]

    def worker(self, **settings: object) -> Process:
        number = next(_numbers)
        config = self.directory / f"fleet-{number}.toml"
        config.write_text(FLEET.format(url=self.provider.base_url))
        env = worker_environment(
            database_url=self.database_url, broker_url=self.broker_url, config=config, **settings
        )
        log = self.directory / f"worker-{number}.log"
        return start_worker(TIERS, name=f"c{number}", env=env, log=log)


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    admin: sa.Engine,
    template: str,
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("context")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE context TEMPLATE {template}"))
    with redis.Redis.from_url(valkey.url) as connection:
        connection.flushall()
    url = sa.make_url(postgres.url).set(database="context").render_as_string(hide_password=False)
    database = make_engine(url, application_name="tests")
    celery = make_celery(valkey.url, TIERS)
    with provider(directory) as simulated:
        yield Site(
            directory=directory,
            database_url=url,
            broker_url=valkey.url,
            database=database,
            celery=celery,
            provider=simulated,
        )
    celery.close()
    database.dispose()
    with admin.connect() as connection:
        connection.execute(sa.text("DROP DATABASE context WITH (FORCE)"))


@pytest.fixture(scope="module")
def workers(site: Site) -> Iterator[list[Process]]:
    """Two workers that the tests below share."""
    with ThreadPoolExecutor(2) as pool:
        running = list(pool.map(lambda _: site.worker(), range(2)))
    yield running
    outputs = [(process.running, process.output) for process in running]
    for process in running:
        process.kill()
    for alive, output in outputs:
        assert alive, output[-4000:]
        assert "Traceback" not in output
        assert "batch_crashed" not in output


def unique() -> str:
    return uuid.uuid4().hex


def turn(memory_id: str, text: str, **fields: Any) -> JobSpec:
    policy = {"memory_id": memory_id, **fields.pop("policy", {})}
    return spec(text, policy=policy, cache=CacheOptions(mode=CacheMode.OFF), **fields)


def chat_spec(messages: Sequence[dict[str, Any]], **fields: Any) -> JobSpec:
    request = orjson.dumps({"messages": messages}, option=orjson.OPT_SORT_KEYS)
    return spec(request=request, input_tokens=-(-len(request) // 4), **fields)


def long_chat(turns: int, marker: str) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = [{"role": "system", "content": f"Be brief {marker}."}]
    for n in range(turns):
        chat.append({"role": "user", "content": f"Question {n} of {marker} {'word ' * 20}"})
        chat.append({"role": "assistant", "content": f"Answer {n}"})
    return [*chat, {"role": "user", "content": f"The last one of {marker}"}]


@pytest.mark.usefixtures("workers")
class TestConversations:
    def test_each_turn_is_told_of_those_before(self, site: Site) -> None:
        memory_id = unique()
        (first,) = site.run(turn(memory_id, f"My name is Ada {memory_id}"))
        (second,) = site.run(turn(memory_id, "What is my name?"))

        assert first.text is not None
        assert second.text is not None
        assert "Ada" in second.text  # the simulated provider repeats what it was sent
        assert second.usage.input > first.usage.input
        assert second.decision is not None
        assert second.decision["memory"] == {"turns": 1, "of": 1}
        found = site.conversation(memory_id)
        assert found is not None
        assert [m["content"] for m in found.messages] == [
            f"My name is Ada {memory_id}",
            first.text,
            "What is my name?",
            second.text,
        ]
        assert [t.job_id for t in found.turns] == [first.job_id, second.job_id]

    def test_turns_at_once_are_taken_one_by_one_in_order(self, site: Site) -> None:
        chats = [unique() for _ in range(3)]
        specs = [turn(chat, f"turn {n}") for n in range(6) for chat in chats]

        started = time.monotonic()
        results = site.run(*specs)
        elapsed_s = time.monotonic() - started

        assert {result.state for result in results} == {JobState.SUCCEEDED}
        assert {result.attempts for result in results} == {1}  # who waits burns no attempt
        # Claimed in vain once at most, and called when its turn comes: but for the safety net,
        # which a machine that is slow enough meets.
        deferrals = [job_row(site.database, each.id)["deferrals"] for each in specs]
        assert 1 <= max(deferrals) <= 1 + int(elapsed_s / (FIRST_SLEEP_S / 2))
        for chat in chats:
            assert site.said(chat) == [f"turn {n}" for n in range(6)]
        for place, result in enumerate(results):
            assert result.decision is not None
            assert result.decision["memory"]["turns"] == place // 3

    def test_a_failed_turn_blocks_nobody(self, site: Site) -> None:
        memory_id = unique()
        failed, after = site.run(
            turn(memory_id, "[[sim:status=400]] no"), turn(memory_id, "and now?")
        )
        assert (failed.state, after.state) == (JobState.FAILED, JobState.SUCCEEDED)
        assert site.said(memory_id) == ["and now?"]

    def test_the_window_is_the_jobs_own(self, site: Site) -> None:
        memory_id = unique()
        for n in range(3):
            site.run(turn(memory_id, f"turn {n} {'word ' * 20}"))
        (last,) = site.run(turn(memory_id, "last", policy={"memory": {"max_tokens": 100}}))
        assert last.decision is not None
        assert last.decision["memory"] == {"turns": 1, "of": 3}

    def test_a_summary_is_made_in_the_background_and_told_to_later_turns(self, site: Site) -> None:
        memory_id = unique()
        memory = {
            "strategy": "summary",
            "max_tokens": 1000,
            "summarization_threshold": 100,
            "summary_tokens": 30,
        }

        def say(text: str) -> Result:
            return site.run(turn(memory_id, text, policy={"memory": memory}))[0]

        say(f"I like tea {'word ' * 60}")
        say(f"I like jam {'word ' * 60}")
        due = say("What do I like?")  # the third one finds too much, and waits for nothing
        assert due.decision is not None
        assert due.decision["memory"]["turns"] == 2

        later: list[Result] = []

        def is_told() -> bool:
            later.append(say("Go on."))
            return "summarised" in (later[-1].decision or {})["memory"]

        eventually(is_told, "a turn is told the summary", timeout_s=30)
        told = later[-1]

        assert told.decision is not None
        assert told.decision["memory"]["summarised"] >= 1
        assert told.text is not None
        assert "Summary of our conversation" in told.text
        found = site.conversation(memory_id)
        assert found is not None
        assert found.summary
        assert len(found.turns) == 3 + len(later)  # all of them are kept beside it


@pytest.mark.usefixtures("workers")
class TestContextWindows:
    def test_a_model_that_cant_hold_it_is_skipped(self, site: Site) -> None:
        (result,) = site.run(chat_spec(long_chat(10, unique()), tier="narrow"))
        assert (result.state, result.deployment) == (JobState.SUCCEEDED, "wide")
        assert result.decision is not None
        assert result.decision["context"]["skipped"] == ["narrow"]

    def test_a_short_one_goes_to_the_first(self, site: Site) -> None:
        (result,) = site.run(chat_spec(long_chat(1, unique()), tier="narrow"))
        assert result.deployment == "narrow"
        assert "context" not in (result.decision or {})

    def test_the_oldest_turns_are_left_out(self, site: Site) -> None:
        marker = unique()
        (result,) = site.run(chat_spec(long_chat(40, marker), tier="narrow"))
        assert (result.state, result.deployment) == (JobState.SUCCEEDED, "wide")
        assert result.decision is not None
        facts = result.decision["context"]
        assert facts["policy"] == "truncate"
        assert facts["left_out"] > 0
        assert facts["sent_tokens"] <= 550 < facts["tokens"]
        assert result.text is not None
        assert f"Be brief {marker}" in result.text
        assert "Question 0 of" not in result.text

    def test_error_makes_no_call(self, site: Site) -> None:
        job = chat_spec(
            long_chat(40, unique()), tier="narrow", policy={"context": {"policy": "error"}}
        )
        (result,) = site.run(job)
        assert result.state is JobState.FAILED
        assert result.error is not None
        assert result.error.code == "context_length_exceeded"
        assert (result.calls, result.attempts) == (0, 1)
        assert ledger_rows(site.database, job.id) == []

    def test_the_cheap_tier_summarises_once_for_all(self, site: Site) -> None:
        marker = unique()
        policy = {"context": {"policy": "summarize"}}
        jobs = [chat_spec(long_chat(40, marker), tier="narrow", policy=policy) for _ in range(2)]

        results = site.run(*jobs)

        for result in results:
            assert (result.state, result.attempts) == (JobState.SUCCEEDED, 1)
            assert result.decision is not None
            assert result.decision["context"]["summary"] == "made"
            assert result.decision["context"]["sent_tokens"] <= 550
            assert result.text is not None
            assert "Summary of our conversation so far" in result.text
        (errand,) = self.errands(site, marker)
        assert (errand["tier"], errand["state"]) == ("cheap", "succeeded")
        assert len(ledger_rows(site.database, errand["id"])) == 1  # paid once, and by its tenant

    def test_a_summary_that_fails_is_done_without(self, site: Site) -> None:
        messages = long_chat(40, unique())
        messages[1]["content"] += " [[sim:status=400,times=1]]"  # the errand is the first to say so
        policy = {"context": {"policy": "summarize"}}
        (result,) = site.run(chat_spec(messages, tier="narrow", policy=policy))
        assert result.state is JobState.SUCCEEDED
        assert result.decision is not None
        assert result.decision["context"]["summary"] == "failed"
        assert result.decision["context"]["left_out"] > 0

    def test_embeddings_of_a_deployment_say_what_is_relevant(self, site: Site) -> None:
        marker = unique()
        policy = {"context": {"policy": "relevance", "relevance": "embeddings:open"}}
        (result,) = site.run(chat_spec(long_chat(25, marker), tier="narrow", policy=policy))
        assert result.state is JobState.SUCCEEDED
        assert result.decision is not None
        assert "relevance" not in result.decision["context"]  # no falling back to words
        assert result.decision["context"]["left_out"] > 0
        kinds = {row["kind"] for row in self.errands(site, marker)}
        assert kinds == {JobKind.EMBEDDING.value}
        assert len(self.errands(site, marker)) == 26

    def test_a_last_turn_that_may_be_cut(self, site: Site) -> None:
        text = f"begin {'word ' * 3000} end"
        policy = {"context": {"policy": "middle_out", "cut_last_turn": True}}
        (result,) = site.run(
            chat_spec([{"role": "user", "content": text}], tier="narrow", policy=policy)
        )
        assert result.state is JobState.SUCCEEDED
        assert result.decision is not None
        assert result.decision["context"]["cut"] is True

    @staticmethod
    def errands(site: Site, marker: str) -> list[Any]:
        query = sa.text(
            "SELECT * FROM jobs WHERE metadata ? 'promptfleet' AND request::text LIKE :marker"
        )
        with site.database.connect() as connection:
            return list(connection.execute(query, {"marker": f"%{marker}%"}).mappings())


# The last one, since one worker is left after it.
def test_a_killed_workers_turn_is_added_once(site: Site, workers: list[Process]) -> None:
    memory_id = unique()
    slow = turn(memory_id, "[[sim:latency-ms=1500]] slow")
    after = turn(memory_id, "after")
    site.submit(slow)

    def holder() -> Any:
        return job_row(site.database, slow.id)["lease_owner"]

    eventually(lambda: site.provider.stats()["in_flight"], "it is being called")
    owner = eventually(holder, "a worker has it")
    site.submit(after)
    place = next(n for n, process in enumerate(workers) if str(process.pid) in str(owner))
    workers.pop(place).kill()

    first, second = site.results([slow.id, after.id])

    assert (first.state, second.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED)
    assert job_row(site.database, slow.id)["crashes"] == 1
    assert site.said(memory_id) == ["[[sim:latency-ms=1500]] slow", "after"]
