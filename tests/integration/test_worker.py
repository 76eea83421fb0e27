"""A real worker process against a provider process, Postgres and Valkey."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
import sqlalchemy as sa
from celery import Celery
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.rows import job_row, ledger_rows, result_rows, spec
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey, free_port
from promptfleet_shared.jobs import (
    CacheMode,
    CacheOptions,
    Doorbell,
    JobKind,
    JobSpec,
    JobState,
    Result,
)
from promptfleet_shared.queueing import make_celery, publish
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.results import read_results, request_cancel
from promptfleet_shared.store.submissions import insert_jobs

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[retry]
retry_attempts = 2
retry_delay_ms = 20
[tiers.basic]
models = ["main"]
[tiers.spare]
models = ["broken", "main"]
[tiers.lists]
models = ["many"]
batch = {{ batch_window_ms = 100 }}
[tiers.streams]
models = ["streamed"]
[batch_service]
gather_s = 0.1
poll_s = 0.1
[tiers.batched]
models = ["batched"]
[tiers.hasty]
models = ["main"]
timeouts = {{ timeout_ms = 250 }}
retry = {{ retry_attempts = 1 }}
[tiers.narrow]
models = ["main"]
batch = {{ max_concurrent_calls = {narrow} }}
[models.main]
price_as = "openai/gpt-4o-mini"
deployments = [{{ base_url = "{url}" }}]
[models.batched]
price_as = "openai/gpt-4o-mini"
deployments = [{{ base_url = "{url}", batch_api = true }}]
[models.streamed]
deployments = [{{ base_url = "{url}", stream = true }}]
[models.broken]
deployments = [{{ base_url = "http://127.0.0.1:{closed}/v1" }}]
[models.many]
price_as = "free"
deployments = [{{ base_url = "{url}", prompts_per_request = 8 }}]
"""
SHARED_TIERS = ("basic", "spare", "lists", "streams", "hasty", "batched")
_numbers = itertools.count(1)


def unique(text: str) -> str:
    """A prompt that no other test asks."""
    return f"{text} {uuid.uuid4().hex}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where the workers of this module work, and how a test submits to them."""

    directory: Path
    database_url: str
    broker_url: str
    database: sa.Engine
    celery: Celery
    provider: Provider

    def submit(self, *specs: JobSpec, ring: bool = True) -> list[uuid.UUID]:
        with self.database.begin() as connection:
            ids = insert_jobs(connection, specs)
        if ring:
            self.ring(*specs)
        return ids

    def ring(self, *specs: JobSpec) -> None:
        publish(
            self.celery,
            [Doorbell(job_id=s.id, tier=s.tier, priority=s.priority) for s in specs],
        )

    def results(self, ids: Sequence[uuid.UUID], *, timeout_s: float = 20.0) -> list[Result]:
        """Their results, once all are there."""

        def all_there() -> list[Result] | None:
            with self.database.connect() as connection:
                found = read_results(connection, ids, tenant="default")
            return [found[job_id] for job_id in ids] if len(found) == len(ids) else None

        found = eventually(all_there, "all jobs are final", timeout_s=timeout_s)
        assert found is not None
        return found

    def count_results(self, ids: Sequence[uuid.UUID]) -> int:
        with self.database.connect() as connection:
            return len(read_results(connection, ids, tenant="default"))

    def run(self, *specs: JobSpec) -> list[Result]:
        return self.results(self.submit(*specs))

    def cancel(self, job_id: uuid.UUID) -> None:
        with self.database.begin() as connection:
            assert request_cancel(connection, [job_id], tenant="default") == {job_id}

    def state(self, job_id: uuid.UUID) -> str:
        return str(job_row(self.database, job_id)["state"])

    def worker(
        self, *tiers: str, narrow: int = 256, options: Sequence[str] = (), **settings: object
    ) -> Process:
        number = next(_numbers)
        config = self.directory / f"fleet-{number}.toml"
        config.write_text(
            FLEET.format(url=self.provider.base_url, closed=free_port(), narrow=narrow)
        )
        env = worker_environment(
            database_url=self.database_url,
            broker_url=self.broker_url,
            config=config,
            **settings,
        )
        log = self.directory / f"worker-{number}.log"
        return start_worker(tiers, *options, name=f"w{number}", env=env, log=log)


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    admin: sa.Engine,
    template: str,
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("workers")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE workers TEMPLATE {template}"))
    with redis.Redis.from_url(valkey.url) as connection:
        connection.flushall()
    url = sa.make_url(postgres.url).set(database="workers").render_as_string(hide_password=False)
    database = make_engine(url, application_name="tests")
    celery = make_celery(valkey.url, [*SHARED_TIERS, "narrow"])
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
        connection.execute(sa.text("DROP DATABASE workers WITH (FORCE)"))


