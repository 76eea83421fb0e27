"""`tier="auto"`, triage and escalation through the real pipeline and a real database.

Whatever happens to a job while it moves between tiers, it ends once, and each call of it is in the
ledger.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable

import pytest
import sqlalchemy as sa
from tests.integration.tier_rig import Model, TierRig, saying
from tests.rows import ago, change, result_rows

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import JobSpec, JobState
from promptfleet_shared.store.results import read_results, request_cancel
from promptfleet_shared.store.shadows import SHADOW_METADATA, shadow_pairs
from promptfleet_shared.store.sweeping import sweep
from promptfleet_shared.store.tables import jobs
from promptfleet_workers.claims import Abort
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.shadowing import is_sampled, shadow_id

HARD = "Prove step by step why the equation x^2 = 2 has no rational solution. Compare two proofs."
TRIAGE = '[routing]\nscorer = "triage"'
REFUSAL = "I'm sorry, but I can't help with that."
CHECKED = "[tiers.basic.escalate_on]\nrefusal = true\nmin_chars = 3"
ALL_CHECKED = {
    "basic": CHECKED,
    "standard": CHECKED.replace("basic", "standard"),
    "advanced": CHECKED.replace("basic", "advanced"),
}

MakeRig = Callable[..., TierRig]


@pytest.fixture
async def make_rig(database_url: str, database: sa.Engine) -> AsyncIterator[MakeRig]:
    rigs: list[TierRig] = []

    def make(**toml: str) -> TierRig:
        rigs.append(TierRig(database_url, database, **toml))
        return rigs[-1]

    yield make
    for rig in rigs:
        await rig.close()


def decided(rig: TierRig, spec: JobSpec) -> dict[str, object]:
    found: dict[str, object] = rig.result(spec.id)["decision"]["tier"]
    return found


async def fail(call: Call) -> list[Answer]:
    raise ProviderError("no", code="connect_error")


async def refuse_for_now(call: Call) -> list[Answer]:
    raise ProviderError("wait", code="rate_limited", status=429, retry_after_s=30.0)


async def refuse_for_good(call: Call) -> list[Answer]:
    raise ProviderError("bad", code="invalid_request", status=400)


class Gate:
    """Holds a model's answers back until it is opened."""

    def __init__(self, model: Model) -> None:
        self.open = asyncio.Event()
        behaviour = model.behaviour

        async def wait(call: Call) -> list[Answer]:
            await self.open.wait()
            return await behaviour(call)

        model.behaviour = wait


# -- the choice at submission -------------------------------------------------------------------


async def test_auto_is_decided_when_it_is_submitted_and_told_with_the_result(
    make_rig: MakeRig,
) -> None:
    rig = make_rig()
    easy, hard, said = (
        rig.accept("What is the capital of France?", tier="auto"),
        rig.accept(HARD, tier="auto"),
        rig.accept("Hi", tier="auto", complexity="high"),
    )
    assert [easy.tier, hard.tier, said.tier] == ["basic", "advanced", "advanced"]

    await rig.run(easy, hard, said)

    assert decided(rig, easy)["by"] == "rules"
    assert decided(rig, easy)["score"] == 1.0
    assert decided(rig, hard)["level"] == "high"
    assert decided(rig, hard)["reasons"]
    assert decided(rig, said) == {"asked": "auto", "chosen": "advanced", "by": "attributes"}
    assert [rig.result(s.id)["tier"] for s in (easy, hard)] == ["basic", "advanced"]


async def test_a_repeated_submission_is_the_same_job_although_the_choice_has_changed(
    make_rig: MakeRig,
) -> None:
    rig = make_rig()
    other = make_rig(routing="[routing]\nmedium_from = 1\nhigh_from = 1")
    first = rig.accept("Hi", tier="auto", idempotency_key="k")
    again = other.accept("Hi", tier="auto", idempotency_key="k")
    assert (first.tier, again.tier) == ("basic", "advanced")

    await rig.run(first)

    assert result_rows(rig.rows, first.id)
    with rig.rows.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(jobs)) == 1


