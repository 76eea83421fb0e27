"""Conditions, the choice by them, and the options that it goes by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet.options import check_option
from promptfleet.requests import Defaults, make_spec
from promptfleet_shared.errors import ConfigurationError, InvalidRequestError
from promptfleet_shared.fleet import parse_fleet
from promptfleet_shared.jobs import JobSpec
from promptfleet_shared.policies.complexity import PromptFacts
from promptfleet_shared.policies.functions import find_function
from promptfleet_shared.policies.routing import Complexity, RoutingSection, TierRule, next_tier
from promptfleet_shared.policies.tier_choice import TierChooser

FLEET = """
default_tier = "standard"
[routing]
{routing}
[tiers.basic]
models = ["m"]
conditions = {{ complexity = "low", needs_reasoning = false }}
[tiers.standard]
models = ["m"]
conditions = [{{ complexity = ["low", "medium"] }}, {{ language = ["de", "fr"] }}]
[tiers.advanced]
models = ["m"]
conditions = [{{ complexity = "high" }}, {{ critical_task = true }}]
[models.m]
deployments = [{{ base_url = "http://m" }}]
"""
EASY, HARD = "What is the capital of France?", "Prove step by step why x^2 = 2. Compare 3 proofs."


def chooser(routing: str = "", **more: Any) -> TierChooser:
    fleet = parse_fleet(FLEET.format(routing=routing))
    rules = fleet.tier_chooser()._rules
    return TierChooser(rules, fallback="standard", section=fleet.routing, **more)


def chosen(text: str, routing: str = "", /, **policy: Any) -> Mapping[str, Any]:
    return chooser(routing).decide(request(text), policy).record()


def request(text: str) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": text}]})


def test_estimates_choose_where_nothing_is_said() -> None:
    assert chosen(EASY)["chosen"] == "basic"
    assert chosen(HARD)["chosen"] == "advanced"
    assert chosen(HARD)["by"] == "rules"


def test_what_is_said_in_full_comes_before_all_estimates() -> None:
    told = chosen(EASY, attributes={"critical_task": True})
    assert told == {"asked": "auto", "chosen": "advanced", "by": "attributes"}
    assert chosen(HARD, attributes={"language": "de"})["chosen"] == "standard"
    assert chosen(EASY, complexity="high")["chosen"] == "advanced"
    assert chosen(EASY, complexity=9.5)["chosen"] == "advanced"


def test_what_is_said_in_part_is_completed_by_estimates() -> None:
    assert chosen(EASY, attributes={"needs_reasoning": True})["chosen"] == "standard"
    assert chosen(EASY, attributes={"language": "en"})["chosen"] == "basic"


def test_an_own_attribute_holds_for_its_very_value() -> None:
    rules = [TierRule(tier="a", conditions=({"n": (1,)},)), TierRule(tier="b")]
    own = TierChooser(rules, fallback="b")
    assert own.decide(request("x"), {"attributes": {"n": 1}}).tier == "a"
    assert own.decide(request("x"), {"attributes": {"n": True}}).tier == "b"
    assert own.decide(request("x"), {"attributes": {"n": "1"}}).tier == "b"


def test_where_nothing_holds_the_default_tier_or_another_one_is_chosen() -> None:
    rules = [TierRule(tier="a", conditions=({"n": (1,)},)), TierRule(tier="b"), TierRule(tier="c")]
    assert TierChooser(rules, fallback="b").decide(request("x"), {}).record()["no_match"] is True
    section = RoutingSection(on_no_match="c")
    assert TierChooser(rules, fallback="b", section=section).decide(request("x"), {}).tier == "c"


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        (["a"], ["a", "a", "a"]),
        (["a", "b"], ["a", "b", "b"]),
        (["a", "b", "c"], ["a", "b", "c"]),
        (["a", "b", "c", "d"], ["a", "c", "d"]),
    ],
)
def test_without_conditions_complexity_alone_chooses(tiers: list[str], expected: list[str]) -> None:
    plain = TierChooser.of_names(tiers, fallback="a")
    found = [plain.decide(request("x"), {"complexity": level}).tier for level in Complexity]
    assert found == expected


def test_the_steps_of_the_scale_are_settable() -> None:
    section = RoutingSection(medium_from=2, high_from=2.5)
    assert [section.level(score) for score in (1.9, 2, 2.5)] == ["low", "medium", "high"]


@given(st.sampled_from(Complexity), st.floats(1, 10), st.dictionaries(st.text(), st.booleans()))
def test_any_policy_chooses_one_of_the_tiers(
    level: Complexity, score: float, attributes: dict[str, bool]
) -> None:
    attributes = {name: value for name, value in attributes.items() if name != "complexity"}
    for complexity in (None, level.value, score):
        policy: dict[str, Any] = {"attributes": attributes}
        if complexity is not None:
            policy["complexity"] = complexity
        decision = chooser().decide(request(EASY), policy)
        assert decision.tier in {"basic", "standard", "advanced"}
        orjson.dumps(decision.record())


def test_tiers_follow_each_other_and_end() -> None:
    tiers = ("a", "b", "c")
    assert [next_tier(tiers, tier) for tier in (*tiers, "gone")] == ["b", "c", None, None]


# -- a function of the user's -------------------------------------------------------------------


def finding(function: Callable[[PromptFacts], object]) -> Callable[[str], Any]:
    return lambda _: function


def asked(function: Callable[[PromptFacts], object], **policy: Any) -> Mapping[str, Any]:
    made = chooser('scorer = "mine:score"', find=finding(function))
    return made.decide(request(EASY), policy).record()


def test_a_users_function_scores() -> None:
    seen: list[PromptFacts] = []

    def score(facts: PromptFacts) -> float:
        seen.append(facts)
        return 8

    told = asked(score, attributes={"lang": "en"})
    assert (told["chosen"], told["by"], told["score"]) == ("advanced", "function", 8.0)
    assert (seen[0].text, seen[0].attributes) == (EASY, {"lang": "en"})
    assert asked(lambda _: "medium")["chosen"] == "standard"


def explode(facts: PromptFacts) -> float:
    raise ValueError(facts.text)


@pytest.mark.parametrize(
    "bad",
    [explode, lambda _: None, lambda _: True, lambda _: 11, lambda _: float("nan"), lambda _: "x"],
)
def test_where_a_users_function_fails_the_rules_decide_and_the_log_has_no_prompt(
    bad: Callable[[PromptFacts], object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        told = asked(bad)
    assert (told["chosen"], told["by"]) == ("basic", "rules")
    (record,) = caplog.records
    assert record.message == "scorer_failed"
    assert EASY not in str(record.__dict__)


def test_a_function_that_is_missing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    made = chooser('scorer = "no_such_module:score"')
    for _ in range(3):
        assert made.decide(request(EASY), {}).tier == "basic"
    assert [record.message for record in caplog.records] == ["scorer_not_found"]


def test_functions_are_found_by_their_path() -> None:
    assert find_function("os.path:join")("a", "b") == "a/b"
    with pytest.raises(ConfigurationError, match=r"can't import no\.such"):
        find_function("no.such:thing")
    with pytest.raises(ConfigurationError, match="has no function"):
        find_function("os.path:nothing")


# -- triage -------------------------------------------------------------------------------------


def test_a_triage_is_only_made_where_it_decides_something() -> None:
    made = chooser('scorer = "triage"', triage_tier="basic")
    assert made.decide(request(EASY), {}).record() == {"asked": "auto", "by": "triage"}
    assert made.decide(request(HARD), {}).tier == "basic"
    assert made.decide(request(EASY), {"complexity": "high"}).tier == "advanced"
    assert made.decide(request(HARD), {}, may_triage=False).record()["by"] == "rules"
    after = made.decide_by_triage(request(EASY), {}, Complexity.HIGH)
    assert (after.tier, after.record()["by"]) == ("advanced", "triage")


# -- options ------------------------------------------------------------------------------------


def spec(**options: Any) -> JobSpec:
    fleet = parse_fleet(FLEET.format(routing='[routing.checks]\nnice = "a:b"'))
    defaults = Defaults(tier="standard", tiers=fleet.tier_names, chooser=fleet.tier_chooser())
    return make_spec(options.pop("prompt", EASY), options, defaults)


def test_a_submission_carries_its_tier_and_why() -> None:
    auto = spec(tier="auto", attributes={"critical_task": True})
    assert (auto.tier, auto.policy) == ("advanced", {"attributes": {"critical_task": True}})
    assert auto.decision == {"tier": {"asked": "auto", "chosen": "advanced", "by": "attributes"}}
    assert spec(tier="basic").decision is None
    assert make_spec(EASY, {"tier": "auto"}, Defaults()).tier == "basic"


def test_the_forms_of_escalate_on() -> None:
    assert check_option("escalate_on", False) == {}
    assert check_option("escalate_on", "refusal") == {"refusal": True}
    assert check_option("escalate_on", ["json_schema", "cut_off"]) == {
        "json_schema": True,
        "cut_off": True,
    }
    mapping = {"json_schema": {"type": "object"}, "min_chars": 5, "function": "nice"}
    assert check_option("escalate_on", mapping) == mapping
    assert spec(escalate_on=mapping).policy == {"escalate_on": mapping}


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("complexity", "hard", "complexity"),
        ("complexity", 0.5, "complexity"),
        ("complexity", True, "complexity"),
        ("attributes", ["a"], "attributes"),
        ("attributes", {1: 2}, "attributes"),
        ("attributes", {"a": None}, "attributes.a"),
        ("attributes", {"a": "x\0"}, "attributes.a"),
        ("attributes", {"a": float("inf")}, "attributes.a"),
        ("attributes", {"needs_reasoning": "yes"}, "attributes.needs_reasoning"),
        ("attributes", {"complexity": "hard"}, "attributes.complexity"),
        ("attributes", {str(n): n for n in range(33)}, "attributes"),
        ("escalate_on", True, "escalate_on"),
        ("escalate_on", "min_chars", "escalate_on"),
        ("escalate_on", {"refusl": True}, "escalate_on"),
        ("escalate_on", {"refusal": 1}, "escalate_on.refusal"),
        ("escalate_on", {"min_chars": -1}, "escalate_on.min_chars"),
        ("escalate_on", {"json_schema": {"x": {1, 2}}}, "escalate_on.json_schema"),
        ("escalate_on", {"json_schema": {"x": "y" * 70_000}}, "escalate_on.json_schema"),
        ("escalate_on", {"function": "os:system"}, "escalate_on.function"),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        spec(tier="auto", **{option: value})
    assert caught.value.field == field
    assert "os:system" not in caught.value.message


# -- fleet.toml ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ('complexity = "low"', 'complexity = "tiny"', "complexity.0: Input should be 'low', 'med"),
        ("needs_reasoning", "need_reasoning", "'need_reasoning' is too like 'needs_reasoning'"),
        ('"fr"', "{}", "language: must be a string, a number, true or false, or a list of these"),
        ("[tiers.basic]", "[tiers.auto]", "tiers.auto: the name is taken"),
        ("[routing]", '[routing]\nscorer = "magic"', "scorer: must be"),
        ("[routing]", '[routing]\non_no_match = "x"', "routing.on_no_match: 'x' is none of basic"),
        ("[routing]", "[routing]\nhigh_from = 1", "high_from: must not be below medium_from"),
        ("[routing]", '[routing.triage]\nmodel = "x"', "routing.triage.model: no [models.x]"),
        ("[routing]", '[routing.checks]\na = "b"', "routing.checks.a: String should match"),
        (
            "[tiers.standard]",
            '[tiers.basic.escalate_on]\nfunction = "x"\n[tiers.standard]',
            "tiers.basic.escalate_on.function: must be module:function, or one of",
        ),
    ],
)
def test_a_mistake_in_fleet_toml_is_named(old: str, new: str, mistake: str) -> None:
    text = FLEET.format(routing="")
    assert old in text
    with pytest.raises(ConfigurationError) as caught:
        parse_fleet(text.replace(old, new, 1))
    assert mistake in caught.value.message
