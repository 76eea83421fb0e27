"""Limits: what fleet.toml may say, what a call counts against and costs, and its settlement."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest

from promptfleet_shared.errors import ConfigurationError, ProviderError
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import CacheOptions, ClaimedJob, JobKind, OnUnknown, Usage
from promptfleet_shared.policies.limits import Dimension
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.calling import plan_requests
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.rate_limits.asking import Grant, News, Reservation, Verdict
from promptfleet_workers.rate_limits.costs import FIRST_OUTPUT, CostLearner
from promptfleet_workers.rate_limits.keys import KeyBook, LimitKey
from promptfleet_workers.rate_limits.learning import limits_told
from promptfleet_workers.rate_limits.local import LocalLimits, Share
from promptfleet_workers.rate_limits.quotas import Hold, Quotas
from promptfleet_workers.retries import LIMIT_REACHED, QUOTA_REACHED
from promptfleet_workers.routing import Candidate, Router
from promptfleet_workers.work import Batch, Work

FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["m"]
[models.m]
price_as = "openai/gpt-4o-mini"
[[models.m.deployments]]
name = "a"
base_url = "http://a"
prompts_per_request = 8
limits = { requests_per_minute = 60, tokens_per_minute = 6000, dollars_per_day = 5, \
max_concurrency = 4 }
[[models.m.deployments]]
name = "b"
base_url = "http://b"
"""
RULES = """
[[limits.rules]]
per = "tenant"
requests_per_minute = 10
[[limits.rules]]
per = "tenant"
only = ["acme"]
requests_per_minute = 100
[[limits.rules]]
per = "limit_key"
max_concurrency = 1
[[limits.rules]]
per = "fleet"
tokens_per_hour = 1000
"""


class Nobody:
    """A provider that nobody calls."""

    async def call(self, call: Call) -> list[Answer]:
        raise AssertionError

    async def aclose(self) -> None:
        pass


class Keeper:
    """Answers as the test says, and remembers what it was told."""

    def __init__(self, *grants: Grant) -> None:
        self._grants = list(grants)
        self.asked: list[Reservation] = []
        self.news: list[News] = []

    async def reserve(self, reservation: Reservation) -> Grant:
        self.asked.append(reservation)
        return self._grants.pop(0) if self._grants else Grant(verdict=Verdict.GO)

    def tell(self, news: News) -> None:
        self.news.append(news)

    async def aclose(self) -> None:
        pass

    @property
    def settled(self) -> dict[str, float]:
        return {key.label: n for news in self.news for key, n in news.settled}


def job(**changes: Any) -> ClaimedJob:
    facts: dict[str, Any] = {
        "id": uuid.uuid4(),
        "fence": 1,
        "tenant": "t",
        "tier": "basic",
        "kind": JobKind.CHAT,
        "model": None,
        "request": '{"messages":[],"max_tokens":100}',
        "input_tokens": 50,
        "priority": 5,
        "cache": CacheOptions(),
        "attempt": 1,
        "deferrals": 0,
        "calls": 0,
        "on_unknown": OnUnknown.RETRY,
        "queued_ms": 0.0,
        "remaining_s": 100.0,
    }
    return ClaimedJob(**{**facts, **changes})


def routed(fleet: Fleet, **changes: Any) -> Work:
    claimed = job(**changes)
    router = Router(fleet, {name: Nobody() for name in "abcd"})
    now = time.monotonic()
    return Work(
        job=claimed,
        batch=Batch(id=uuid.uuid4(), size=1),
        asked_at=now,
        claimed_at=now,
        route=router.route(claimed),
        request=claimed.request,
    )


def quotas_of(fleet: Fleet, keeper: Keeper, *, patience_s: float = 1.0) -> Quotas:
    return Quotas(keeper, KeyBook(fleet), patience_s=patience_s, prices=Pricer())


def good(**tokens: int) -> Completion:
    return Completion(text="x", response=b"{}", finish_reason="stop", usage=Usage(**tokens))


# -- fleet.toml ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[limits.rules]]\nper = "tenant"', "a rule needs a limit"),
        ('[[limits.rules]]\nper = "nobody"\nrequests_per_day = 1', "per: Input should be"),
        ('[[limits.rules]]\nper = "fleet"\nonly = ["x"]\nrequests_per_day = 1', "leave out `only`"),
        ("[limits]\nheadroom = 0.9", "headroom: Input should be less than or equal to 0.5"),
        (FLEET.replace("dollars_per_day = 5", "dollars_per_day = 0"), "greater than 0"),
        (FLEET.replace("dollars_per_day", "dollars_per_year"), "Extra inputs are not permitted"),
    ],
)
def test_bad_limits_are_named(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match="limits") as caught:
        parse_fleet(text)
    assert complaint in str(caught.value)


