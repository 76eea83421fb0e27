"""The pipeline in this process, with a real database and a provider that obeys the test.

What needs a process of its own is in test_worker; here are the moments that a process can't be
made to hit: a drain between a claim's commit and its return, a cancellation before a first step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import orjson
import pytest
import sqlalchemy as sa
from tests.rows import change, chat, insert, job_row, ledger_rows, result_rows, spec

from promptfleet_shared.errors import ProviderError, StoreRefusedError
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import Doorbell, JobKind, JobSpec, Usage
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.store.database import AsyncDatabase, Statement
from promptfleet_shared.store.results import request_cancel
from promptfleet_workers.batching import DoorbellWait, Slots
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.caching.memory import MemoryCache
from promptfleet_workers.caching.parts import Caching
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Abort, Claims
from promptfleet_workers.endings import Endings
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.routing import Router
from promptfleet_workers.telemetry import BatchClaimed, Event
from promptfleet_workers.token_streams import TokenStreams

T = TypeVar("T")
DEADLINE_S = 10.0
FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 1
max_concurrent_batches = {batches}
[retry]
retry_delay_ms = 1
[tiers.basic]
models = ["m"]
[models.m]
price_as = "openai/gpt-4o-mini"
deployments = [
  {{ name = "first", base_url = "http://first", prompts_per_request = 8 }},
  {{ name = "second", base_url = "http://second", prompts_per_request = 8 }},
]
"""
Behaviour = Callable[[Call], Awaitable[list[Answer]]]


def good(text: str = "fine") -> Completion:
    return Completion(
        text=text,
        response=orjson.dumps({"text": text}),
        finish_reason="stop",
        usage=Usage(input=10, output=5),
    )


async def answer_all(call: Call) -> list[Answer]:
    return [good() for _ in call.requests]


async def hang(call: Call) -> list[Answer]:
    await asyncio.Event().wait()
    raise AssertionError


async def refuse_to_connect(call: Call) -> list[Answer]:
    raise ProviderError("no", code="connect_error")


async def lose_the_connection(call: Call) -> list[Answer]:
    raise ProviderError("no", code="connection_lost", unknown_outcome=True)


