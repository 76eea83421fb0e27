"""Which deployment a job goes to, by what its worker knows; no clock, no chance, no Redis."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import uuid
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.errors import ConfigurationError, ProviderError
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import CacheOptions, ClaimedJob, JobKind, OnUnknown
from promptfleet_shared.policies.balancing import (
    BalancingWeights,
    ModelBalancing,
    affinity_key,
    rendezvous,
    request_prefix,
    spill_bound,
)
from promptfleet_shared.pricing import Pricer
from promptfleet_workers import plugins
from promptfleet_workers.balancing.balancer import Balancer
from promptfleet_workers.balancing.building import build_balancer
from promptfleet_workers.balancing.places import FAILED_S, REST_S, Place
from promptfleet_workers.balancing.protocol import Choice, JobFacts
from promptfleet_workers.balancing.strategies import Cheapest, LeastBusy, PeakEwma, Weighted
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.routing import Router
from promptfleet_workers.work import Batch, Work

FACTS = JobFacts("default", "basic", JobKind.CHAT, 10, 5, None, None)


@dataclasses.dataclass(kw_only=True)
class Stand:
    """A choice that stands as the test says."""

    deployment: str
    model: str = "m"
    in_flight: int = 0
    max_concurrency: int | None = None
    latency_s: float | None = None
    usd: float | None = None


def names(choices: Sequence[Choice]) -> list[str]:
    return [choice.deployment for choice in choices]


def numbers(*values: float) -> Any:
    """Chance that is none."""
    return iter(values).__next__


# -- strategies --------------------------------------------------------------------------------


def test_least_busy_counts_jobs() -> None:
    stands = [Stand(deployment="a", in_flight=3), Stand(deployment="b", in_flight=1)]
    assert names(LeastBusy(ModelBalancing()).order(FACTS, stands)) == ["b", "a"]


def test_least_busy_counts_shares_where_all_have_a_bound() -> None:
    stands = [
        Stand(deployment="a", in_flight=3, max_concurrency=10),
        Stand(deployment="b", in_flight=1, max_concurrency=2),
    ]
    assert names(LeastBusy(ModelBalancing()).order(FACTS, stands)) == ["a", "b"]


def test_chance_decides_between_equals() -> None:
    stands = [Stand(deployment="a"), Stand(deployment="b")]
    assert names(LeastBusy(ModelBalancing(), numbers(0.9, 0.1)).order(FACTS, stands)) == ["b", "a"]
    assert names(LeastBusy(ModelBalancing(), numbers(0.1, 0.9)).order(FACTS, stands)) == ["a", "b"]


def test_of_two_choices_the_one_with_less_latency_times_load_is_taken() -> None:
    stands = [
        Stand(deployment="slow", latency_s=2.0, in_flight=0),  # 2 * 1
        Stand(deployment="quick", latency_s=0.5, in_flight=2),  # 0.5 * 3
        Stand(deployment="quick, but busy", latency_s=0.5, in_flight=9),  # 0.5 * 10
    ]
    pick = PeakEwma(ModelBalancing(), numbers(0.0, 0.0)).order(FACTS, stands)  # the first two
    assert names(pick) == ["quick", "slow", "quick, but busy"]
    pick = PeakEwma(ModelBalancing(), numbers(0.0, 0.9)).order(FACTS, stands)  # the outer two
    assert names(pick) == ["slow", "quick, but busy", "quick"]


def test_one_job_finds_out_how_quick_an_unknown_one_is() -> None:
    stands = [Stand(deployment="known", latency_s=1.0), Stand(deployment="unknown")]
    assert names(PeakEwma(ModelBalancing(), numbers(0.0, 0.0)).order(FACTS, stands))[0] == "unknown"
    stands[1].in_flight = 1
    assert names(PeakEwma(ModelBalancing(), numbers(0.0, 0.0)).order(FACTS, stands))[0] == "known"


def test_the_cheapest_goes_first_and_unknown_prices_last() -> None:
    stands = [
        Stand(deployment="unknown"),
        Stand(deployment="dear", usd=0.5),
        Stand(deployment="free, busy", usd=0.0, in_flight=2),
        Stand(deployment="free", usd=0.0),
    ]
    order = Cheapest(ModelBalancing()).order(FACTS, stands)
    assert names(order) == ["free", "free, busy", "dear", "unknown"]


def test_the_score_is_the_weighted_sum_of_shares() -> None:
    stands = [
        Stand(deployment="a", in_flight=4, max_concurrency=10, latency_s=1.0, usd=0.02),
        Stand(deployment="b", in_flight=0, max_concurrency=10, latency_s=4.0, usd=0.01),
    ]
    scores = Weighted(ModelBalancing()).scores(stands)
    assert scores == pytest.approx(
        [0.4 * 0.5 + 0.4 * 0.25 + 0.2 * 1.0, 0.4 * 0.1 + 0.4 * 1.0 + 0.2 * 0.5]
    )
    assert names(Weighted(ModelBalancing()).order(FACTS, stands)) == ["a", "b"]
    cost_only = ModelBalancing(weights=BalancingWeights(load=0, latency=0, cost=1))
    assert names(Weighted(cost_only).order(FACTS, stands)) == ["b", "a"]


# -- places ------------------------------------------------------------------------------------


class Bench:
    """One place, and its clock."""

    def __init__(self, **options: Any) -> None:
        self.now = 100.0
        settings = "".join(f", {key} = {value}" for key, value in options.items())
        fleet = parse_fleet(f"[models.m]\ndeployments = [{{ base_url = 'http://a/v1'{settings} }}]")
        (deployment,) = fleet.models["m"].deployments
        self.place = Place(deployment, decay_s=10.0, clock=lambda: self.now)


def test_a_peak_counts_at_once_and_is_forgotten_with_time() -> None:
    bench = Bench()
    assert bench.place.latency_s is None
    bench.place.answered(2.0)
    assert bench.place.latency_s == 2.0
    bench.now += 10
    assert bench.place.latency_s == pytest.approx(2.0 / math.e)
    bench.place.answered(0.2)
    assert bench.place.latency_s == pytest.approx(2.0 / math.e + 0.2 * (1 - 1 / math.e))
    bench.place.answered(5.0)
    assert bench.place.latency_s == 5.0


def test_a_call_that_fails_at_once_does_not_look_quick() -> None:
    bench = Bench()
    bench.place.failed(0.001)
    assert bench.place.latency_s == FAILED_S
    bench.place.failed(0.001)
    assert bench.place.latency_s == 2 * FAILED_S


def test_a_place_has_no_room_while_it_is_full_or_rests() -> None:
    bench = Bench(max_concurrency=2)
    bench.place.own = bench.place.others = 1
    assert not bench.place.has_room
    bench.place.own = 0
    assert bench.place.has_room
    bench.place.rest(None)
    assert not bench.place.has_room
    bench.now += REST_S
    assert bench.place.has_room


# -- affinity ----------------------------------------------------------------------------------


def test_keys_stay_where_they_are_when_another_deployment_goes() -> None:
    all_names = [f"gpu-{n}" for n in range(5)]
    left = [name for name in all_names if name != "gpu-3"]
    moved = Counter[str]()
    for n in range(500):
        key = affinity_key("session", "t", str(n))
        before = all_names[rendezvous(key, all_names)[0]]
        after = left[rendezvous(key, left)[0]]
        if before == "gpu-3":
            moved[after] += 1
        else:
            assert after == before
    assert len(moved) == 4  # those of the one that went are spread over all others
    assert min(moved.values()) > 5


def test_parts_of_a_key_can_not_be_taken_for_each_other() -> None:
    assert affinity_key("ab", "c") != affinity_key("a", "bc")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_there_is_always_a_deployment_below_the_bound(loads: list[int]) -> None:
    assert min(loads) < spill_bound(loads, ModelBalancing(spill_min=1))


def test_the_prefix_is_the_beginning_of_the_messages() -> None:
    request = '{"max_tokens":5,"messages":[{"content":"long","role":"system"}]}'
    assert request_prefix(request, 9) == '"messages":[{"conten'
    assert request_prefix('{"prompt":"abc","seed":1}', 3) == '"prompt":"ab'


# -- the balancer ------------------------------------------------------------------------------


class Silent:
    async def call(self, call: Call) -> list[Answer]:
        raise AssertionError

    async def aclose(self) -> None:
        pass


class Health:
    """Breakers that are as the test says."""

    def __init__(self) -> None:
        self.open: dict[str, float] = {}

    def open_for_s(self, name: str) -> float | None:
        return self.open.get(name)


FLEET = """
default_tier = "basic"
[balancing]
{balancing}
[tiers.basic]
models = ["m", "spare"]
[models.m]
price_as = "free"
deployments = [
  {{ name = "a", base_url = "http://a/v1"{a} }},
  {{ name = "b", base_url = "http://b/v1"{b} }},
  {{ name = "c", base_url = "http://c/v1" }},
]
{model}
[models.spare]
deployments = [{{ name = "d", base_url = "http://d/v1" }}]
"""


class Rig:
    """A balancer over four deployments of two models."""

    def __init__(
        self,
        balancing: str = 'strategy = "least_busy"',
        *,
        a: str = "",
        b: str = "",
        model: str = "",
    ) -> None:
        self.now = 100.0
        self.fleet: Fleet = parse_fleet(
            FLEET.format(balancing=balancing, a=a and f", {a}", b=b and f", {b}", model=model)
        )
        self.health = Health()
        self.balancer = Balancer.of(
            self.fleet, health=self.health, pricer=Pricer(), clock=lambda: self.now
        )
        self.router = Router(self.fleet, {name: Silent() for name in "abcd"})

    def work(self, request: str = "{}", **policy: Any) -> Work:
        job = ClaimedJob(
            id=uuid.uuid4(),
            fence=1,
            tenant="default",
            tier="basic",
            kind=JobKind.CHAT,
            model=None,
            request=request,
            input_tokens=1,
            priority=5,
            cache=CacheOptions(),
            attempt=1,
            deferrals=0,
            calls=0,
            on_unknown=OnUnknown.RETRY,
            queued_ms=0.0,
            remaining_s=60.0,
            policy=policy,
        )
        return Work(
            job=job,
            batch=Batch(id=uuid.uuid4(), size=1),
            asked_at=0.0,
            claimed_at=0.0,
            route=self.router.route(job),
            request=request,
        )

    def place(self, count: int = 1, **more: Any) -> list[Work]:
        works = [self.work(**more) for _ in range(count)]
        self.balancer.place(works)
        return works

    def load(self) -> dict[str, int]:
        return {load.deployment: load.in_flight for load in self.balancer.loads()}

    def fill(self, **loads: int) -> None:
        for name, load in loads.items():
            self.balancer.places[name].others = load


def route(work: Work) -> str:
    return "".join(candidate.deployment.name for candidate in work.route)


def first(work: Work) -> str:
    return work.route[0].deployment.name


def test_jobs_of_a_batch_spread_at_once_and_leave_nothing_behind() -> None:
    rig = Rig()
    works = rig.place(9)
    assert rig.load() == {"a": 3, "b": 3, "c": 3, "d": 0}
    for work in works:
        work.end()
    assert rig.load() == {"a": 0, "b": 0, "c": 0, "d": 0}


def test_a_job_that_moves_on_counts_where_it_is() -> None:
    rig = Rig()
    (work,) = rig.place()
    rig.balancer.move([work], work.route[1])
    assert rig.load()[work.route[0].deployment.name] == 0
    assert rig.load()[work.route[1].deployment.name] == 1
    work.end()
    assert set(rig.load().values()) == {0}


def test_models_stay_in_the_tiers_order() -> None:
    rig = Rig()
    rig.fill(a=50, b=50, c=50)
    assert all(route(work)[-1] == "d" for work in rig.place(20))


def test_across_models_the_deployments_of_all_are_chosen_from() -> None:
    rig = Rig('strategy = "least_busy"\nacross_models = true')
    rig.fill(a=50, b=50, c=50)
    assert first(rig.place()[0]) == "d"


def test_equal_orders_are_one_object() -> None:
    """Whose identity tells the caller which jobs may share a request."""
    works = Rig().place(60)
    routes = {route(work): work.route for work in works}
    assert all(work.route is routes[route(work)] for work in works)


def test_open_deployments_are_left_out_while_there_are_others() -> None:
    rig = Rig()
    rig.health.open["a"] = 5.0
    assert {first(work) for work in rig.place(20)} == {"b", "c"}
    assert all(route(work)[2] == "a" for work in rig.place(5))


def test_with_all_of_them_open_the_order_is_the_files() -> None:
    rig = Rig()
    rig.health.open.update(a=5.0, b=5.0, c=5.0)
    (work,) = rig.place()
    assert route(work) == "abcd"


def test_a_breaker_that_may_be_probed_gets_a_job_now_and_then() -> None:
    rig = Rig()
    rig.health.open["b"] = 0.0
    assert [first(work) == "b" for work in rig.place(3)] == [True, False, False]
    rig.now += 1
    assert first(rig.place()[0]) == "b"


def test_a_full_deployment_is_passed_over_while_others_have_room() -> None:
    rig = Rig('strategy = "ordered"', a="max_concurrency = 2")
    assert [route(work) for work in rig.place(4)] == ["abcd", "abcd", "bcad", "bcad"]


def test_with_all_of_them_full_the_balancer_still_chooses() -> None:
    rig = Rig(a="max_concurrency = 1", b="max_concurrency = 1")
    rig.fill(a=9, b=2, c=0)
    rig.balancer.places["c"].rest(5)
    assert first(rig.place()[0]) == "c"  # the least busy of those that are all out of room
    rig.fill(c=5)
    rig.balancer.places["c"].own = 0
    assert first(rig.place()[0]) == "b"


def test_a_hard_job_is_not_sent_where_it_is_too_hard() -> None:
    rig = Rig('strategy = "ordered"', a="max_complexity = 4", b="max_complexity = 7")
    assert route(rig.place(complexity=3)[0]) == "abcd"
    assert route(rig.place(complexity=6.5)[0]) == "bcad"
    assert route(rig.place(complexity="high")[0]) == "cabd"
    assert route(rig.place()[0]) == "abcd"  # nobody knows


def test_what_the_choice_of_the_tier_found_counts_too() -> None:
    rig = Rig('strategy = "ordered"', a="max_complexity = 4")
    work = rig.work()
    work.job = work.job._replace(decision={"tier": {"level": "medium", "score": 5.2}})
    rig.balancer.place([work])
    assert first(work) == "b"


def test_a_session_stays_at_its_deployment_until_that_is_overloaded() -> None:
    rig = Rig("spill_min = 4")
    home = first(rig.place(session_id="s")[0])
    rig.fill(**{name: 3 for name in "abc" if name != home})  # others are busy, home is not
    assert {first(work) for work in rig.place(3, session_id="s")} == {home}

    rig.fill(**{**dict.fromkeys("abc", 0), home: 30})
    away = rig.place(3, session_id="s")
    spilled = {first(work) for work in away}
    assert len(spilled) == 1  # all to the same one: it knows the beginning by then
    assert home not in spilled

    for work in away:
        work.end()
    rig.fill(**{home: 0})
    rig.health.open[home] = 5.0
    assert {first(work) for work in rig.place(3, session_id="s")} == spilled


def test_sessions_of_two_tenants_are_two_sessions() -> None:
    rig = Rig()
    homes = set()
    for n in range(20):
        work = rig.work(session_id="s")
        work.job = work.job._replace(tenant=f"tenant-{n}")
        rig.balancer.place([work])
        homes.add(first(work))
    assert len(homes) > 1


def test_sessions_work_without_any_strategy_and_cost_others_nothing() -> None:
    rig = Rig("")
    assert not rig.balancer.balances
    (plain,) = rig.place()
    assert (route(plain), plain.place, plain.decision) == ("abcd", None, None)
    assert not rig.balancer.places.used
    (sticky,) = rig.place(session_id="s")
    assert sticky.place is not None
    assert sticky.decision == {"deployment": {"strategy": "session", "why": "0 in flight, of 3"}}
    assert rig.balancer.places.used


def test_equal_beginnings_go_to_the_same_deployment() -> None:
    rig = Rig("prefix_affinity = true\nprefix_bytes = 40\nspill_min = 100")
    long = '{"messages":[{"content":"' + "You are a helpful assistant. " * 3
    homes = {first(rig.place(request=f'{long}{n}"}}]}}')[0]) for n in range(20)}
    others = {first(rig.place(request=f'{{"messages":[{{"content":"{n}"')[0]) for n in range(20)}
    assert len(homes) == 1
    assert len(others) > 1


def test_the_result_is_told_why() -> None:
    rig = Rig()
    rig.balancer.places["a"].answered(0.25)
    rig.fill(b=3, c=3)
    (work,) = rig.place()
    told = {"strategy": "least_busy", "why": "0 in flight, 250 ms, of 3"}
    assert work.decision == {"deployment": told}


GOOD = Completion(text="x", response=b"{}", finish_reason="stop")


@pytest.mark.parametrize(
    ("code", "status", "rests", "slow"),
    [
        ("rate_limit_exceeded", 429, True, False),
        ("overloaded", 503, True, True),
        ("http_500", 500, False, True),
        ("http_400", 400, False, False),
    ],
)
def test_calls_that_fail_send_the_next_ones_elsewhere(
    code: str, status: int, rests: bool, slow: bool
) -> None:
    rig = Rig()
    (work,) = rig.place()
    candidate = work.route[0]
    place = rig.balancer.places[candidate.deployment.name]
    error = ProviderError(code=code, status=status, retry_after_s=7.0)
    rig.balancer.ended(candidate, 0.001, [error])
    assert place.has_room is not rests
    assert (place.latency_s is not None) is slow
    rig.now += 7
    assert place.has_room
    rig.balancer.ended(candidate, 3.5, [error, GOOD])  # one of many was answered
    assert place.latency_s == 3.5


# -- a user's own ------------------------------------------------------------------------------


class Backwards:
    def __init__(self, options: ModelBalancing) -> None:
        self.options = options

    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:
        return list(reversed(choices))


class Broken(Backwards):
    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:
        raise ZeroDivisionError


class Careless(Backwards):
    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:
        return [choices[1], choices[1], Stand(deployment="invented")]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    found = types.ModuleType("balancers_of_a_test")
    vars(found).update(Backwards=Backwards, Broken=Broken, Careless=Careless, nothing=1)
    monkeypatch.setitem(sys.modules, found.__name__, found)
    return found.__name__


def test_a_balancer_by_its_dotted_path(module: str) -> None:
    assert route(Rig(f'strategy = "{module}:Backwards"').place()[0]) == "cbad"


def test_a_models_own_strategy_wins(module: str) -> None:
    rig = Rig(model=f'balancing = {{ strategy = "{module}:Backwards", decay_s = 3 }}')
    assert route(rig.place()[0]) == "cbad"


def test_a_balancer_that_fails_leaves_the_order_of_the_file(
    module: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert route(Rig(f'strategy = "{module}:Broken"').place()[0]) == "abcd"
    assert [(record.message, record.error) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("balancer_failed", "ZeroDivisionError")
    ]


def test_what_a_balancer_leaves_out_is_asked_last(module: str) -> None:
    assert route(Rig(f'strategy = "{module}:Careless"').place()[0]) == "bacd"


def test_a_balancer_by_entry_point(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", f"{module}:Backwards", "promptfleet.balancers")

    def offered(*, group: str, name: str | None = None) -> list[EntryPoint]:
        fits = group == point.group and name in {None, point.name}
        return [point] if fits else []

    monkeypatch.setattr(plugins, "entry_points", offered)
    assert route(Rig('strategy = "mine"').place()[0]) == "cbad"
    with pytest.raises(ConfigurationError, match=r"promptfleet\.balancers \(mine\)"):
        Rig('strategy = "other"')


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("fastest", "none of cheapest, least_busy, ordered, peak_ewma, weighted, nor an entry"),
        ("no_such_module:X", "can't be imported"),
        ("{module}:nothing", "is no load balancer"),
        ("{module}:Missing", "can't be imported"),
        (":", 'is no "module:Class"'),
    ],
)
def test_a_strategy_that_is_none_is_named(module: str, strategy: str, says: str) -> None:
    options = ModelBalancing(strategy=strategy.format(module=module))
    with pytest.raises(ConfigurationError, match=r"^balancing\.strategy: ") as caught:
        build_balancer(options, field="balancing.strategy")
    assert says in str(caught.value)


def test_weights_of_nothing_are_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match=r"balancing\.weights: at least one"):
        parse_fleet("[balancing]\nweights = { load = 0, latency = 0, cost = 0 }")


def test_a_model_can_not_choose_across_models() -> None:
    with pytest.raises(ConfigurationError, match="across_models"):
        Rig(model="balancing = { across_models = true }")