def test_a_fleet_without_limits_has_nothing_to_pay_for() -> None:
    bare = parse_fleet("[models.m]\n[[models.m.deployments]]\nbase_url = 'http://a'")
    assert not KeyBook(bare).limits_anything
    assert KeyBook(parse_fleet(FLEET)).limits_anything


def labels(keys: Sequence[LimitKey]) -> list[str]:
    return [key.label for key in keys]


def test_a_job_counts_against_its_tenants_its_keys_and_the_fleets_rules() -> None:
    book = KeyBook(parse_fleet(FLEET + RULES))
    (of_acme,) = [key for key in book.of_job(job(tenant="acme")) if key.label.startswith("tenant")]
    (of_other,) = [key for key in book.of_job(job(tenant="x")) if key.label.startswith("tenant")]
    assert (of_acme.limit, of_other.limit) == (100, 10)

    keyed = book.of_job(job(policy={"limit_key": "k"}))
    assert labels(keyed) == [
        "fleet/tokens_per_hour",
        "tenant/requests_per_minute",
        "limit_key/max_concurrency",
    ]
    same_word = book.of_job(job(tenant="x", policy={"limit_key": "k"}))
    assert keyed[-1].name != same_word[-1].name


def test_deployments_of_one_account_share_their_keys() -> None:
    book = KeyBook(
        parse_fleet("""
[models.m]
[[models.m.deployments]]
name = "a"
base_url = "http://a"
limits = { account = "x", requests_per_minute = 5 }
[[models.m.deployments]]
name = "b"
base_url = "http://b"
limits = { account = "x", requests_per_minute = 5 }
""")
    )
    assert book.plans["a"].keys == book.plans["b"].keys


BASIC = """
default_tier = "basic"
[tiers.basic]
models = ["m"]
"""
KEYED = """
[[models.m.deployments]]
name = "a"
base_url = "http://a"
api_key_env = "ONE"
limits = { requests_per_minute = 5 }
[[models.m.deployments]]
name = "b"
base_url = "http://b"
api_key_env = "ONE"
[[models.m.deployments]]
name = "c"
base_url = "http://c"
api_key_env = "TWO"
[[models.m.deployments]]
name = "d"
base_url = "http://d"
api_key = "secret"
api_key_env = "ONE"
[[limits.rules]]
per = "api_key"
dollars_per_month = 500
[[limits.rules]]
per = "api_key"
only = ["ONE"]
tokens_per_minute = 1000
max_concurrency = 3
"""


def test_deployments_draw_from_the_quota_of_their_api_key() -> None:
    book = KeyBook(parse_fleet(KEYED))

    shared = labels(book.plans["b"].keys)
    assert shared == [
        "b/pause",
        "ONE/pause",
        "ONE/tokens_per_minute",
        "ONE/max_concurrency",
    ]
    assert set(book.plans["a"].keys) >= set(book.plans["b"].keys[1:])
    assert labels(book.plans["a"].keys)[1] == "a/requests_per_minute"
    assert labels(book.plans["c"].keys) == ["c/pause", "TWO/pause", "TWO/dollars_per_month"]
    assert "d" not in book.plans  # whose key that is, nobody knows
    assert (book.has_rules, book.has_windows) == (False, True)
    assert "secret" not in repr(book.plans)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('only = ["ONE"]', 'only = ["THREE"]', "no deployment has api_key_env 'THREE', only ONE"),
        ("api_key_env", "model", "a rule per api_key needs a deployment with api_key_env"),
    ],
)
def test_a_quota_of_no_key_is_a_mistake(old: str, new: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=r"limits\.rules") as caught:
        parse_fleet(KEYED.replace(old, new))
    assert complaint in str(caught.value)


async def test_a_full_key_is_a_reason_to_ask_a_deployment_with_another_one() -> None:
    fleet = parse_fleet(BASIC + KEYED)
    key = KeyBook(fleet).plans["b"].keys[2]
    keeper = Keeper(Grant(verdict=Verdict.LATER, wait_s=2.0, decisive=key))
    work = routed(fleet)

    refusal = await quotas_of(fleet, keeper).reserve(work.route[0], [work], is_last=False)

    assert isinstance(refusal, ProviderError)
    assert refusal.code == QUOTA_REACHED


