"""One call for equal prompts in flight anywhere: two workers' parts that share a Valkey."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis.asyncio
from tests.integration.test_pipeline import (
    DEADLINE_S,
    MakeRig,
    Rig,
    answer_all,
    good,
    hang,
    make_rig,
    refuse_to_connect,
)
from tests.rows import insert, job_row, ledger_rows, result_rows, spec

from promptfleet_shared.jobs import CacheMode, CacheOptions, JobSpec
from promptfleet_shared.store.status import database_clock, tier_summaries
from promptfleet_workers.caching.parts import Caching
from promptfleet_workers.caching.redis_cache import RedisCache
from promptfleet_workers.caching.single_flight import Flight
from promptfleet_workers.claims import Abort
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.telemetry import CacheUsed

__all__ = ["make_rig"]  # a fixture
NOBODY = "redis://127.0.0.1:1/0"


def caching(url: str, *, lease_s: float = 10.0, poll_s: float = 1.0) -> Callable[[Rig], Caching]:
    """What makes the parts of a cache that workers share."""

    def make(rig: Rig) -> Caching:
        cache = RedisCache(url, timeout_s=5, lease_s=lease_s)
        return Caching(cache, rig.fleet.cache, flight=Flight(cache, poll_s=poll_s))

    return make


class Pair:
    """Two workers, of which `leader` takes the first job and `loser` the others."""

    def __init__(self, make: MakeRig, url: str, **options: Any) -> None:
        self.leader: Rig = make(make_caching=caching(url, **options))
        self.loser: Rig = make(make_caching=caching(url, **options))
        self.rows = self.leader.rows
        self.go_on = asyncio.Event()

        async def slowly(call: Call) -> list[Answer]:
            await self.go_on.wait()
            return await answer_all(call)

        self.leader.provider.behaviour = slowly

    async def start(self, count: int = 3, **fields: Any) -> tuple[list[JobSpec], list[Any]]:
        """The leader calls for the first of equal jobs; the loser waits with the others."""
        jobs = [spec("same", **fields) for _ in range(count)]
        insert(self.rows, *jobs)
        waits = [self.leader.take(jobs[0].id)]
        await self.leader.calling()
        waits.append(self.loser.take(*(job.id for job in jobs[1:])))
        await until(lambda: flight(self.loser)._waiting)
        return jobs, waits

    async def settled(self, waits: Sequence[Any]) -> None:
        await self.leader.settled(waits[0])
        await self.loser.settled(waits[1])

    def results(self, jobs: Sequence[JobSpec]) -> list[Any]:
        return [result_rows(self.rows, job.id)[0] for job in jobs]

    @property
    def calls(self) -> int:
        return len(self.leader.provider.calls) + len(self.loser.provider.calls)


def flight(rig: Rig) -> Flight:
    assert rig.caching is not None
    assert rig.caching.flight is not None
    return rig.caching.flight


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def pair(make_rig: MakeRig, broker_url: str) -> Callable[..., Pair]:
    return lambda **options: Pair(make_rig, broker_url, **options)


async def test_one_call_answers_both_workers(pair: Callable[..., Pair]) -> None:
    both = pair(poll_s=600.0)  # so that only a message can bring the answer
    jobs, waits = await both.start(5)

    both.go_on.set()
    await both.settled(waits)

    rows = both.results(jobs)
    assert [row["text"] for row in rows] == ["fine"] * 5
    assert [row["cache"] for row in rows] == ["miss"] + ["coalesced"] * 4
    assert both.calls == 1
    assert rows[0]["saved_usd"] is None
    assert {row["saved_usd"] for row in rows[1:]} == {rows[0]["cost_usd"]}
    assert all(
        row["cost_usd"] == 0 and not ledger_rows(both.rows, row["job_id"]) for row in rows[1:]
    )
    assert rows[1]["decision"]["cache"]["waited_ms"] >= 0
    with both.rows.connect() as connection:
        since = database_clock(connection) - dt.timedelta(minutes=10)
        (summary,) = tier_summaries(connection, tenant="default", since=since)
    assert (summary.cached, summary.cache_saved_usd) == (4, 4 * rows[0]["cost_usd"])
    told = [event for event in both.loser.events if isinstance(event, CacheUsed)]
    assert sum(event.answers["coalesced"] for event in told) == 4
    assert sum(event.saved_usd for event in told) == pytest.approx(4 * float(rows[0]["cost_usd"]))


async def test_the_answer_is_asked_for_should_its_message_get_lost(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(self: RedisCache, ready: object, heard: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(RedisCache, "listen", deaf)
    both = pair(poll_s=0.05)
    jobs, waits = await both.start()

    both.go_on.set()
    await both.settled(waits)

    assert [row["cache"] for row in both.results(jobs)] == ["miss", "coalesced", "coalesced"]
    assert both.calls == 1


async def test_who_waits_holds_no_call_slot_and_no_lease(pair: Callable[..., Pair]) -> None:
    both = pair()
    _, waits = await both.start(7)
    caller = both.loser.caller

    assert caller._slots._value == 8
    assert not flight(both.loser)._led
    other = spec("another")
    insert(both.rows, other)
    await both.loser.settled(both.loser.take(other.id))
    assert both.results([other])[0]["cache"] == "miss"

    both.go_on.set()
    await both.settled(waits)


async def test_a_cancelled_leader_hands_the_call_on(pair: Callable[..., Pair]) -> None:
    both = pair(poll_s=600.0)
    jobs, waits = await both.start()

    both.leader.claims.abort(jobs[0].id, Abort.CANCELLED)
    await both.settled(waits)

    assert [row["cache"] for row in both.results(jobs[1:])] == ["miss", "coalesced"]
    assert both.leader.state(jobs[0].id) == "cancelled"
    assert len(both.loser.provider.calls) == 1


async def test_a_killed_leader_is_waited_for_no_longer_than_its_lease(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair(lease_s=0.5, poll_s=0.05)

    async def nothing(self: Flight) -> None:
        """As one that was killed does."""

    monkeypatch.setattr(Flight, "_renew", nothing)
    jobs, waits = await both.start()
    await both.loser.settled(waits[1])

    assert [row["cache"] for row in both.results(jobs[1:])] == ["miss", "coalesced"]
    assert len(both.loser.provider.calls) == 1
    both.go_on.set()
    await both.settled(waits)


async def test_a_call_that_is_longer_than_a_lease_is_waited_for(pair: Callable[..., Pair]) -> None:
    both = pair(lease_s=0.3, poll_s=0.05)
    jobs, waits = await both.start()

    begun = time.monotonic()
    await until(lambda: time.monotonic() - begun > 1.0)  # more than three leases
    assert both.calls == 1
    both.go_on.set()
    await both.settled(waits)

    assert [row["cache"] for row in both.results(jobs)] == ["miss", "coalesced", "coalesced"]


async def test_a_cancelled_waiter_leaves_its_place_to_the_next(pair: Callable[..., Pair]) -> None:
    both = pair()
    jobs, waits = await both.start()

    both.loser.claims.abort(jobs[1].id, Abort.CANCELLED)
    await until(lambda: both.loser.state(jobs[1].id) == "cancelled")
    assert both.calls == 1  # the next one waits as well

    both.go_on.set()
    await both.settled(waits)
    assert both.results([jobs[2]])[0]["cache"] == "coalesced"
    assert both.calls == 1


async def test_a_drain_gives_back_what_waits(pair: Callable[..., Pair]) -> None:
    both = pair()
    jobs, waits = await both.start()

    async with asyncio.timeout(DEADLINE_S):
        await both.loser.pipeline.drain(0.0)

    assert [both.loser.state(job.id) for job in jobs[1:]] == ["queued"] * 2
    assert [job_row(both.rows, job.id)["attempt"] for job in jobs[1:]] == [0, 0]
    await both.loser.settled(waits[1])
    assert both.calls == 1
    both.go_on.set()
    await both.leader.settled(waits[0])


async def test_a_drained_leader_frees_the_key_at_once(pair: Callable[..., Pair]) -> None:
    both = pair(poll_s=600.0)
    jobs, waits = await both.start()

    async with asyncio.timeout(DEADLINE_S):
        await both.leader.pipeline.drain(0.0)
    await both.loser.settled(waits[1])

    assert [row["cache"] for row in both.results(jobs[1:])] == ["miss", "coalesced"]


async def test_without_redis_everybody_calls(make_rig: MakeRig) -> None:
    rigs = [make_rig(make_caching=caching(NOBODY)) for _ in range(2)]
    jobs = [spec("same") for _ in rigs]
    insert(rigs[0].rows, *jobs)

    for rig, job in zip(rigs, jobs, strict=True):
        await rig.settled(rig.take(job.id))

    assert [len(rig.provider.calls) for rig in rigs] == [1, 1]
    rows = [result_rows(rigs[0].rows, job.id)[0] for job in jobs]
    assert [row["cache"] for row in rows] == ["miss", "miss"]


async def test_redis_lost_in_the_middle_frees_who_waits(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair(poll_s=0.05)
    jobs, waits = await both.start()

    async def refuse(keys: object, arguments: object) -> None:
        raise redis.asyncio.ConnectionError

    assert both.loser.caching is not None
    monkeypatch.setattr(both.loser.caching.cache, "_ask", refuse)
    await both.loser.settled(waits[1])

    assert [row["cache"] for row in both.results(jobs[1:])] == ["miss", "coalesced"]
    both.go_on.set()
    await both.settled(waits)


async def test_tenants_never_share(pair: Callable[..., Pair]) -> None:
    both = pair()
    mine, theirs = spec("same", tenant="a"), spec("same", tenant="b")
    insert(both.rows, mine, theirs)
    first = both.leader.take(mine.id)
    await both.leader.calling()

    await both.loser.settled(both.loser.take(theirs.id))

    assert both.results([theirs])[0]["cache"] == "miss"
    both.go_on.set()
    await both.leader.settled(first)


async def test_equal_jobs_right_after_an_answer_have_it_before_the_cache_does(
    make_rig: MakeRig,
    broker_url: str,
) -> None:
    """Between a call's end and the filled cache lie a transaction and a round trip."""
    rig = make_rig(make_caching=caching(broker_url))
    first, second = spec("same"), spec("same")
    insert(rig.rows, first, second)
    rig.database.may_return.set()
    assert rig.caching is not None
    may_fill = asyncio.Event()
    set_many = rig.caching.cache.set_many

    async def late(items: Any) -> None:
        await may_fill.wait()
        await set_many(items)

    rig.caching.cache.set_many = late  # type: ignore[method-assign]
    await rig.settled(rig.take(first.id))
    await rig.settled(rig.take(second.id))
    may_fill.set()

    assert [result_rows(rig.rows, j.id)[0]["cache"] for j in (first, second)] == [
        "miss",
        "coalesced",
    ]
    assert len(rig.provider.calls) == 1