async def test_cancelled_and_expired_jobs_tell_how_their_tier_was_chosen(make_rig: MakeRig) -> None:
    rig = make_rig()
    cancelled, late = rig.accept("Hi", tier="auto"), rig.accept("Ho", tier="auto")
    change(rig.rows, late.id, deadline=ago(1), sweep_at=ago(1))
    with rig.rows.begin() as connection:
        request_cancel(connection, [cancelled.id], tenant=cancelled.tenant)
        sweep(connection)

    assert decided(rig, cancelled)["chosen"] == "basic"
    assert decided(rig, late)["chosen"] == "basic"


async def test_a_tiers_bound_is_added_or_lowers_the_requests(make_rig: MakeRig) -> None:
    rig = make_rig(basic="max_tokens = 50")
    free, more, less = (
        rig.accept('say "max_tokens"', tier="basic"),
        rig.accept("b", tier="basic", max_tokens=90),
        rig.accept("c", tier="basic", max_tokens=20),
    )
    unbound = rig.accept("d", tier="standard")
    await rig.run(free, more, less, unbound)

    bounds = {r["messages"][0]["content"]: r["max_tokens"] for r in rig.asked("small")}
    assert bounds == {'say "max_tokens"': 50, "b": 50, "c": 20}
    assert "max_tokens" not in rig.asked("middle")[0]


# -- escalation ---------------------------------------------------------------------------------


async def test_an_answer_that_fails_its_check_goes_to_the_next_tier(make_rig: MakeRig) -> None:
    rig = make_rig(**ALL_CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL)
    rig.models["middle"].behaviour = saying("a")  # too short
    rig.models["large"].behaviour = saying("the answer")
    spec = rig.accept("Hi", tier="basic")
    await rig.run(spec)

    row = rig.result(spec.id)
    assert (row["state"], row["text"], row["tier"]) == ("succeeded", "the answer", "advanced")
    assert (row["calls"], row["attempts"], row["unknown_calls"]) == (3, 1, 0)
    assert decided(rig, spec) == {
        "asked": "basic",
        "by": "caller",
        "chosen": "advanced",
        "escalated_from": [
            {"tier": "basic", "model": "small", "check": "refusal"},
            {"tier": "standard", "model": "middle", "check": "min_chars"},
        ],
    }
    assert rig.bill(spec.id) == [
        ("basic", "small", 1, 15),
        ("standard", "middle", 1, 15),
        ("advanced", "large", 1, 15),
    ]


async def test_the_last_tiers_answer_stands_and_says_that_it_failed(make_rig: MakeRig) -> None:
    rig = make_rig(**ALL_CHECKED)
    rig.models["large"].behaviour = saying(REFUSAL)
    spec = rig.accept("Hi", tier="advanced")
    await rig.run(spec)

    row = rig.result(spec.id)
    assert (row["state"], row["text"], row["calls"]) == ("succeeded", REFUSAL, 1)
    assert decided(rig, spec)["failed_check"] == "refusal"

    # It is not kept as a good one.
    again = rig.accept("Hi", tier="advanced")
    await rig.run(again)
    assert rig.result(again.id)["cache"] == "miss"


async def test_a_failed_answer_is_not_given_to_later_equal_jobs(make_rig: MakeRig) -> None:
    rig = make_rig(basic=CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL, "all is well")
    await rig.run(rig.accept("Hi", tier="basic"))
    second = rig.accept("Hi", tier="basic")
    await rig.run(second)

    assert rig.result(second.id)["text"] == "all is well"
    assert len(rig.models["small"].calls) == 2


async def test_equal_jobs_go_on_together_and_pay_once_a_tier(make_rig: MakeRig) -> None:
    rig = make_rig(basic=CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL)
    twins = [rig.accept("Hi", tier="basic") for _ in range(3)]
    await rig.run(*twins)

    assert {rig.result(twin.id)["tier"] for twin in twins} == {"standard"}
    assert len(rig.models["small"].calls) == 1
    calls = sum(calls for twin in twins for _, _, calls, _ in rig.bill(twin.id))
    assert calls == 1 + len(rig.models["middle"].calls)


