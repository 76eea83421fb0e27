"""Routes: which deployments may answer a job, best first."""

from __future__ import annotations

import uuid

import pytest

from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import CacheOptions, ClaimedJob, JobKind, OnUnknown
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.routing import Router

FLEET = """
default_tier = "basic"
timeouts = { timeout_ms = 1000, connect_timeout_ms = 11 }

[tiers.basic]
models = ["small", "large"]

[tiers.advanced]
models = ["large"]
timeouts = { timeout_ms = 2000 }

[models.small]
deployments = [
  { base_url = "http://one/v1", model = "small-there" },
  { base_url = "http://two/v1" },
]

[models.large]
price_as = "openai/gpt-4o"
deployments = [{ name = "big", base_url = "http://three/v1", timeouts = { idle_timeout_ms = 3 } }]
"""


class SilentProvider:
    async def call(self, call: Call) -> list[Answer]:
        raise AssertionError("routing must not call")

    async def aclose(self) -> None:
        pass


JOB = ClaimedJob(
    id=uuid.uuid4(),
    fence=1,
    tenant="default",
    tier="basic",
    kind=JobKind.CHAT,
    model=None,
    request="{}",
    input_tokens=1,
    priority=5,
    cache=CacheOptions(),
    attempt=1,
    deferrals=0,
    calls=0,
    on_unknown=OnUnknown.RETRY,
    queued_ms=0.0,
    remaining_s=60.0,
)


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet(FLEET)


@pytest.fixture
def router(fleet: Fleet) -> Router:
    names = [d.name for model in fleet.models.values() for d in model.deployments]
    return Router(fleet, {name: SilentProvider() for name in names})


def route(router: Router, **fields: str | None) -> list[tuple[str, str]]:
    job = JOB._replace(**fields)  # type: ignore[arg-type]
    return [(candidate.deployment.name, candidate.model_there) for candidate in router.route(job)]


def test_a_tiers_models_and_their_deployments_come_in_order(router: Router) -> None:
    assert route(router) == [("small", "small-there"), ("small-2", "small"), ("big", "large")]
    assert route(router, tier="advanced") == [("big", "large")]


def test_a_jobs_own_model_goes_before_its_tiers(router: Router) -> None:
    assert route(router, model="large") == [("big", "large")]
    assert route(router, tier="unknown", model="large") == [("big", "large")]


@pytest.mark.parametrize("fields", [{"model": "none"}, {"tier": "none"}, {"model": ""}])
def test_what_is_not_configured_has_no_route(router: Router, fields: dict[str, str]) -> None:
    assert route(router, **fields) == []


def test_a_candidate_knows_price_and_timers(router: Router) -> None:
    small, _, large = router.route(JOB)
    (advanced,) = router.route(JOB._replace(tier="advanced"))

    assert (small.price_as, large.price_as) == (None, "openai/gpt-4o")
    assert (small.timeouts.timeout_ms, advanced.timeouts.timeout_ms) == (1000, 2000)
    assert (small.timeouts.idle_timeout_ms, large.timeouts.idle_timeout_ms) == (60_000, 3)
    assert advanced.timeouts.connect_timeout_ms == 11


def test_equal_jobs_have_the_same_route(router: Router) -> None:
    """Whose identity tells the caller which jobs may share a request."""
    assert router.route(JOB) is router.route(JOB._replace(id=uuid.uuid4()))


def test_a_fleet_without_models_has_no_routes() -> None:
    assert route(Router(Fleet(), {})) == []