async def test_a_429_pauses_the_deployment_and_slows_its_key() -> None:
    fleet, keeper = parse_fleet(BASIC + KEYED), Keeper()
    quotas, work = quotas_of(fleet, keeper), routed(fleet)
    hold = await reserved(quotas, work)
    error = ProviderError(
        code="resource_exhausted", status=429, retry_after_s=9, limits={"requests": 3, "tokens": 70}
    )

    quotas.settle(hold, work.route[0], [work], [error])

    refusals = [(key.label, s) for key, s in keeper.news[0].refusals]
    assert refusals == [("a/pause", 9), ("ONE/pause", 0)]
    # Which of the deployment's it is that was told, and never the key's of the same name.
    told = [(key.label, limit, s > 0) for key, limit, s in keeper.news[0].told]
    assert told == [("a/requests_per_minute", 3, True), ("a/tokens_per_minute", 70, True)]


# -- what a call costs ---------------------------------------------------------------------


def test_answers_are_expected_as_long_as_those_before_and_no_longer_than_they_may_be() -> None:
    learner = CostLearner()
    long, short = (JobKind.CHAT, '{"messages":[]}', 100), (JobKind.CHAT, '{"max_tokens":7}', 100)
    assert learner.expect("m", "t", [long], None).output_tokens == FIRST_OUTPUT
    for _ in range(200):
        usage = Usage(input=150, output=40)
        learner.learn("m", "t", estimated=100, usage=usage, is_answer=True)

    costs = learner.expect("m", "t", [long], None)
    assert abs(costs.output_tokens - 40) < 1
    assert abs(costs.input_tokens - 150) < 1
    assert learner.expect("m", "t", [short], None).output_tokens == 7
    assert learner.expect("m", "other", [long], None).output_tokens == FIRST_OUTPUT
    assert learner.expect("m", "t", [(JobKind.EMBEDDING, "{}", 10)], None).output_tokens == 0


def test_limits_are_read_from_headers_of_both_kinds() -> None:
    headers = {
        "X-RateLimit-Limit-Requests": "500",
        "x-ratelimit-limit-tokens": "30000",
        "x-ratelimit-remaining-tokens": "7",
        "anthropic-ratelimit-input-tokens-limit": "40000",
        "anthropic-ratelimit-output-tokens-limit": "none",
    }
    assert dict(limits_told(headers)) == {
        Dimension.REQUESTS: 500,
        Dimension.TOKENS: 30_000,
        Dimension.INPUT_TOKENS: 40_000,
    }


# -- the share of one worker ---------------------------------------------------------------


def test_shares_of_all_workers_are_the_whole() -> None:
    for workers, count in itertools.product(range(1, 8), range(20)):
        shares = [Share(workers, place).of_whole(count) for place in range(workers)]
        assert sum(shares) == count


def test_a_share_of_a_rate_is_used_evenly() -> None:
    now = 100.0
    local = LocalLimits(patience_s=1, headroom=0, clock=lambda: now)
    local.share = Share(workers=2, place=0)
    key = LimitKey(name="r", label="r", kind="rate", limit=120, period_us=60_000_000)
    starts = []
    while now < 160:
        grant = local.decide(Reservation(id="", items=[(key, 1.0)]))
        if grant.verdict is Verdict.GO:
            starts.append(now + grant.wait_s)
        else:
            now += 0.25
    assert len([at for at in starts if at < 160]) == 60


def test_alone_a_refusal_by_the_provider_pauses_this_worker() -> None:
    now = 0.0
    local = LocalLimits(patience_s=1, headroom=0, clock=lambda: now)
    health = LimitKey(name="h", label="h", kind="health")
    local.hear(News(refusals=[(health, 30.0)]))
    grant = local.decide(Reservation(id="", items=[(health, 0.0)]))
    assert (grant.verdict, grant.wait_s) == (Verdict.LATER, 29.5)


# -- reserve and settle --------------------------------------------------------------------


async def reserved(quotas: Quotas, work: Work, candidate: Candidate | None = None) -> Hold:
    hold = await quotas.reserve(candidate or work.route[0], [work])
    assert isinstance(hold, Hold)
    return hold