async def test_no_more_calls_are_made_than_a_job_may_cost(make_rig: MakeRig) -> None:
    rig = make_rig(basic=CHECKED, standard="[tiers.standard.retry]\nmax_calls = 1")
    rig.models["small"].behaviour = saying(REFUSAL)
    spec = rig.accept("Hi", tier="basic")
    await rig.run(spec)

    assert (rig.result(spec.id)["text"], rig.result(spec.id)["calls"]) == (REFUSAL, 1)
    assert decided(rig, spec)["failed_check"] == "refusal"


async def test_a_jobs_own_checks_take_the_place_of_its_tiers(make_rig: MakeRig) -> None:
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object", "required": ["name"]}},
    }
    rig = make_rig(basic=CHECKED)
    rig.models["small"].behaviour = saying("[]")  # too short for the tier's own checks
    rig.models["middle"].behaviour = saying('{"name": "x"}')
    off = rig.accept("a", tier="basic", escalate_on=False)
    own = rig.accept("b", tier="basic", escalate_on=["json_schema"], response_format=schema)
    await rig.run(off, own)

    assert (rig.result(off.id)["tier"], rig.result(off.id)["text"]) == ("basic", "[]")
    assert (rig.result(own.id)["tier"], rig.result(own.id)["text"]) == (
        "standard",
        '{"name": "x"}',
    )


async def test_who_names_a_model_gets_its_answer(make_rig: MakeRig) -> None:
    rig = make_rig(basic=CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL)
    spec = rig.accept("Hi", tier="basic", model="small")
    await rig.run(spec)

    assert (rig.result(spec.id)["text"], rig.result(spec.id)["tier"]) == (REFUSAL, "basic")


async def test_a_cancellation_while_it_moves_is_heard(make_rig: MakeRig) -> None:
    rig = make_rig(**ALL_CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL)
    rig.follow = False  # the next tier's workers are busy
    spec = rig.accept("Hi", tier="basic")
    await rig.run(spec)
    assert (rig.job(spec.id)["tier"], rig.job(spec.id)["state"]) == ("standard", "queued")

    with rig.rows.begin() as connection:
        request_cancel(connection, [spec.id], tenant=spec.tenant)
    rig.follow = True
    await rig.run(spec)  # its doorbell is stale

    row = rig.result(spec.id)
    assert (row["state"], row["calls"]) == ("cancelled", 1)
    assert rig.bill(spec.id) == [("basic", "small", 1, 15)]
    assert row["decision"]["tier"]["escalated_from"][0]["check"] == "refusal"
    assert rig.models["middle"].calls == []


async def test_a_worker_that_is_lost_while_it_moves_a_job_loses_and_doubles_nothing(
    make_rig: MakeRig,
) -> None:
    lost, other = make_rig(basic=CHECKED), make_rig(basic=CHECKED)
    lost.models["small"].behaviour = other.models["small"].behaviour = saying(REFUSAL)
    gate = Gate(lost.models["small"])
    spec = lost.accept("Hi", tier="basic")
    lost.follow = False
    lost.take("basic", spec.id)
    await lost.models["small"].asked()

    # Its lease is over, and another worker has the job before the first one's answer comes.
    change(lost.rows, spec.id, lease_until=ago(1), sweep_at=ago(1))
    with lost.rows.begin() as connection:
        assert sweep(connection).verdicts == {"lost": 1}
    await other.run(spec)
    gate.open.set()
    await lost.settled()

    row = other.result(spec.id)
    assert (row["state"], row["text"], row["tier"]) == ("succeeded", "fine", "standard")
    assert (row["calls"], row["unknown_calls"]) == (3, 1)  # the lost one's call is charged, too
    assert sum(calls for _, _, calls, _ in other.bill(spec.id)) == 3
    assert len(decided(other, spec)["escalated_from"]) == 1  # type: ignore[arg-type]


async def test_a_drain_gives_a_job_back_to_the_tier_it_is_in(make_rig: MakeRig) -> None:
    rig, other = make_rig(**ALL_CHECKED), make_rig(**ALL_CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL)
    gate = Gate(rig.models["middle"])
    spec = rig.accept("Hi", tier="basic")
    rig.take("basic", spec.id)
    await rig.models["middle"].asked()
    rig.follow = False
    rig.claims.abort_all(Abort.DRAINED)
    await rig.settled()
    gate.open.set()

    assert (rig.job(spec.id)["tier"], rig.job(spec.id)["state"]) == ("standard", "queued")
    other.take("standard", spec.id)
    await other.settled()
    assert (other.result(spec.id)["calls"], other.result(spec.id)["unknown_calls"]) == (3, 1)
    assert len(decided(other, spec)["escalated_from"]) == 1  # type: ignore[arg-type]