class TestModes:
    async def test_only_takes_what_is_known_and_calls_nobody(
        self,
        make_rig: MakeRig,
        broker_url: str,
    ) -> None:
        rig = make_rig(make_caching=caching(broker_url))
        only = CacheOptions(mode=CacheMode.ONLY)
        early, first, later = spec("q", cache=only), spec("q"), spec("q", cache=only)
        insert(rig.rows, early, first, later)

        for job in (early, first, later):
            await rig.settled(rig.take(job.id))
            await rig.endings.drain()

        rows = [result_rows(rig.rows, job.id)[0] for job in (early, first, later)]
        assert [row["state"] for row in rows] == ["failed", "succeeded", "succeeded"]
        assert rows[0]["error"]["code"] == "cache_miss"
        assert [row["cache"] for row in rows] == ["miss", "miss", "hit"]
        assert rows[2]["saved_usd"] == rows[1]["cost_usd"] > 0
        assert rows[2]["decision"]["cache"]["age_s"] >= 0
        assert len(rig.provider.calls) == 1

    async def test_only_does_not_wait_for_a_call_that_is_under_way(
        self, pair: Callable[..., Pair]
    ) -> None:
        both = pair()
        _, waits = await both.start()

        for rig in (both.leader, both.loser):
            again = spec("same", cache=CacheOptions(mode=CacheMode.ONLY))
            insert(both.rows, again)
            await rig.settled(rig.take(again.id))
            assert both.results([again])[0]["error"]["code"] == "cache_miss"

        both.go_on.set()
        await both.settled(waits)

    async def test_a_cache_that_is_off_has_no_answer_for_only(self, make_rig: MakeRig) -> None:
        rig = make_rig(more="[cache]\nenabled = false\n")
        job = spec(cache=CacheOptions(mode=CacheMode.ONLY))
        insert(rig.rows, job)

        await rig.settled(rig.take(job.id))

        assert result_rows(rig.rows, job.id)[0]["error"]["code"] == "cache_miss"
        assert rig.provider.calls == []

    async def test_refresh_beside_a_hit_gets_an_answer_that_is_new(
        self,
        make_rig: MakeRig,
        broker_url: str,
    ) -> None:
        rig = make_rig(make_caching=caching(broker_url))
        first = spec("q")
        insert(rig.rows, first)
        await rig.settled(rig.take(first.id))
        await rig.endings.drain()

        async def anew(call: Call) -> list[Answer]:
            return [good("new") for _ in call.requests]

        rig.provider.behaviour = anew
        use, renew = spec("q"), spec("q", cache=CacheOptions(mode=CacheMode.REFRESH))
        insert(rig.rows, use, renew)
        await rig.settled(rig.take(use.id, renew.id))

        assert {use.id: "fine", renew.id: "new"} == {
            job.id: result_rows(rig.rows, job.id)[0]["text"] for job in (use, renew)
        }

    async def test_an_answer_of_a_second_deployment_is_the_models_own(
        self,
        make_rig: MakeRig,
        broker_url: str,
    ) -> None:
        rig = make_rig(make_caching=caching(broker_url))
        rig.provider.behaviour = refuse_to_connect
        jobs = [spec("q"), spec("q")]
        insert(rig.rows, *jobs)

        for job in jobs:
            await rig.settled(rig.take(job.id))
            await rig.endings.drain()

        rows = [result_rows(rig.rows, job.id)[0] for job in jobs]
        assert [(row["cache"], row["text"]) for row in rows] == [("miss", "fine"), ("hit", "fine")]


async def test_nothing_is_left_behind(pair: Callable[..., Pair], broker_url: str) -> None:
    both = pair()
    _, waits = await both.start()
    both.leader.provider.behaviour = hang
    refused = spec("other", cache=CacheOptions(ttl_s=30))
    insert(both.rows, refused)
    hanging = both.leader.take(refused.id)
    await both.leader.calling(2)
    both.leader.claims.abort(refused.id, Abort.CANCELLED)
    await both.leader.settled(hanging)
    both.go_on.set()
    await both.settled(waits)
    for rig in (both.leader, both.loser):
        await rig.endings.drain()
        assert not flight(rig)._led
        assert not flight(rig)._waiting
        assert not rig.endings._leaders
        assert not rig.endings._filling._fresh
        assert rig.slots.take(1000) == 8
    async with redis.asyncio.Redis.from_url(broker_url) as server:
        keys = await server.keys("promptfleet:cache:*")
        assert len(keys) == 1
        assert 3_500 < await server.ttl(keys[0]) <= 3_600
