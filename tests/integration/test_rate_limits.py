"""The fleet's limits in a real Valkey: the script by the test's own clock, then many workers."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import heapq
import importlib.resources
import itertools
import random
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.processes import Process
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.fleet import parse_fleet
from promptfleet_workers.rate_limits.asking import Grant, News, Reservation, Verdict, unused
from promptfleet_workers.rate_limits.costs import Costs
from promptfleet_workers.rate_limits.exchange import PREFIX, FleetLimits, _Question
from promptfleet_workers.rate_limits.keys import KeyBook, LimitKey
from promptfleet_workers.rate_limits.local import LocalLimits

PROGRAM = Path(__file__).with_name("limit_worker.py")
MINUTE_US = 60_000_000
DAY_US = 86_400_000_000
HEADROOM = 0.02
PATIENCE_US = 1_000_000
HEALTH = LimitKey(name="d:health", label="d/pause", kind="health")


def rate(name: str, limit: float | None, *, health: str | None = None) -> LimitKey:
    return LimitKey(
        name=name, label=name, kind="rate", limit=limit, period_us=MINUTE_US, health=health
    )


def a_day(name: str, limit: float) -> LimitKey:
    return LimitKey(name=name, label=name, kind="window", limit=limit, period_us=DAY_US)


def permits(limit: int | None, *, adaptive: bool = False) -> LimitKey:
    return LimitKey(
        name="d:permits",
        label="d/permits",
        kind="permits",
        limit=limit,
        health=HEALTH.name if adaptive else None,
        adaptive=adaptive,
    )


class Clocked:
    """The script, with a clock that the test sets; microseconds."""

    def __init__(self, url: str) -> None:
        files = importlib.resources.files("promptfleet_workers.rate_limits")
        text = files.joinpath("reserve.lua").read_text("utf-8")
        assert text.count("redis.call('TIME')") == 1
        self.server = redis.Redis.from_url(url)
        text = text.replace("redis.call('TIME')", "cjson.decode(ARGV[2])")
        self._script = self.server.register_script(text)
        self.now = 1_790_000_000_123_456
        self._terms = {
            "worker": "w",
            "patience": PATIENCE_US,
            "headroom": HEADROOM,
            "lease": 20_000_000,
            "longest": 600_000_000,
            "unsure": 5_000_000,
        }

    def ask(
        self, *calls: Reservation, news: News | None = None, worker: str = "w"
    ) -> list[tuple[Verdict, int]]:
        """Verdict and wait of each."""
        question = _Question({**self._terms, "worker": worker})
        for call in calls:
            question.add(call)
        question.add_news(news or News(), {})
        time = f"[{self.now // 1_000_000},{self.now % 1_000_000}]"
        reply: Any = self._script(keys=question.redis_keys, args=[question.json(), time])
        return [(Verdict(reply[n]), reply[n + 1]) for n in range(2, len(reply), 3)]

    def one(self, *items: tuple[LimitKey, float], turn: int = 0) -> tuple[Verdict, int]:
        (answer,) = self.ask(Reservation(id=uuid.uuid4().hex, items=items, turn=turn))
        return answer


@pytest.fixture
def clocked(broker_url: str) -> Iterator[Clocked]:
    made = Clocked(broker_url)
    yield made
    made.server.close()


@dataclasses.dataclass
class Model:
    """GCRA as simply as it can be said: when each key's next call is due."""

    limits: dict[str, float]
    due: dict[str, float] = dataclasses.field(default_factory=dict)

    def unit(self, name: str) -> float:
        return MINUTE_US * (1 + HEADROOM) / self.limits[name]

    def at(self, name: str, now: float) -> float:
        return max(self.due.get(name, 0.0), now - MINUTE_US * HEADROOM / 4)

    def round(self) -> None:
        """Only whole microseconds are kept."""
        self.due = {name: round(at) for name, at in self.due.items()}

    def ask(self, costs: dict[str, float], now: float) -> float | None:
        start = max([now, *(self.at(name, now) for name in costs)])
        if start - now > PATIENCE_US:
            return None
        for name, cost in costs.items():
            at = self.at(name, now)
            self.due[name] = at + min(cost, self.limits[name]) * self.unit(name)
        return start - now