async def test_what_a_call_really_took_takes_the_place_of_what_was_expected() -> None:
    fleet, keeper = parse_fleet(FLEET), Keeper()
    quotas, work = quotas_of(fleet, keeper), routed(fleet)
    hold = await reserved(quotas, work)
    costs = {key.label: cost for key, cost in keeper.asked[0].items}
    assert costs["a/requests_per_minute"] == 1
    assert costs["a/tokens_per_minute"] == 50 + 100
    assert costs["a/dollars_per_day"] > 0

    quotas.settle(hold, work.route[0], [work], [good(input=80, output=90)])

    assert keeper.settled["a/tokens_per_minute"] == 20
    assert "a/requests_per_minute" not in keeper.settled
    price = Pricer().cost("openai", "gpt-4o-mini", Usage(input=80, output=90))
    paid = costs["a/dollars_per_day"] + keeper.settled["a/dollars_per_day"]
    assert Decimal(paid).quantize(Decimal("1e-12")) == price
    assert [key.label for key, _ in keeper.news[0].returned] == ["a/max_concurrency"]


@pytest.mark.parametrize(
    ("answers", "tokens", "requests"),
    [
        ((), -150, -1),  # never called: the job was lost in the meantime
        ((ProviderError(code="circuit_open"),), -150, -1),
        ((ProviderError(code="connect_error"),), -150, -1),
        ((ProviderError(code="rate_limit_exceeded", status=429),), -150, 0),
        ((ProviderError(code="timeout", unknown_outcome=True),), 0, 0),
        (None, 0, 0),  # interrupted
    ],
)
async def test_a_call_without_an_answer_is_settled_by_what_became_of_it(
    answers: tuple[Answer, ...] | None, tokens: float, requests: float
) -> None:
    fleet, keeper = parse_fleet(FLEET), Keeper()
    quotas, work = quotas_of(fleet, keeper), routed(fleet)
    hold = await reserved(quotas, work)

    quotas.settle(hold, work.route[0], [work] if answers else [], answers)

    assert keeper.settled.get("a/tokens_per_minute", 0) == tokens
    assert keeper.settled.get("a/requests_per_minute", 0) == requests
    assert len(keeper.news[0].returned) == 1


async def test_a_429_is_told_to_the_whole_fleet() -> None:
    fleet, keeper = parse_fleet(FLEET), Keeper()
    quotas, work = quotas_of(fleet, keeper), routed(fleet)
    hold = await reserved(quotas, work)
    error = ProviderError(code="rate_limit_exceeded", status=429, retry_after_s=12.5)

    quotas.settle(hold, work.route[0], [work], [error])

    assert [(key.label, s) for key, s in keeper.news[0].refusals] == [("a/pause", 12.5)]
    assert quotas.counts.throttled == {"a": 1}


async def test_a_wait_is_told_on_the_result_and_a_longer_one_is_the_jobs_run_at() -> None:
    fleet = parse_fleet(FLEET)
    key = KeyBook(fleet).plans["a"].keys[1]
    later = Grant(verdict=Verdict.LATER, wait_s=7.25, decisive=key)
    soon = Grant(verdict=Verdict.GO, wait_s=0.01, decisive=key)
    quotas = quotas_of(fleet, Keeper(later, soon))
    work = routed(fleet, decision={"limits": {"waited_ms": 1000, "limit": "other"}})

    refusal = await quotas.reserve(work.route[0], [work])
    assert isinstance(refusal, ProviderError)
    assert (refusal.code, refusal.retry_after_s) == (QUOTA_REACHED, 7.25)
    assert work.decision == {"limits": {"waited_ms": 8250, "limit": key.label}}

    await reserved(quotas, work)
    assert (work.decision or {})["limits"]["waited_ms"] >= 8260


async def test_who_gives_up_waiting_for_a_turn_gives_it_back() -> None:
    fleet = parse_fleet(FLEET)
    keeper = Keeper(Grant(verdict=Verdict.GO, wait_s=3600))
    quotas, work = quotas_of(fleet, keeper), routed(fleet)
    waiting = asyncio.create_task(quotas.reserve(work.route[0], [work]))
    while not keeper.asked:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert keeper.settled["a/tokens_per_minute"] == -150
    assert len(keeper.news[0].returned) == 1


async def test_only_the_first_who_waits_for_a_permit_asks_for_it() -> None:
    fleet = parse_fleet(FLEET)
    (permits,) = KeyBook(fleet).plans["a"].permits
    busy = Grant(verdict=Verdict.BUSY, decisive=permits)
    keeper = Keeper(*[busy] * 3)
    quotas = quotas_of(fleet, keeper, patience_s=10)
    works = [routed(fleet) for _ in range(5)]
    holds = await asyncio.gather(*[reserved(quotas, work) for work in works])

    assert len({hold.id for hold in holds}) == 5
    assert len(keeper.asked) <= 5 + 3