class Provider:
    """Does what the test says, and counts."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = answer_all
        self.calls: list[Call] = []
        self.in_flight = self.cancelled = 0
        self.changed = asyncio.Event()

    async def call(self, call: Call) -> list[Answer]:
        self.calls.append(call)
        self.in_flight += 1
        self.changed.set()
        try:
            return await self.behaviour(call)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
            self.changed.set()

    async def aclose(self) -> None:
        pass


class HeldBack(AsyncDatabase):
    """Runs statements as usual, but may keep their results from the caller for a while."""

    def __init__(self, url: str) -> None:
        super().__init__(url, application_name="tests", pool_size=3)
        self.may_return = asyncio.Event()
        self.may_return.set()
        self.ran = asyncio.Event()
        self.refusal: StoreRefusedError | None = None

    async def run(self, statement: Statement[T]) -> T:
        if self.refusal is not None:
            raise self.refusal
        result = await super().run(statement)
        self.ran.set()
        await self.may_return.wait()
        return result


class Rig:
    """A worker's parts without Celery, heartbeat and sweeper."""

    def __init__(
        self,
        url: str,
        rows: sa.Engine,
        *,
        calls: int,
        batches: int,
        more: str = "",
        make_caching: Callable[[Rig], Caching] | None = None,
    ) -> None:
        """`more` goes into fleet.toml; without `make_caching` nothing is ever in the cache."""
        self.rows = rows
        self.fleet: Fleet = parse_fleet(FLEET.format(batches=batches) + more)
        self.database = HeldBack(url)
        deployments = [d for model in self.fleet.models.values() for d in model.deployments]
        self.providers = {deployment.name: Provider() for deployment in deployments}
        self.provider = self.providers["first"]
        self.slots, self.claims = Slots(calls), Claims()
        self.streams = TokenStreams("redis://127.0.0.1:1")  # no job here streams
        self.rung: list[Doorbell] = []
        self.events: list[Event] = []
        self.woken = asyncio.Event()
        self.breakers = Breakers.of(self.fleet, calls=calls, emit=self.events.append)
        self.router = Router(self.fleet, self.providers)
        self.caching = make_caching(self) if make_caching else None
        self.endings = Endings(
            database=self.database,
            fleet=self.fleet,
            cache=MemoryCache(),
            filling=self.caching.filling if self.caching else None,
            pricer=Pricer(),
            claims=self.claims,
            slots=self.slots,
            streams=self.streams,
            patience_s=5,
            ring=self.ring,
            announce=lambda _: None,
            wake_callbacks=self.woken.set,
            emit=self.events.append,
        )
        self.caller = Caller(
            database=self.database,
            fleet=self.fleet,
            breakers=self.breakers,
            claims=self.claims,
            endings=self.endings,
            streams=self.streams,
            calls=calls,
        )
        self.pipeline = Pipeline(
            database=self.database,
            fleet=self.fleet,
            router=self.router,
            cache=MemoryCache(),
            caching=self.caching,
            claims=self.claims,
            endings=self.endings,
            caller=self.caller,
            worker="rig",
            lease_s=30,
            ring=self.ring,
            emit=self.events.append,
        )

    def ring(self, doorbells: Iterable[Doorbell]) -> None:
        self.rung.extend(doorbells)

    def take(self, *ids: uuid.UUID) -> DoorbellWait:
        """As a Celery task does."""
        assert self.slots.take(len(ids)) == len(ids)
        wait = DoorbellWait(len(ids))
        self.pipeline.take("basic", ids, wait)
        return wait

    async def settled(self, wait: DoorbellWait) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wrap_future(wait.done)

    async def calling(self, count: int = 1) -> None:
        """Until so many calls have begun at the first deployment."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.provider.calls) < count:
                self.provider.changed.clear()
                await self.provider.changed.wait()

    def state(self, job_id: uuid.UUID) -> str:
        return str(job_row(self.rows, job_id)["state"])


def close_window(rig: Rig) -> None:
    """As if its time were over."""
    batcher = rig.pipeline._batcher
    batcher._start("basic", batcher._windows["basic"].clear())


@pytest.fixture
async def make_rig(database_url: str, database: sa.Engine) -> AsyncIterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*, calls: int = 8, batches: int = 8, **more: Any) -> Rig:
        rigs.append(Rig(database_url, database, calls=calls, batches=batches, **more))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.database.may_return.set()
        async with asyncio.timeout(DEADLINE_S):
            await rig.pipeline.drain(0.0)
        if rig.caching is not None:
            await rig.caching.aclose()
        await rig.database.close()


MakeRig = Callable[..., Rig]


async def test_a_job_from_doorbell_to_result(make_rig: MakeRig) -> None:
    rig = make_rig()
    job = spec()
    insert(rig.rows, job)

    await rig.settled(rig.take(job.id))

    (row,) = result_rows(rig.rows, job.id)
    assert (row["state"], row["text"], row["deployment"]) == ("succeeded", "fine", "first")
    assert row["cost_usd"] > 0
    assert row["cache"] == "miss"
    assert rig.claims.fences() == {}
    assert rig.slots.take(1000) == 8  # all are free again


async def test_who_delivers_callbacks_is_woken_for_jobs_that_have_one(make_rig: MakeRig) -> None:
    rig = make_rig()
    plain, calling_back = spec("a"), spec("b", callback_url="https://example.com/hook")
    insert(rig.rows, plain, calling_back)

    await rig.settled(rig.take(plain.id))
    assert not rig.woken.is_set()
    await rig.settled(rig.take(calling_back.id))
    assert rig.woken.is_set()


async def test_a_batch_whose_steps_crash_is_given_back(make_rig: MakeRig) -> None:
    rig = make_rig()

    async def crash(keys: Sequence[str]) -> list[bytes | None]:
        raise ZeroDivisionError

    rig.pipeline._look_up._cache.get_many = crash  # type: ignore[method-assign]
    job = spec()
    insert(rig.rows, job)
    await rig.settled(rig.take(job.id))

    assert rig.state(job.id) == "queued"
    assert rig.claims.fences() == {}
    assert rig.slots.take(1000) == 8


async def test_a_stale_doorbell_is_settled(make_rig: MakeRig) -> None:
    rig = make_rig()

    await rig.settled(rig.take(uuid.uuid4()))

    assert rig.provider.calls == []


class TestDrain:
    async def test_a_claim_that_is_under_way_is_given_back(self, make_rig: MakeRig) -> None:
        """Its commit stands, but its answer is not here yet: no lease may be left behind."""
        rig = make_rig()
        job = spec()
        insert(rig.rows, job)
        rig.database.may_return.clear()
        wait = rig.take(job.id)
        async with asyncio.timeout(DEADLINE_S):
            await rig.database.ran.wait()
        assert rig.state(job.id) == "running"

        drained = asyncio.create_task(rig.pipeline.drain(5.0))
        await asyncio.wait([drained], timeout=0.3)  # long enough for one that does not wait
        assert not drained.done()
        rig.database.may_return.set()
        async with asyncio.timeout(DEADLINE_S):
            await drained

        assert rig.state(job.id) == "queued"
        assert job_row(rig.rows, job.id)["attempt"] == 0
        assert rig.provider.calls == []
        assert wait.done.done()

    async def test_what_waits_for_a_batchs_turn_is_not_claimed(self, make_rig: MakeRig) -> None:
        rig = make_rig(calls=1, batches=1)
        rig.provider.behaviour = hang
        running, claimed, waiting = jobs = [spec(f"{n}") for n in range(3)]
        insert(rig.rows, *jobs)
        # Three batches: one calls, one is claimed and waits for a call's end, one for its turn.
        waits = [rig.take(running.id)]
        await rig.calling()
        rig.slots = rig.endings._slots = Slots(100)
        for job in (claimed, waiting):
            waits.append(rig.take(job.id))
            close_window(rig)
            async with asyncio.timeout(DEADLINE_S):
                while not rig.pipeline._batcher._running:
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(DEADLINE_S):
            while rig.state(claimed.id) != "running":
                await asyncio.sleep(0.001)

        async with asyncio.timeout(DEADLINE_S):
            await rig.pipeline.drain(0.05)

        for job in jobs:
            row = job_row(rig.rows, job.id)
            assert (row["state"], row["attempt"]) == ("queued", 0)
        assert job_row(rig.rows, waiting.id)["fence"] == 0
        assert all(wait.done.done() for wait in waits)
        assert {bell.job_id for bell in rig.rung} >= {waiting.id}
        assert (len(rig.provider.calls), rig.provider.cancelled) == (1, 1)

    async def test_what_ends_in_time_is_not_given_back(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        go_on = asyncio.Event()

        async def slowly(call: Call) -> list[Answer]:
            await go_on.wait()
            return await answer_all(call)

        rig.provider.behaviour = slowly
        job = spec()
        insert(rig.rows, job)
        rig.take(job.id)
        await rig.calling()

        drained = asyncio.create_task(rig.pipeline.drain(5.0))
        await asyncio.sleep(0)
        go_on.set()
        async with asyncio.timeout(DEADLINE_S):
            await drained

        assert rig.state(job.id) == "succeeded"

    async def test_what_comes_late_is_handed_on(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        job = spec()
        insert(rig.rows, job)
        await rig.pipeline.drain(0.0)

        await rig.settled(rig.take(job.id))

        assert [bell.job_id for bell in rig.rung] == [job.id]
        assert job_row(rig.rows, job.id)["fence"] == 0


class TestAbort:
    async def test_before_the_calls_first_step(self, make_rig: MakeRig) -> None:
        """A task that is cancelled before it starts runs not even its `finally`."""
        rig = make_rig(calls=1)
        job, next_one = spec("a"), spec("b")
        insert(rig.rows, job, next_one)
        start = rig.caller.start

        async def start_and_abort(works: list[object]) -> None:
            await start(works)  # type: ignore[arg-type]
            rig.claims.abort(job.id, Abort.CANCELLED)

        rig.caller.start = start_and_abort  # type: ignore[method-assign, assignment]
        wait = rig.take(job.id)
        await rig.settled(wait)

        assert rig.state(job.id) == "cancelled"
        assert rig.provider.calls == []
        rig.caller.start = start  # type: ignore[method-assign]
        await rig.settled(rig.take(next_one.id))  # the only slot is free again
        assert rig.state(next_one.id) == "succeeded"

    async def test_a_cancelled_call_is_closed(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = hang
        job = spec()
        insert(rig.rows, job)
        wait = rig.take(job.id)
        await rig.calling()

        rig.claims.abort(job.id, Abort.CANCELLED)
        await rig.settled(wait)

        (row,) = result_rows(rig.rows, job.id)
        assert (row["state"], row["calls"], row["error"]) == ("cancelled", 1, None)
        assert rig.provider.cancelled == 1
        assert [paid["unknown_calls"] for paid in ledger_rows(rig.rows, job.id)] == [1]

    async def test_a_fenced_job_writes_nothing(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = hang
        job = spec()
        insert(rig.rows, job)
        wait = rig.take(job.id)
        await rig.calling()
        before = job_row(rig.rows, job.id)

        rig.claims.abort(job.id, Abort.FENCED)
        await rig.settled(wait)

        assert job_row(rig.rows, job.id) == before
        assert rig.claims.fences() == {}

    async def test_a_shared_request_goes_on_for_the_others(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        go_on = asyncio.Event()

        async def slowly(call: Call) -> list[Answer]:
            await go_on.wait()
            return await answer_all(call)

        rig.provider.behaviour = slowly
        mine, cancelled = jobs = [completion(f"{n}") for n in range(2)]
        insert(rig.rows, *jobs)
        wait = rig.take(*(job.id for job in jobs))
        await rig.calling()
        assert len(rig.provider.calls[0].requests) == 2

        rig.claims.abort(cancelled.id, Abort.CANCELLED)
        go_on.set()
        await rig.settled(wait)

        assert rig.provider.cancelled == 0
        assert rig.state(mine.id) == "succeeded"

    async def test_all_of_a_shared_request(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = hang
        jobs = [completion(f"{n}") for n in range(3)]
        insert(rig.rows, *jobs)
        wait = rig.take(*(job.id for job in jobs))
        await rig.calling()

        for job in jobs:
            rig.claims.abort(job.id, Abort.CANCELLED)
        await rig.settled(wait)

        assert {rig.state(job.id) for job in jobs} == {"cancelled"}
        assert rig.provider.cancelled == 1


def completion(prompt: str) -> JobSpec:
    return spec(kind=JobKind.COMPLETION, request=orjson.dumps({"max_tokens": 5, "prompt": prompt}))


class TestCoalescing:
    async def test_equal_jobs_share_a_call(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        go_on = asyncio.Event()

        async def slowly(call: Call) -> list[Answer]:
            await go_on.wait()
            return await answer_all(call)

        rig.provider.behaviour = slowly
        jobs = [spec("same") for _ in range(5)]
        insert(rig.rows, *jobs)
        first = rig.take(*(job.id for job in jobs[:3]))
        await rig.calling()
        second = rig.take(*(job.id for job in jobs[3:]))
        async with asyncio.timeout(DEADLINE_S):
            while len(rig.claims.fences()) < 5:
                await asyncio.sleep(0.001)

        go_on.set()
        await rig.settled(first)
        await rig.settled(second)

        rows = [result_rows(rig.rows, job.id)[0] for job in jobs]
        assert [row["text"] for row in rows] == ["fine"] * 5
        assert sorted(row["cache"] for row in rows) == ["coalesced"] * 4 + ["miss"]
        assert sum(row["calls"] for row in rows) == 1
        assert sorted(row["cost_usd"] > 0 for row in rows) == [False] * 4 + [True]
        assert len(rig.provider.calls) == 1

    @pytest.mark.parametrize("reason", list(Abort))
    async def test_an_heir_takes_over_from_an_aborted_leader(
        self, make_rig: MakeRig, reason: Abort
    ) -> None:
        rig = make_rig()

        async def first_hangs(call: Call) -> list[Answer]:
            return await (hang if len(rig.provider.calls) == 1 else answer_all)(call)

        rig.provider.behaviour = first_hangs
        leader, *followers = jobs = [spec("same") for _ in range(3)]
        insert(rig.rows, *jobs)
        waits = [rig.take(leader.id)]
        await rig.calling()
        waits.append(rig.take(*(job.id for job in followers)))
        async with asyncio.timeout(DEADLINE_S):
            while len(rig.claims.fences()) < 3:
                await asyncio.sleep(0.001)

        rig.claims.abort(leader.id, reason)
        for wait in waits:
            await rig.settled(wait)

        assert [rig.state(job.id) for job in followers] == ["succeeded"] * 2
        assert len(rig.provider.calls) == 2

    async def test_a_final_refusal_holds_for_all_and_a_passing_one_for_the_leader_only(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()

        async def refuse(call: Call) -> list[Answer]:
            raise ProviderError("no", code="invalid_prompt", status=400)

        rig.provider.behaviour = refuse
        jobs = [spec("same") for _ in range(3)]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*(job.id for job in jobs)))

        assert {rig.state(job.id) for job in jobs} == {"failed"}
        assert len(rig.provider.calls) == 1


class TestCalls:
    async def test_in_a_list_each_prompt_has_its_own_end(self, make_rig: MakeRig) -> None:
        rig = make_rig()

        async def second_fails(call: Call) -> list[Answer]:
            answers: list[Answer] = [good(f"{n}") for n in range(len(call.requests))]
            answers[1] = ProviderError("no", code="content_filter")
            return answers

        rig.provider.behaviour = second_fails
        jobs = [completion(f"{n}") for n in range(4)]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*(job.id for job in jobs)))

        assert sorted(rig.state(job.id) for job in jobs) == ["failed", *["succeeded"] * 3]
        rows = [result_rows(rig.rows, job.id)[0] for job in jobs]
        assert sum(row["calls"] for row in rows) == 1

    async def test_a_bug_in_a_provider_fails_its_jobs(self, make_rig: MakeRig) -> None:
        rig = make_rig()

        async def crash(call: Call) -> list[Answer]:
            raise ZeroDivisionError("a secret prompt")

        rig.provider.behaviour = crash
        job = spec()
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        (row,) = result_rows(rig.rows, job.id)
        assert (row["state"], row["error"]["code"]) == ("failed", "internal")
        assert "secret" not in row["error"]["message"]

    async def test_the_next_deployment_is_asked_only_within_the_deadline(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()

        async def refuse_at_the_deadline(call: Call) -> list[Answer]:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            raise ProviderError("no", code="connect_error")

        rig.provider.behaviour = refuse_at_the_deadline
        job = spec(deadline_s=0.2)
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        (row,) = result_rows(rig.rows, job.id)
        assert row["state"] == "expired"
        assert rig.providers["second"].calls == []
        assert row["calls"] == 1

    async def test_one_with_an_outcome_that_can_not_be_written_does_not_take_others_along(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()

        async def odd(call: Call) -> list[Answer]:
            if "odd" in call.requests[0]:
                return [Completion(text="x", response=b"no json", finish_reason="stop")]
            return await answer_all(call)

        rig.provider.behaviour = odd
        jobs = [spec("odd"), spec("plain"), spec("another")]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*(job.id for job in jobs)))

        assert [rig.state(job.id) for job in jobs] == ["failed", "succeeded", "succeeded"]
        (row,) = result_rows(rig.rows, jobs[0].id)
        assert (row["error"]["code"], row["response"], row["calls"]) == ("bad_response", None, 1)
        assert rig.claims.fences() == {}

    async def test_a_refusal_that_is_not_about_the_answer_does_not_cost_the_answer(
        self, make_rig: MakeRig
    ) -> None:
        """The lease lapses, and the job runs again: it must not end as if the answer were bad."""
        rig = make_rig()

        async def answer_and_break(call: Call) -> list[Answer]:
            rig.database.refusal = StoreRefusedError(sqlstate="42P01")
            return await answer_all(call)

        rig.provider.behaviour = answer_and_break
        job = spec()
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        assert rig.state(job.id) == "running"
        assert result_rows(rig.rows, job.id) == []

    async def test_a_response_that_is_not_utf8_does_not_take_others_along(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()

        async def odd(call: Call) -> list[Answer]:
            if "odd" in call.requests[0]:
                return [Completion(text="x", response=b'"\xff"', finish_reason="stop")]
            return await answer_all(call)

        rig.provider.behaviour = odd
        jobs = [spec("odd"), spec("plain")]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*(job.id for job in jobs)))

        assert [rig.state(job.id) for job in jobs] == ["failed", "succeeded"]
        assert rig.claims.fences() == {}


class TestFreshness:
    """After a pause of this process, or while the database is away, nothing is called blindly."""

    async def test_a_claim_that_nobody_confirmed_lately_waits_for_a_heartbeat(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig(calls=1)
        rig.provider.behaviour = hang
        first, second = jobs = [spec(f"{n}") for n in range(2)]
        insert(rig.rows, *jobs)
        rig.take(first.id)
        await rig.calling()
        rig.caller._claims = rig.claims = stale = Stale(rig.claims)
        rig.provider.behaviour = answer_all
        rig.slots = rig.endings._slots = Slots(100)
        waits = [rig.take(second.id)]
        async with asyncio.timeout(DEADLINE_S):
            while second.id not in rig.claims.fences():
                await asyncio.sleep(0.001)

        rig.claims.abort(first.id, Abort.DRAINED)  # its place is the second one's
        async with asyncio.timeout(DEADLINE_S):
            await stale.waited.wait()
        assert len(rig.provider.calls) == 1

        stale.confirm(time.monotonic())
        await rig.settled(waits[0])
        assert rig.state(second.id) == "succeeded"

    async def test_what_the_heartbeat_finds_lost_is_never_called(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.pipeline._claims = rig.caller._claims = rig.endings._claims = stale = Stale(rig.claims)
        job = spec()
        insert(rig.rows, job)
        wait = rig.take(job.id)
        async with asyncio.timeout(DEADLINE_S):
            await stale.waited.wait()

        stale.abort(job.id, Abort.FENCED)
        stale.confirm(time.monotonic())
        await rig.settled(wait)

        assert rig.provider.calls == []
        assert rig.state(job.id) == "running"  # whoever has it now decides


class Stale(Claims):
    """Claims as they look after a long pause; `waited` tells that somebody asked."""

    def __init__(self, claims: Claims) -> None:
        vars(self).update(vars(claims))
        self.waited = asyncio.Event()

    def is_fresh(self, claimed_at: float) -> bool:
        return super().is_fresh(claimed_at - 3600)

    async def confirmation(self) -> None:
        self.waited.set()
        await super().confirmation()


class TestSpending:
    async def test_no_more_calls_than_a_job_may_cost(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        job = spec()
        insert(rig.rows, job)
        change(rig.rows, job.id, calls="8")

        await rig.settled(rig.take(job.id))

        (row,) = result_rows(rig.rows, job.id)
        assert (row["state"], row["error"]["code"]) == ("failed", "max_calls")
        assert rig.provider.calls == []

    async def test_the_last_call_that_it_may_cost_is_not_made_twice(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()
        rig.provider.behaviour = refuse_to_connect
        job = spec()
        insert(rig.rows, job)
        change(rig.rows, job.id, calls="7", attempt="3")

        await rig.settled(rig.take(job.id))

        assert (len(rig.provider.calls), len(rig.providers["second"].calls)) == (1, 0)
        assert rig.state(job.id) == "failed"

    async def test_a_second_call_is_written_down_before_it_is_made(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = refuse_to_connect
        rig.providers["second"].behaviour = hang
        job = spec()
        insert(rig.rows, job)
        rig.take(job.id)
        second = rig.providers["second"]
        async with asyncio.timeout(DEADLINE_S):
            while not second.calls:
                second.changed.clear()
                await second.changed.wait()

        assert job_row(rig.rows, job.id)["claim_calls"] == 2

    async def test_a_second_call_is_not_made_for_a_job_that_was_lost(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()
        job = spec()

        async def lose_it(call: Call) -> list[Answer]:
            change(rig.rows, job.id, fence="fence + 1")
            return await refuse_to_connect(call)

        rig.provider.behaviour = lose_it
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        assert rig.providers["second"].calls == []
        assert rig.claims.fences() == {}

    async def test_a_second_call_is_not_made_for_a_job_that_was_cancelled(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()
        job = spec()

        async def cancel_it(call: Call) -> list[Answer]:
            change(rig.rows, job.id, cancel_requested="true")
            return await refuse_to_connect(call)

        rig.provider.behaviour = cancel_it
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        assert rig.providers["second"].calls == []
        assert rig.state(job.id) == "cancelled"


class TestBreakers:
    async def test_failures_leave_the_deployment_alone_and_the_next_is_asked(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig(calls=30)

        async def fail(call: Call) -> list[Answer]:
            raise ProviderError("no", code="http_500", status=500)

        rig.provider.behaviour = fail
        jobs = [spec(f"{n}") for n in range(20)]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*(job.id for job in jobs)))
        (first, _) = rig.breakers.snapshot()
        assert (first.state, first.in_flight) == ("open", 0)

        late = spec("late")
        insert(rig.rows, late)
        await rig.settled(rig.take(late.id))

        (row,) = result_rows(rig.rows, late.id)
        assert (row["state"], row["deployment"], row["calls"]) == ("succeeded", "second", 1)
        assert len(rig.provider.calls) == 20

    async def test_a_jobs_own_deadline_says_nothing_about_the_deployment(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig(calls=30)
        rig.provider.behaviour = hang
        jobs = [spec(f"{n}", deadline_s=0.3) for n in range(25)]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*(job.id for job in jobs)))

        assert {rig.state(job.id) for job in jobs} == {"expired"}
        (first, _) = rig.breakers.snapshot()
        assert (first.state, first.in_flight) == ("closed", 0)

    async def test_a_key_that_is_used_up_is_called_once_and_its_job_waits(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig(calls=1)

        async def used_up(call: Call) -> list[Answer]:
            raise ProviderError("no", code="insufficient_quota", status=429)

        for provider in rig.providers.values():
            provider.behaviour = used_up
        jobs = [spec(f"{n}", deadline_s=3600) for n in range(2)]
        insert(rig.rows, *jobs)
        for job in jobs:
            await rig.settled(rig.take(job.id))

        assert [len(provider.calls) for provider in rig.providers.values()] == [1, 1]
        rows = [job_row(rig.rows, job.id) for job in jobs]
        assert [(row["state"], row["attempt"], row["calls"]) for row in rows] == [
            ("queued", 0, 0)
        ] * 2
        assert [row["last_error"]["code"] for row in rows] == ["insufficient_quota", "key_stopped"]


class TestSuspects:
    """Jobs whose next lost worker would be taken for their doing."""

    async def test_a_worker_has_one_of_them_at_a_time(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = hang
        innocent, *suspects = jobs = [spec(f"{n}") for n in range(4)]
        insert(rig.rows, *jobs)
        for job in suspects:
            change(rig.rows, job.id, crashes="2")

        rig.take(*(job.id for job in jobs))
        await rig.calling(2)

        assert sorted(rig.state(job.id) for job in suspects) == ["queued", "queued", "running"]
        assert rig.state(innocent.id) == "running"
        given_back = [job for job in suspects if rig.state(job.id) == "queued"]
        assert [job_row(rig.rows, job.id)["attempt"] for job in given_back] == [0, 0]

    async def test_the_next_one_follows_when_it_has_ended(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        first, second = jobs = [spec(f"{n}") for n in range(2)]
        insert(rig.rows, *jobs)
        for job in jobs:
            change(rig.rows, job.id, crashes="2")

        for job in jobs:
            await rig.settled(rig.take(job.id))

        assert [rig.state(first.id), rig.state(second.id)] == ["succeeded"] * 2


class TestUnknownOutcomes:
    async def test_by_default_the_job_is_tried_again(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = lose_the_connection
        job = spec()
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        row = job_row(rig.rows, job.id)
        assert (row["state"], row["calls"], row["unknown_calls"]) == ("queued", 1, 1)

    async def test_a_job_that_must_not_be_called_twice_fails(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = lose_the_connection
        job = spec()
        insert(rig.rows, job)
        change(rig.rows, job.id, on_unknown="'fail'")
        await rig.settled(rig.take(job.id))

        (row,) = result_rows(rig.rows, job.id)
        assert (row["state"], row["error"]["code"]) == ("failed", "unknown_outcome")
        assert job_row(rig.rows, job.id)["unknown_calls"] == 1

    async def test_its_call_is_written_down_before_it_is_made(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        rig.provider.behaviour = hang
        job, other = spec("a"), spec("b")
        insert(rig.rows, job, other)
        change(rig.rows, job.id, on_unknown="'fail'")
        rig.take(job.id, other.id)
        await rig.calling(2)

        assert [job_row(rig.rows, j.id)["claim_calls"] for j in (job, other)] == [1, 1]

    async def test_a_drain_in_mid_call_fails_it_and_gives_others_back(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig()
        rig.provider.behaviour = hang
        job, other = spec("a"), spec("b")
        insert(rig.rows, job, other)
        change(rig.rows, job.id, on_unknown="'fail'")
        rig.take(job.id, other.id)
        await rig.calling(2)

        async with asyncio.timeout(DEADLINE_S):
            await rig.pipeline.drain(0.0)

        assert [rig.state(job.id), rig.state(other.id)] == ["failed", "queued"]
        (row,) = result_rows(rig.rows, job.id)
        assert row["error"]["code"] == "unknown_outcome"
        assert job_row(rig.rows, other.id)["unknown_calls"] == 1


async def test_a_cancelled_job_is_not_claimed(make_rig: MakeRig) -> None:
    rig = make_rig()
    job = spec(request=chat("x"))
    insert(rig.rows, job)
    with rig.rows.begin() as connection:
        request_cancel(connection, [job.id], tenant="default")

    await rig.settled(rig.take(job.id))

    assert rig.provider.calls == []
    assert rig.state(job.id) == "cancelled"


async def test_a_claim_that_the_database_does_not_take_is_told(make_rig: MakeRig) -> None:
    rig = make_rig()
    (job_id,) = insert(rig.rows, spec())
    with rig.rows.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs RENAME COLUMN fence TO fences"))

    await rig.settled(rig.take(job_id))

    assert rig.events == [BatchClaimed(tier="basic", rung=1, claimed=0, answered=False)]