STEPS = st.lists(
    st.tuples(
        st.integers(0, 3_000_000),  # microseconds since the step before
        st.integers(1, 3),  # calls at once
        st.floats(1, 400),  # tokens expected
        st.floats(-300, 300),  # more or fewer of them than expected
    ),
    min_size=1,
    max_size=40,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_the_script_decides_as_the_model_does(
    clocked: Clocked, steps: list[tuple[int, int, float, float]]
) -> None:
    space = uuid.uuid4().hex
    keys = {"r": rate(f"{space}:r", 60), "t": rate(f"{space}:t", 10_000)}
    model = Model({"r": 60, "t": 10_000})
    for passed, calls, tokens, difference in steps:
        clocked.now += passed
        costs = {"r": 1.0, "t": tokens}
        items = [(keys[name], cost) for name, cost in costs.items()]
        asked = [Reservation(id=str(n), items=items, turn=2) for n in range(calls)]
        let_through = 0
        for verdict, wait in clocked.ask(*asked):
            expected = model.ask(costs, clocked.now)
            assert verdict is (Verdict.LATER if expected is None else Verdict.GO)
            if expected is not None:
                assert abs(wait - expected) <= 2
                let_through += 1
        if let_through:
            clocked.ask(news=News(settled=[(keys["t"], difference)]))
            model.due["t"] += difference * model.unit("t")
        model.round()


def drive(
    clocked: Clocked, keys: dict[LimitKey, Callable[[], float]], *, jobs: int, minutes: float
) -> list[tuple[int, list[float]]]:
    """Jobs that do as they are told, come back a little late, and call at once when they may."""
    late = random.Random(1)
    began = clocked.now
    order = itertools.count()
    waiting = [
        (clocked.now + n * 1000, next(order), 0, [cost() for cost in keys.values()])
        for n in range(jobs)
    ]
    heapq.heapify(waiting)
    calls = []
    while waiting and waiting[0][0] < began + minutes * MINUTE_US:
        clocked.now, _, back, costs = heapq.heappop(waiting)
        verdict, wait = clocked.one(*zip(keys, costs, strict=True), turn=back)
        if verdict is Verdict.GO:
            calls.append((clocked.now + wait, costs))
        else:
            back_at = clocked.now + wait + late.randint(20_000, 200_000)
            heapq.heappush(waiting, (back_at, next(order), back + 1, costs))
    return sorted(calls)


def most_in_a_minute(calls: list[tuple[int, list[float]]], which: int) -> float:
    window: collections.deque[tuple[int, float]] = collections.deque()
    used = most = 0.0
    for at, costs in calls:
        while window and window[0][0] <= at - MINUTE_US:
            used -= window.popleft()[1]
        window.append((at, costs[which]))
        used += costs[which]
        most = max(most, used)
    return most


def test_a_backlog_uses_a_limit_of_requests_whole_and_no_minute_exceeds_it(
    clocked: Clocked,
) -> None:
    calls = drive(clocked, {rate("r", 300): lambda: 1.0}, jobs=900, minutes=2)

    assert most_in_a_minute(calls, 0) <= 300
    first_minute = [at for at, _ in calls if at < calls[0][0] + MINUTE_US]
    assert len(first_minute) >= 0.97 * 300
    assert len(calls) >= 2 * 0.97 * 300


def test_a_backlog_uses_a_limit_of_tokens_whole_and_no_minute_exceeds_it(clocked: Clocked) -> None:
    draw = random.Random(2)
    tokens = rate("t", 100_000)
    keys = {rate("r", 5000): lambda: 1.0, tokens: lambda: float(draw.randint(50, 900))}
    calls = drive(clocked, keys, jobs=700, minutes=2)

    assert most_in_a_minute(calls, 1) <= 100_000
    assert sum(costs[1] for _, costs in calls) >= 2 * 0.97 * 100_000


def test_who_is_sent_away_is_told_a_time_of_its_own(clocked: Clocked) -> None:
    key = rate("r", 60)
    call = [Reservation(id=str(n), items=[(key, 1.0)]) for n in range(50)]
    answers = clocked.ask(*call)

    waits = [wait for verdict, wait in answers if verdict is Verdict.LATER]
    between = MINUTE_US * (1 + HEADROOM) / 60 / 1.25  # a little sooner than their turns
    assert len(waits) >= 45
    assert all(abs(b - a - between) <= 2 for a, b in itertools.pairwise(waits))


def test_newcomers_go_behind_those_who_wait_in_line(clocked: Clocked) -> None:
    key = rate("r", 60)
    clocked.ask(*[Reservation(id=str(n), items=[(key, 1.0)]) for n in range(10)])
    clocked.now += 800_000  # the next turn is near, and eight are in line for it

    newcomer, wait = clocked.one((key, 1.0))
    old, _ = clocked.one((key, 1.0), turn=2)

    assert newcomer is Verdict.LATER
    assert wait > 6_000_000
    assert old is Verdict.GO


def test_all_keys_or_none(clocked: Clocked) -> None:
    full, free = a_day("full", 1), rate("free", 60)
    assert clocked.one((full, 1.0))[0] is Verdict.GO

    for _ in range(100):
        assert clocked.one((free, 1.0), (full, 1.0))[0] is Verdict.LATER

    assert clocked.one((free, 1.0)) == (Verdict.GO, 0)


def test_a_full_tenant_does_not_hold_up_the_deployment(clocked: Clocked) -> None:
    deployment = rate("d", 600, health=HEALTH.name)
    tenant, other = rate("tenant:a", 6), rate("tenant:b", 6)
    for _ in range(8):  # the deployment is busy, and has room within the second
        clocked.one((HEALTH, 0.0), (deployment, 1.0))
    for _ in range(50):
        clocked.one((HEALTH, 0.0), (deployment, 1.0), (tenant, 1.0))

    assert clocked.one((HEALTH, 0.0), (deployment, 1.0), (other, 1.0))[0] is Verdict.GO


def test_a_full_deployment_does_not_hold_up_the_tenants_other_calls(clocked: Clocked) -> None:
    slow = rate("slow", 6, health=HEALTH.name)
    tenant = rate("tenant:a", 6000)
    for _ in range(300):
        clocked.one((HEALTH, 0.0), (slow, 1.0), (tenant, 1.0))

    assert clocked.one((rate("other", 60), 1.0), (tenant, 1.0)) == (Verdict.GO, 0)


def test_a_day_admits_its_limit_at_once_and_no_more_in_any_day(clocked: Clocked) -> None:
    key = a_day("day", 100)
    began = clocked.now
    verdicts = [clocked.one((key, 1.0))[0] for _ in range(150)]
    assert verdicts.count(Verdict.GO) == 100

    _, wait = clocked.one((key, 1.0))
    clocked.now = began + DAY_US - 1
    assert clocked.one((key, 1.0))[0] is Verdict.LATER
    clocked.now = began + DAY_US + DAY_US // 60 + 1
    assert clocked.one((key, 1.0))[0] is Verdict.GO
    assert wait == 600_000_000  # the longest that is told


def test_what_was_not_used_is_given_back_and_what_was_used_besides_is_paid(
    clocked: Clocked,
) -> None:
    for key in (rate("rate", 6000), a_day("day", 6000)):
        assert clocked.one((key, 6000.0))[0] is Verdict.GO
        assert clocked.one((key, 50.0), turn=2)[0] is Verdict.LATER
        clocked.ask(news=News(settled=[(key, -6000.0)]))
        assert clocked.one((key, 50.0), turn=2) == (Verdict.GO, 0)
        clocked.ask(news=News(settled=[(key, 7000.0)]))
        assert clocked.one((key, 50.0), turn=2)[0] is Verdict.LATER


def test_a_refusal_stops_all_workers_for_as_long_as_was_told_and_then_slows_them(
    clocked: Clocked,
) -> None:
    key = rate("r", 600, health=HEALTH.name)
    items = [(HEALTH, 0.0), (key, 1.0)]
    clocked.ask(news=News(refusals=[(HEALTH, 7.0)]), worker="x")

    ((verdict, wait),) = clocked.ask(Reservation(id="y", items=items), worker="y")
    assert verdict is Verdict.LATER
    assert 7_000_000 - PATIENCE_US <= wait <= 7_000_000

    clocked.now += 7_000_000
    calls = [Reservation(id=str(n), items=items, turn=2) for n in range(12)]
    slowed = max(wait for verdict, wait in clocked.ask(*calls) if verdict is Verdict.GO)
    clocked.now += 60_000_000  # recovered by now
    again = max(wait for verdict, wait in clocked.ask(*calls) if verdict is Verdict.GO)
    assert slowed > again


def test_those_a_pause_holds_up_come_back_one_by_one(clocked: Clocked) -> None:
    key = rate("r", 60, health=HEALTH.name)
    clocked.ask(news=News(refusals=[(HEALTH, 30.0)]))
    calls = [Reservation(id=str(n), items=[(HEALTH, 0.0), (key, 1.0)]) for n in range(20)]

    waits = [wait for _, wait in clocked.ask(*calls)]

    assert waits[0] >= 29_000_000
    assert all(b - a > 700_000 for a, b in itertools.pairwise(waits))


def test_a_limit_that_the_provider_told_counts_if_it_is_the_lower_one(clocked: Clocked) -> None:
    mine, unknown = rate("mine", 60), rate("unknown", None)
    assert clocked.one((unknown, 1e9)) == (Verdict.GO, 0)

    clocked.ask(news=News(told=[(mine, 1000.0, 0.0), (unknown, 6.0, 0.0)]))
    assert [clocked.one((mine, 1.0), turn=2)[0] for _ in range(4)][-1] is Verdict.LATER
    assert [clocked.one((unknown, 1.0), turn=2)[0] for _ in range(2)] == [
        Verdict.GO,
        Verdict.LATER,
    ]
    clocked.ask(news=News(told=[(mine, 2.0, 0.0)]))
    clocked.now += 3_000_000
    clocked.one((mine, 1.0), turn=2)
    assert clocked.one((mine, 1.0), turn=2)[0] is Verdict.LATER


def test_a_limit_that_a_refusal_told_is_forgotten_after_a_while(clocked: Clocked) -> None:
    key = rate("r", None)
    clocked.ask(news=News(told=[(key, 6.0, 3600.0)]))
    clocked.one((key, 1.0), turn=2)
    clocked.now += 5_000_000
    assert clocked.one((key, 1.0), turn=2)[0] is Verdict.LATER
    clocked.now += 3_600_000_000
    assert [clocked.one((key, 1.0), turn=2)[0] for _ in range(9)] == [Verdict.GO] * 9


def test_microseconds_are_kept_to_the_last_digit(clocked: Clocked) -> None:
    clocked.one((rate("r", 6000), 1.0))

    kept = clocked.server.hget(f"{PREFIX}r", "at")

    assert int(kept or 0) == clocked.now - 300_000 + 10_200


def test_adaptive_concurrency_grows_while_it_is_used_and_falls_at_once(clocked: Clocked) -> None:
    key = permits(None, adaptive=True)
    items = [(HEALTH, 0.0), (key, 0.0)]

    def fill() -> list[str]:
        ids = [uuid.uuid4().hex for _ in range(200)]
        answers = clocked.ask(*[Reservation(id=i, items=items) for i in ids])
        return [i for i, (verdict, _) in zip(ids, answers, strict=True) if verdict is Verdict.GO]

    def end(ids: list[str], *, ok: bool) -> None:
        for held in ids:
            news = News(returned=[(key, held)], outcomes=[(HEALTH, key, ok)])
            clocked.ask(news=news)
        clocked.now += 1_100_000

    widths = []
    for _ in range(4):
        ids = fill()
        widths.append(len(ids))
        end(ids, ok=True)
    assert widths == sorted(set(widths))
    end(fill(), ok=False)
    ids = fill()
    assert len(ids) < widths[-1]
    end(ids, ok=True)
    assert len(fill()) <= len(ids) + 1  # carefully now


# -- many workers --------------------------------------------------------------------------


def fleet_limits(url: str, **options: Any) -> FleetLimits:
    local = LocalLimits(patience_s=1, headroom=HEADROOM)
    return FleetLimits(url, local, patience_s=1, headroom=HEADROOM, **{"timeout_s": 10, **options})


@pytest.fixture
async def limits(broker_url: str) -> AsyncIterator[FleetLimits]:
    made = fleet_limits(broker_url)
    yield made
    await made.aclose()


async def test_deployments_of_one_api_key_draw_from_one_quota_or_from_nothing(
    limits: FleetLimits,
) -> None:
    plans = KeyBook(
        parse_fleet("""
[models.m]
deployments = [
  { name = "a", base_url = "http://a", api_key_env = "ONE", limits = { requests_per_day = 50 } },
  { name = "b", base_url = "http://b", api_key_env = "ONE" },
]
[[limits.rules]]
per = "api_key"
requests_per_day = 5
""")
    ).plans
    tenant = a_day("tenant", 30)

    async def let_through(name: str) -> int:
        items = [(key, key.cost(Costs())) for key in plans[name].keys]
        calls = [Reservation(id=str(n), items=[*items, (tenant, 1.0)]) for n in range(10)]
        grants = await asyncio.gather(*[limits.reserve(call) for call in calls])
        assert {g.decisive.label for g in grants if g.decisive} <= {"ONE/requests_per_day"}
        return sum(grant.verdict is Verdict.GO for grant in grants)

    both = await asyncio.gather(*[let_through(name) for name in ("a", "b")])

    assert sum(both) == 5
    own = Reservation(id="own", items=[(tenant, 25.0)])
    assert (await limits.reserve(own)).verdict is Verdict.GO  # none of the others took from it


async def test_questions_of_one_moment_are_one_round_trip(
    limits: FleetLimits, broker_url: str
) -> None:
    key = rate("r", 60_000)
    calls = [Reservation(id=str(n), items=[(key, 1.0)]) for n in range(150)]
    await limits.reserve(calls[0])  # the script is loaded

    with redis.Redis.from_url(broker_url) as server:
        server.config_resetstat()
        grants = await asyncio.gather(*[limits.reserve(call) for call in calls])
        asked: Any = server.info("commandstats")

    assert all(grant.verdict is Verdict.GO for grant in grants)
    assert asked["cmdstat_evalsha"]["calls"] == 1


async def test_a_call_that_is_given_up_while_it_asks_leaves_nothing_behind(
    limits: FleetLimits,
) -> None:
    key = dataclasses.replace(permits(1), name="given-up")
    asking = asyncio.create_task(limits.reserve(Reservation(id="a", items=[(key, 0.0)])))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the question is on its way
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking

    async def ask() -> Grant:
        return await limits.reserve(Reservation(id="b", items=[(key, 0.0)]))

    async with asyncio.timeout(10):
        while (await ask()).verdict is not Verdict.GO:
            await asyncio.sleep(0.01)


def test_four_workers_never_have_more_calls_in_flight_and_a_dead_ones_come_back(
    broker_url: str, tmp_path: Path
) -> None:
    with redis.Redis.from_url(broker_url, decode_responses=True) as server:

        def number(key: str) -> int:
            return int(server.get(key) or 0)

        command = [sys.executable, str(PROGRAM), broker_url]
        with contextlib.ExitStack() as stack:
            # This one holds all permits, and dies with them.
            with Process([*command, "3600", "3"], log=tmp_path / "dead", ready="") as dead:
                eventually(lambda: number("calls") == 5, "all permits are taken")
                dead.kill()
            server.set("calls", 0)  # nobody is there to count them down
            for n in range(4):
                log = tmp_path / str(n)
                stack.enter_context(Process([*command, "0.02", "3"], log=log, ready=""))
            made = number("made")
            eventually(lambda: number("made") > made + 200, "the permits are used again")
            assert number("most") == 5


async def test_a_permit_is_held_for_as_long_as_the_call_takes(broker_url: str) -> None:
    limits = fleet_limits(broker_url, lease_s=0.4)
    renewing = asyncio.create_task(limits.run())
    key = dataclasses.replace(permits(1), name="long")
    held = Reservation(id="a", items=[(key, 0.0)])
    assert (await limits.reserve(held)).verdict is Verdict.GO
    loop = asyncio.get_running_loop()
    until = loop.time() + 1.2
    while loop.time() < until:
        grant = await limits.reserve(Reservation(id="b", items=[(key, 0.0)]))
        assert grant.verdict is Verdict.BUSY
        await asyncio.sleep(0.05)
    limits.tell(unused(held))
    assert (await limits.reserve(Reservation(id="b", items=[(key, 0.0)]))).verdict is Verdict.GO
    renewing.cancel()
    await limits.aclose()


async def test_without_redis_each_worker_has_its_share_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = rate("r", 600)  # ten a second; half of it for each of two

    def call() -> Reservation:
        return Reservation(id=uuid.uuid4().hex, items=[(key, 1.0)], turn=2)

    with EmbeddedValkey(tmp_path / "first") as server:
        workers = [fleet_limits(server.url, again_s=0.1) for _ in range(2)]
        for worker in [*workers, workers[0]]:
            assert (await worker.reserve(call())).verdict is Verdict.GO
    grants = [await workers[0].reserve(call()) for _ in range(40)]

    assert all(grant.alone for grant in grants)
    waits = [grant.wait_s for grant in grants if grant.verdict is Verdict.GO]
    assert len(waits) <= 7  # five a second, for the second that a call may wait
    assert sum("limits_alone" in record.message for record in caplog.records) == 1
    for worker in workers:
        await worker.aclose()


async def test_a_redis_that_never_was_there_does_not_mean_no_limit() -> None:
    worker = fleet_limits("redis://127.0.0.1:1", timeout_s=0.5)
    keys = [rate("r", 600), a_day("d", 864_000), permits(100)]
    for key in keys:
        calls = [Reservation(id=str(n), items=[(key, 1.0)], turn=2) for n in range(300)]
        grants = await asyncio.gather(*[worker.reserve(call) for call in calls])
        let_through = [grant for grant in grants if grant.verdict is Verdict.GO]
        assert 1 <= len(let_through) <= 12
    await worker.aclose()