async def test_a_permit_that_does_not_come_is_waited_for_in_the_database() -> None:
    fleet = parse_fleet(FLEET)
    (permits,) = KeyBook(fleet).plans["a"].permits
    keeper = Keeper(*[Grant(verdict=Verdict.BUSY, decisive=permits)] * 100)
    quotas, work = quotas_of(fleet, keeper, patience_s=0.05), routed(fleet)
    refusal = await quotas.reserve(work.route[0], [work])
    assert isinstance(refusal, ProviderError)
    assert refusal.retry_after_s


async def test_limits_that_responses_tell_are_passed_on_when_they_change() -> None:
    fleet, keeper = parse_fleet(FLEET), Keeper()
    quotas = quotas_of(fleet, keeper)
    hear = quotas.listeners["a"]
    hear({"x-ratelimit-limit-requests": "40"})
    hear({"x-ratelimit-limit-requests": "30"})  # within the second
    told = [(key.label, limit) for news in keeper.news for key, limit, _ in news.told]
    assert told == [("a/requests_per_minute", 40)]
    assert "b" not in quotas.listeners


async def test_a_deployment_that_learns_nothing_hears_nothing() -> None:
    text = FLEET.replace("limits = { ", "limits = { learn = false, ")
    assert "learn = false" in text
    assert quotas_of(parse_fleet(text), Keeper()).listeners == {}


def test_jobs_of_two_tenants_share_no_request_where_tenants_have_limits() -> None:
    def requests(fleet: Fleet) -> list[int]:
        quotas = quotas_of(fleet, Keeper())
        work = [
            routed(fleet, tenant=tenant, kind=JobKind.COMPLETION, request='{"prompt":"x"}')
            for tenant in ("t", "u", "t")
        ]
        same = [dataclasses.replace(each, route=work[0].route) for each in work]
        plan = plan_requests(same, fleet.batch_options("basic"), quotas.apart)
        return sorted(len(request) for request in plan)

    assert requests(parse_fleet(FLEET)) == [3]
    assert requests(parse_fleet(FLEET + RULES)) == [1, 2]


async def test_a_job_that_no_deployment_has_room_for_joins_the_shortest_line_only() -> None:
    both = FLEET.replace(
        'base_url = "http://b"', 'base_url = "http://b"\nlimits = { requests_per_minute = 9 }'
    )
    fleet = parse_fleet(both)
    book = KeyBook(fleet)
    (a, b) = (book.plans[name].keys[1] for name in "ab")
    waits = [(a, 5.0), (b, 30.0), (a, 5.5)]
    keeper = Keeper(*[Grant(verdict=Verdict.LATER, wait_s=s, decisive=key) for key, s in waits])
    quotas, work = quotas_of(fleet, keeper), routed(fleet)

    first = await quotas.reserve(work.route[0], [work], is_last=False)
    last = await quotas.reserve(work.route[1], [work], is_last=True)

    assert isinstance(first, ProviderError)
    assert isinstance(last, ProviderError)
    assert last.retry_after_s == 5.5
    joined = [(r.probe, r.items[0][0].label) for r in keeper.asked]
    assert joined == [(True, "a/pause"), (True, "b/pause"), (False, "a/pause")]
    assert work.decision == {"limits": {"waited_ms": 5500, "limit": a.label}}


async def test_a_limit_of_our_own_is_a_reason_to_wait_and_none_to_ask_another() -> None:
    fleet = parse_fleet(FLEET + RULES)
    work = routed(fleet)
    (_, own) = KeyBook(fleet).of_job(work.job)
    later = Grant(verdict=Verdict.LATER, wait_s=2.0, decisive=own)
    keeper = Keeper(later, later)
    refusal = await quotas_of(fleet, keeper).reserve(work.route[0], [work], is_last=False)
    assert isinstance(refusal, ProviderError)
    assert refusal.code == LIMIT_REACHED
    assert [r.probe for r in keeper.asked] == [True, False]


async def test_a_deployment_without_a_permit_gives_way_to_its_sibling_at_once() -> None:
    fleet = parse_fleet(FLEET)
    (permits,) = KeyBook(fleet).plans["a"].permits
    keeper = Keeper(Grant(verdict=Verdict.BUSY, decisive=permits))
    quotas, work = quotas_of(fleet, keeper, patience_s=3600), routed(fleet)

    refusal = await quotas.reserve(work.route[0], [work], is_last=False)
    assert isinstance(refusal, ProviderError)
    assert isinstance(await quotas.reserve(work.route[1], [work], is_last=True), Hold)