# -- triage -------------------------------------------------------------------------------------


async def test_triage_asks_the_small_model_and_moves_the_job(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE)
    rig.models["small"].behaviour = saying("High.")
    spec = rig.accept("Hi", tier="auto", max_tokens=77)
    assert spec.tier == "basic"
    await rig.run(spec)

    row = rig.result(spec.id)
    assert (row["state"], row["tier"], row["text"], row["calls"]) == (
        "succeeded",
        "advanced",
        "fine",
        2,
    )
    told = decided(rig, spec)
    assert (told["asked"], told["by"], told["chosen"], told["level"]) == (
        "auto",
        "triage",
        "advanced",
        "high",
    )
    (question,) = rig.asked("small")
    assert question["max_tokens"] == 8
    assert "Hi" in question["messages"][-1]["content"]
    assert rig.asked("large") == [
        {"max_tokens": 77, "messages": [{"content": "Hi", "role": "user"}]}
    ]
    assert rig.bill(spec.id) == [("basic", "small", 1, 15), ("advanced", "large", 1, 15)]


async def test_a_verdict_for_its_own_tier_is_answered_there(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE)
    rig.models["small"].behaviour = saying("low", "an answer")
    spec = rig.accept("Hi", tier="auto")
    await rig.run(spec)

    row = rig.result(spec.id)
    assert (row["tier"], row["text"], row["calls"], row["attempts"]) == (
        "basic",
        "an answer",
        2,
        1,
    )
    assert rig.job(spec.id)["deferrals"] == 0


async def test_an_equal_prompt_needs_no_second_triage(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE)
    rig.models["small"].behaviour = saying("high")
    await rig.run(rig.accept("Hi", tier="auto"))
    again = rig.accept("Hi", tier="auto")
    await rig.run(again)

    assert len(rig.models["small"].calls) == 1
    assert decided(rig, again)["by"] == "triage"
    assert (rig.result(again.id)["tier"], rig.result(again.id)["calls"]) == ("advanced", 0)


async def test_verdicts_stay_with_their_tenant(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE)
    rig.models["small"].behaviour = saying("high")
    await rig.run(rig.accept("Hi", tier="auto"))
    stranger = rig.accept("Hi", tier="auto")
    change(rig.rows, stranger.id, tenant="'stranger'")
    await rig.run(stranger)

    assert len(rig.models["small"].calls) == 2


async def test_what_the_caller_says_needs_no_triage(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE)
    assert rig.accept("Hi", tier="auto", complexity="medium").tier == "standard"
    careful = rig.accept("Hi", tier="auto", on_unknown="fail")
    assert careful.decision is not None
    assert careful.decision["tier"]["by"] == "rules"


@pytest.mark.parametrize(
    "behaviour", [saying("I would rather not say"), fail, refuse_for_now, refuse_for_good]
)
async def test_without_a_verdict_the_rules_decide_at_once(
    make_rig: MakeRig, behaviour: Callable[[Call], object]
) -> None:
    rig = make_rig(routing=TRIAGE)
    rig.models["small"].behaviour = behaviour  # type: ignore[assignment]
    spec = rig.accept(HARD, tier="auto")
    await rig.run(spec)

    assert (rig.result(spec.id)["state"], rig.result(spec.id)["tier"]) == ("succeeded", "advanced")
    assert decided(rig, spec)["by"] == "rules"


async def test_a_question_to_the_small_model_counts_among_a_jobs_calls(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE, advanced="[tiers.advanced.retry]\nmax_calls = 1")
    rig.models["small"].behaviour = saying("high")
    spec = rig.accept("Hi", tier="auto")
    await rig.run(spec)

    row = rig.result(spec.id)
    assert (row["state"], row["error"]["code"], row["calls"]) == ("failed", "max_calls", 1)
    assert rig.models["large"].calls == []