@pytest.fixture(scope="module")
def worker(site: Site) -> Iterator[Process]:
    """One worker that the tests below share."""
    with site.worker(*SHARED_TIERS) as process:
        yield process
        assert process.running, process.output[-4000:]
        assert "Traceback" not in process.output


@pytest.fixture
def own_worker(site: Site) -> Iterator[Callable[..., Process]]:
    """Workers of a test's own, for the tier `narrow`."""
    started: list[Process] = []

    def start(**settings: Any) -> Process:
        started.append(site.worker("narrow", **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    with redis.Redis.from_url(site.broker_url) as connection:
        connection.flushall()


@pytest.mark.usefixtures("worker")
class TestAnswers:
    def test_a_chat_with_usage_and_cost(self, site: Site) -> None:
        text = unique("Why is the sea salty?")

        (result,) = site.run(spec(text, metadata={"run": "a"}))

        assert result.state is JobState.SUCCEEDED
        assert result.text is not None
        assert "salty" in result.text
        assert result.response["object"] == "chat.completion"
        assert result.finish_reason == "stop"
        assert (result.model, result.provider, result.deployment) == ("main", "openai", "main")
        assert result.usage.input == -(-len(text) // 4)
        assert result.usage.output == len(result.text.split())
        assert result.cost_usd is not None
        assert result.cost_usd > 0
        assert (result.attempts, result.calls, result.batch_size) == (1, 1, 1)
        assert result.provider_ms is not None
        assert 0 < result.provider_ms <= result.total_ms
        assert result.metadata == {"run": "a"}
        assert site.provider.calls_of(text) == 1
        (paid,) = ledger_rows(site.database, result.job_id)
        assert paid["cost_usd"] == result.cost_usd

    def test_many_at_once_end_each_once(self, site: Site) -> None:
        specs = [spec(unique(f"{n}")) for n in range(250)]

        results = site.run(*specs)

        assert {result.state for result in results} == {JobState.SUCCEEDED}
        assert max(result.batch_size for result in results) > 1
        assert sum(result.calls for result in results) == 250

    def test_a_job_is_done_though_nobody_rang(self, site: Site) -> None:
        """The sweeper sees that the queue is empty and rings."""
        job = spec(unique("silent"))
        site.submit(job, ring=False)
        with site.database.begin() as connection:
            old = "UPDATE jobs SET rung_at = rung_at - interval '6 seconds' WHERE id = :id"
            connection.execute(sa.text(old), {"id": job.id})

        (result,) = site.results([job.id])

        assert result.succeeded

    def test_useless_doorbells_do_no_harm(self, site: Site) -> None:
        job = spec(unique("once"))
        site.submit(job)
        for _ in range(20):
            site.ring(job, spec(unique("never inserted")))

        (result,) = site.results([job.id])

        assert (result.calls, result.attempts) == (1, 1)

    def test_completions_share_a_request(self, site: Site) -> None:
        before = site.provider.stats()["requests"].get("/v1/completions", 0)
        prompts = [unique(f"{n}") for n in range(16)]
        specs = [
            spec(tier="lists", kind=JobKind.COMPLETION, request=orjson.dumps({"prompt": prompt}))
            for prompt in prompts
        ]

        results = site.run(*specs)

        for result, prompt in zip(results, prompts, strict=True):
            assert result.text is not None
            assert prompt.split()[1] in result.text
            assert result.usage.input > 0
            assert result.cost_usd == 0
        requests = site.provider.stats()["requests"]["/v1/completions"] - before
        assert requests == sum(result.calls for result in results) == 2

    def test_embeddings(self, site: Site) -> None:
        specs = [
            spec(
                tier="lists",
                kind=JobKind.EMBEDDING,
                request=orjson.dumps({"input": unique(f"{n}")}),
            )
            for n in range(3)
        ]

        results = site.run(*specs)

        vectors = [result.response["data"][0]["embedding"] for result in results]
        assert {len(vector) for vector in vectors} == {len(vectors[0])}
        assert vectors[0] != vectors[1]
        assert [result.text for result in results] == [None] * 3

    def test_by_the_providers_batch_api(self, site: Site) -> None:
        later = {"service": "batch"}
        results = site.run(
            *[
                spec(unique(f"{n}"), tier="batched", policy=later, deadline_s=7200.0)
                for n in range(20)
            ]
        )

        assert {result.state for result in results} == {JobState.SUCCEEDED}
        assert all((r.decision or {})["service"]["way"] == "batch" for r in results)
        assert all(r.cost_usd == r.saved_usd for r in results)

    def test_a_text_that_postgres_can_not_hold(self, site: Site) -> None:
        (result,) = site.run(spec(unique(b"[[sim:text=a\\u0000b]]".decode("unicode_escape"))))

        assert result.succeeded
        assert result.text == "a\ufffdb"

    @pytest.mark.parametrize("marker", ["nul", "surrogate"])
    def test_an_answer_that_postgres_can_not_hold(self, site: Site, marker: str) -> None:
        (result,) = site.run(spec(unique(f"[[sim:{marker}]] odd")))

        assert result.succeeded
        assert "\ufffd" in (result.text or "")
        content = result.response["choices"][0]["message"]["content"]
        assert ("\0" if marker == "nul" else "\ud83d") in content


@pytest.mark.usefixtures("worker")
class TestFailures:
    def test_a_429_waits_as_told_and_burns_no_attempt(self, site: Site) -> None:
        text = unique("[[sim:status=429,retry-after-ms=400,times=2]] soon")

        (result,) = site.run(spec(text))

        assert result.succeeded
        assert (result.attempts, result.calls) == (1, 1)
        assert result.total_ms >= 800
        assert site.provider.calls_of(text) == 3
        row = job_row(site.database, result.job_id)
        assert (row["deferrals"], row["attempt"]) == (2, 1)
        assert row["last_error"]["code"] == "rate_limit_exceeded"

    def test_a_deferral_does_not_move_the_deadline(self, site: Site) -> None:
        job = spec(unique("[[sim:status=429,retry-after-ms=100]] never"), deadline_s=1.5)

        (result,) = site.run(job)

        assert result.state is JobState.EXPIRED
        assert 1000 < result.total_ms < 6000
        row = job_row(site.database, job.id)
        assert (row["deadline"] - row["created_at"]).total_seconds() == pytest.approx(1.5)
        assert row["deferrals"] > 1

    def test_a_passing_failure_is_retried(self, site: Site) -> None:
        text = unique("[[sim:status=500,times=2]] at last")

        (result,) = site.run(spec(text))

        assert result.succeeded
        assert (result.attempts, result.calls) == (3, 3)
        assert [row["calls"] for row in ledger_rows(site.database, result.job_id)] == [1, 1, 1]

    def test_a_lasting_failure_ends_after_its_attempts(self, site: Site) -> None:
        text = unique("[[sim:status=500]] never")

        (result,) = site.run(spec(text))

        assert result.state is JobState.FAILED
        assert result.error is not None
        assert result.error.status == 500
        assert site.provider.calls_of(text) == result.attempts == 3

    def test_a_bad_request_fails_at_once(self, site: Site) -> None:
        text = unique("[[sim:status=400]] no")

        (result,) = site.run(spec(text))

        assert result.state is JobState.FAILED
        assert result.error is not None
        assert result.error.status == 400
        assert (result.attempts, site.provider.calls_of(text)) == (1, 1)
        assert text not in str(result.error)

    @pytest.mark.parametrize("fault", ["disconnect", "truncate", "reset", "cut", "bad-utf8"])
    def test_a_broken_connection_is_retried(self, site: Site, fault: str) -> None:
        (result,) = site.run(spec(unique(f"[[sim:{fault},times=1]] again")))

        assert result.succeeded
        assert result.attempts == 2
        assert job_row(site.database, result.job_id)["unknown_calls"] == 1

    @pytest.mark.parametrize("fault", ["cut", "reset", "truncate", "error-event"])
    def test_a_stream_that_was_cut_is_no_answer(self, site: Site, fault: str) -> None:
        text = unique(f"[[sim:{fault},times=1]] again")

        (result,) = site.run(spec(text, tier="streams"))

        assert result.succeeded
        assert (result.attempts, site.provider.calls_of(text)) == (2, 2)
        assert "again" in (result.text or "")
        assert job_row(site.database, result.job_id)["unknown_calls"] == 1

    def test_a_call_that_takes_too_long_is_given_up(self, site: Site) -> None:
        text = unique("[[sim:hang]] never")

        (result,) = site.run(spec(text, tier="hasty"))

        assert result.state is JobState.FAILED
        assert result.error is not None
        assert result.error.code == "timeout"
        assert site.provider.calls_of(text) == result.attempts == 2
        assert job_row(site.database, result.job_id)["unknown_calls"] == 2

    def test_the_next_model_answers_for_a_broken_one(self, site: Site) -> None:
        (result,) = site.run(spec(unique("hello"), tier="spare"))

        assert result.succeeded
        assert (result.deployment, result.attempts) == ("main", 1)

    def test_the_next_models_answer_is_not_cached_as_the_firsts(self, site: Site) -> None:
        text = unique("twice")
        site.run(spec(text, tier="spare"))

        (again,) = site.run(spec(text, tier="spare"))

        assert again.cache == "miss"
        assert site.provider.calls_of(text) == 2

    @pytest.mark.parametrize("fields", [{"model": "unheard-of"}], ids=str)
    def test_a_job_without_a_route_fails(self, site: Site, fields: dict[str, Any]) -> None:
        (result,) = site.run(spec(unique("where to?"), **fields))

        assert result.state is JobState.FAILED
        assert result.error is not None
        assert result.error.code == "no_route"
        assert "unheard-of" in result.error.message

    def test_one_of_a_batch_fails_alone(self, site: Site) -> None:
        specs = [spec(unique(f"{n}")) for n in range(10)]
        specs[4] = spec(unique("[[sim:status=400]] no"))

        results = site.run(*specs)

        assert [r.state for r in results].count(JobState.SUCCEEDED) == 9
        assert results[4].state is JobState.FAILED

    def test_one_of_a_list_spoils_the_request_and_ends_alone(self, site: Site) -> None:
        """The others of a failed list are tried again."""
        prompts = [unique(f"{n}") for n in range(4)]
        prompts[2] = f"[[sim:status=500,times=1]] {prompts[2]}"
        specs = [
            spec(tier="lists", kind=JobKind.COMPLETION, request=orjson.dumps({"prompt": prompt}))
            for prompt in prompts
        ]

        assert {result.state for result in site.run(*specs)} == {JobState.SUCCEEDED}


@pytest.mark.usefixtures("worker")
class TestCache:
    def test_equal_prompts_in_flight_share_a_call(self, site: Site) -> None:
        text = unique("[[sim:latency-ms=300]] same")

        results = site.run(*[spec(text) for _ in range(12)])

        assert site.provider.calls_of(text) == 1
        assert len({result.text for result in results}) == 1
        assert sorted(result.cache for result in results) == ["coalesced"] * 11 + ["miss"]
        assert sum(result.calls for result in results) == 1
        assert [r.cost_usd == 0 for r in results].count(True) == 11

    def test_a_later_equal_prompt_costs_nothing(self, site: Site) -> None:
        text = unique("later")
        (first,) = site.run(spec(text))

        def is_hit() -> Result | None:
            """The cache is filled right after the result is written."""
            (again,) = site.run(spec(text))
            return again if again.cache == "hit" else None

        hit = eventually(is_hit, "the answer comes from the cache")
        assert hit is not None
        assert (hit.text, hit.response) == (first.text, first.response)
        assert hit.cost_usd == 0
        assert (hit.calls, hit.usage.input) == (0, 0)
        assert ledger_rows(site.database, hit.job_id) == []
        calls = site.provider.calls_of(text)
        for cache, status in [
            (CacheOptions(mode=CacheMode.OFF), "off"),
            (CacheOptions(mode=CacheMode.REFRESH), "miss"),
            (CacheOptions(namespace="elsewhere"), "miss"),
        ]:
            (result,) = site.run(spec(text, cache=cache))
            calls += 1
            assert (result.cache, result.calls) == (status, 1)
            assert site.provider.calls_of(text) == calls
        (stranger,) = site.submit(spec(text, tenant="acme"))
        eventually(lambda: site.state(stranger) == "succeeded", "the other tenant's job ends")
        assert site.provider.calls_of(text) == calls + 1

    def test_without_the_cache_equal_prompts_are_asked_each(self, site: Site) -> None:
        text = unique("off")
        off = CacheOptions(mode=CacheMode.OFF)

        results = site.run(*[spec(text, cache=off) for _ in range(3)])

        assert site.provider.calls_of(text) == 3
        assert [result.cache for result in results] == ["off"] * 3

    def test_failures_are_not_cached(self, site: Site) -> None:
        text = unique("[[sim:status=400,times=1]] then fine")
        (first,) = site.run(spec(text))

        (second,) = site.run(spec(text))

        assert (first.state, second.state) == (JobState.FAILED, JobState.SUCCEEDED)


@pytest.mark.usefixtures("worker")
class TestTime:
    def test_a_slow_job_does_not_hold_back_its_batch(self, site: Site) -> None:
        slow = spec(unique("[[sim:latency-ms=2500]] slow"))
        quick = [spec(unique(f"{n}")) for n in range(9)]
        site.submit(slow, *quick)

        results = site.results([job.id for job in quick])

        assert site.state(slow.id) == "running"
        (late,) = site.results([slow.id])
        assert late.batch_id in {result.batch_id for result in results}
        assert max(result.total_ms for result in results) < late.total_ms - 1000

    def test_cancelling_a_running_job_closes_its_call(self, site: Site) -> None:
        text = unique("[[sim:hang]] forever")
        (job_id,) = site.submit(spec(text))
        eventually(lambda: site.provider.calls_of(text) == 1, "the call begins")
        before = site.provider.stats()["client_disconnects"]

        site.cancel(job_id)

        (result,) = site.results([job_id])
        assert (result.state, result.error) == (JobState.CANCELLED, None)
        eventually(
            lambda: site.provider.stats()["client_disconnects"] > before, "the call is closed"
        )
        assert job_row(site.database, job_id)["unknown_calls"] == 1

    def test_cancelling_a_running_stream_closes_it(self, site: Site) -> None:
        text = unique("[[sim:stall]] it begins, and goes on for ever")
        (job_id,) = site.submit(spec(text, tier="streams"))
        eventually(lambda: site.provider.calls_of(text) == 1, "the call begins")
        before = site.provider.stats()["stream_disconnects"]

        site.cancel(job_id)

        (result,) = site.results([job_id])
        assert result.state is JobState.CANCELLED
        eventually(
            lambda: site.provider.stats()["stream_disconnects"] == before + 1, "it is closed"
        )
        assert job_row(site.database, job_id)["unknown_calls"] == 1

    def test_cancelling_a_job_that_waits_for_its_next_try(self, site: Site) -> None:
        text = unique("[[sim:status=429,retry-after-ms=60000]] much later")
        (job_id,) = site.submit(spec(text, deadline_s=600.0))
        eventually(lambda: job_row(site.database, job_id)["deferrals"] == 1, "it is deferred")

        site.cancel(job_id)

        assert site.results([job_id])[0].state is JobState.CANCELLED

    def test_a_running_job_expires_at_its_deadline(self, site: Site) -> None:
        job = spec(unique("[[sim:hang]] forever"), deadline_s=1.0)

        (result,) = site.run(job)

        assert result.state is JobState.EXPIRED
        assert 900 < result.total_ms < 4000

    def test_a_long_call_keeps_its_lease(self, site: Site) -> None:
        """The lease is two seconds here; heartbeats make it last."""
        text = unique("[[sim:latency-ms=3500]] long")

        (result,) = site.run(spec(text))

        assert result.succeeded
        assert (result.attempts, site.provider.calls_of(text)) == (1, 1)
        assert job_row(site.database, result.job_id)["crashes"] == 0


OwnWorker = Callable[..., Process]


def narrow(text: str, **fields: Any) -> JobSpec:
    return spec(unique(text), tier="narrow", **fields)


class TestLife:
    def test_urgent_jobs_go_first(self, site: Site, own_worker: OwnWorker) -> None:
        jobs = [narrow(f"[[sim:latency-ms=20]] {n}", priority=n % 2 * 9) for n in range(20)]
        for job in jobs:
            site.submit(job)  # a doorbell each

        own_worker(narrow=1)

        assert self._urgent_among_the_first(site, jobs) >= 9

    @staticmethod
    def _urgent_among_the_first(site: Site, jobs: Sequence[JobSpec]) -> int:
        """One may be passed by another that was taken by the margin of a slot."""
        results = site.results([job.id for job in jobs])
        order = sorted(range(len(jobs)), key=lambda n: results[n].finished_at)
        return sum(jobs[n].priority == 9 for n in order[: len(jobs) // 2])

    def test_a_busy_worker_leaves_work_to_an_idle_one(
        self, site: Site, own_worker: OwnWorker
    ) -> None:
        own_worker(narrow=2, worker_name="busy")
        blockers = [narrow("[[sim:hang]] blocks") for _ in range(2)]
        site.submit(*blockers)
        for job in blockers:
            eventually(lambda job=job: site.state(job.id) == "running", "the worker is busy")  # type: ignore[misc]
        own_worker(narrow=2, worker_name="idle")

        jobs = [narrow(f"{n}") for n in range(30)]
        ids = site.submit(*jobs)
        # All but the one that the busy worker may hold beyond its two calls.
        eventually(lambda: site.count_results(ids) >= len(ids) - 1, "the idle worker does them")

        assert [site.state(job.id) for job in blockers] == ["running"] * 2
        for job in blockers:
            site.cancel(job.id)
        site.results([*ids, *(job.id for job in blockers)])

    def test_sigterm_drains(self, site: Site, own_worker: OwnWorker) -> None:
        process = own_worker(narrow=2, drain_s=3)
        quick = narrow("[[sim:latency-ms=1500]] ends in time")
        stuck = narrow("[[sim:hang]] never ends")
        site.submit(quick, stuck)
        for job in (quick, stuck):
            eventually(lambda job=job: site.state(job.id) == "running", "both run")  # type: ignore[misc]
        waiting = [narrow(f"{n}") for n in range(20)]
        site.submit(*waiting)

        process.terminate()
        assert process.wait() == 0, process.output[-4000:]

        assert [row["state"] for row in result_rows(site.database, quick.id)] == ["succeeded"]
        row = job_row(site.database, stuck.id)
        assert (row["state"], row["attempt"], row["crashes"]) == ("queued", 0, 0)
        for job in waiting:
            row = job_row(site.database, job.id)
            assert (row["state"], row["attempt"]) == ("queued", 0)
        assert "Traceback" not in process.output

        own_worker()  # what was left is done by the next one, without waiting for a lease
        results = site.results([job.id for job in waiting])
        assert {result.attempts for result in results} == {1}
        site.cancel(stuck.id)
        site.results([stuck.id])

    def test_a_killed_workers_jobs_are_done_by_another(
        self, site: Site, own_worker: OwnWorker
    ) -> None:
        process = own_worker(lease_s=1)
        jobs = [narrow("[[sim:latency-ms=1500]] lost") for _ in range(5)]
        site.submit(*jobs)
        for job in jobs:
            eventually(lambda job=job: site.state(job.id) == "running", "all run")  # type: ignore[misc]

        process.kill()
        own_worker(lease_s=1)

        results = site.results([job.id for job in jobs])
        assert {result.state for result in results} == {JobState.SUCCEEDED}
        for job in jobs:
            row = job_row(site.database, job.id)
            assert (row["crashes"], row["unknown_calls"]) == (1, 1)

    def test_a_pool_that_can_not_wait_is_refused(self, site: Site) -> None:
        with pytest.raises(AssertionError, match="the pool must be threads, not"):
            site.worker("narrow", options=["--pool", "gevent"]).kill()