async def test_a_worker_that_is_lost_in_triage_costs_one_counted_call(make_rig: MakeRig) -> None:
    lost, other = make_rig(routing=TRIAGE), make_rig(routing=TRIAGE)
    lost.models["small"].behaviour = saying("high")
    gate = Gate(lost.models["small"])
    lost.follow = False
    spec = lost.accept(HARD, tier="auto")
    lost.take("basic", spec.id)
    await lost.models["small"].asked()
    change(lost.rows, spec.id, lease_until=ago(1), sweep_at=ago(1))
    with lost.rows.begin() as connection:
        assert sweep(connection).verdicts == {"lost": 1}
    gate.open.set()
    await lost.settled()
    await other.run(spec)

    row = other.result(spec.id)
    assert (row["state"], row["tier"]) == ("succeeded", "advanced")
    assert (row["calls"], row["unknown_calls"]) == (2, 1)
    assert decided(other, spec)["by"] == "rules"  # who has lost a worker is asked no questions
    assert other.models["small"].calls == []


async def test_a_cancellation_in_triage_ends_the_job(make_rig: MakeRig) -> None:
    rig = make_rig(routing=TRIAGE)
    Gate(rig.models["small"])
    spec = rig.accept("Hi", tier="auto")
    rig.take("basic", spec.id)
    await rig.models["small"].asked()
    rig.claims.abort(spec.id, Abort.CANCELLED)
    await rig.settled()

    row = rig.result(spec.id)
    assert (row["state"], row["calls"], row["unknown_calls"]) == ("cancelled", 1, 1)


# -- the shadow sample --------------------------------------------------------------------------

SHADOW = "[routing.shadow]\nshare = 1.0"


async def test_a_sample_runs_on_the_top_tier_too(make_rig: MakeRig) -> None:
    rig = make_rig(routing=SHADOW)
    rig.models["small"].behaviour = saying("a small answer")
    rig.models["large"].behaviour = saying("a large answer")
    spec = rig.accept("Hi", tier="auto", callback_url="https://example.com/hook")
    await rig.run(spec)

    second = rig.result(shadow_id(spec.id))
    assert (second["tier"], second["text"]) == ("advanced", "a large answer")
    assert second["metadata"] == {SHADOW_METADATA: str(spec.id)}
    assert second["tenant"] == spec.tenant
    assert rig.job(shadow_id(spec.id))["priority"] == 0
    assert rig.job(shadow_id(spec.id))["callback_url"] is None
    assert result_rows(rig.rows, shadow_id(shadow_id(spec.id))) == []
    with rig.rows.connect() as connection:
        (pair,) = shadow_pairs(connection, spec.tenant, since_s=60, limit=10)
        assert shadow_pairs(connection, "stranger", since_s=60, limit=10) == []
    assert (pair.chosen_text, pair.top_text) == ("a small answer", "a large answer")
    assert (pair.chosen_tier, pair.top_tier) == ("basic", "advanced")


async def test_only_auto_jobs_of_lower_tiers_have_shadows(make_rig: MakeRig) -> None:
    rig = make_rig(routing=SHADOW, basic=CHECKED)
    rig.models["small"].behaviour = saying(REFUSAL)
    plain, top = rig.accept("a", tier="basic"), rig.accept(HARD, tier="auto")
    await rig.run(plain, top)
    assert decided(rig, plain)["chosen"] == "standard"

    with rig.rows.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(jobs)) == 2
        found = read_results(connection, [plain.id], tenant=plain.tenant)
    assert found[plain.id].state is JobState.SUCCEEDED


def test_the_sample_is_always_the_same_and_about_as_large_as_asked() -> None:
    ids = [shadow_id(uuid7_of(n)) for n in range(2_000)]
    sampled = [id_ for id_ in ids if is_sampled(id_, 0.25)]
    assert sampled == [id_ for id_ in ids if is_sampled(id_, 0.25)]
    assert 400 < len(sampled) < 600
    assert len(set(ids)) == 2_000
    assert all(id_.version == 7 for id_ in ids)


def uuid7_of(n: int) -> uuid.UUID:
    return uuid.UUID(int=n << 80 | 7 << 76 | 2 << 62 | n)
