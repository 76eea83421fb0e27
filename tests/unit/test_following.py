"""Which answers OpenAI's streams hold back until they are final."""

from __future__ import annotations

from typing import Any

import pytest
from tests.rows import spec

from promptfleet.api.openai.following import may_be_replaced
from promptfleet_shared.fleet import Fleet, parse_fleet

FLEET = """
default_tier = "basic"
{routing}
[tiers.basic]
models = ["small"]
[tiers.middle]
models = ["small"]
{middle}
[tiers.top]
models = ["small"]
[tiers.top.escalate_on]
refusal = true
[models.small]
deployments = [{{ base_url = "http://small" }}]
"""
CHECKED = "[tiers.middle.escalate_on]\nrefusal = true"


def fleet(**parts: str) -> Fleet:
    return parse_fleet(FLEET.format(**{"routing": "", "middle": CHECKED, **parts}))


@pytest.mark.parametrize(
    ("fields", "held_back"),
    [
        ({"tier": "basic"}, False),
        ({"tier": "middle"}, True),
        ({"tier": "top"}, False),  # its answer is final, whatever its check says
        ({"tier": "gone"}, False),
        ({"tier": "middle", "model": "small"}, False),
        ({"tier": "middle", "policy": {"escalate_on": {}}}, False),
        ({"tier": "basic", "policy": {"escalate_on": {"refusal": True}}}, True),
        ({"tier": "top", "policy": {"escalate_on": {"refusal": True}}}, False),
        ({"tier": "basic", "decision": {"tier": {"asked": "auto", "by": "triage"}}}, True),
        ({"tier": "basic", "decision": {"tier": {"asked": "auto", "by": "rules"}}}, False),
    ],
)
def test_what_the_next_tier_may_replace_is_held_back(
    fields: dict[str, Any], *, held_back: bool
) -> None:
    assert may_be_replaced(spec(**fields), fleet()) is held_back


def test_without_checks_nothing_is_held_back() -> None:
    triaged = spec(tier="basic", decision={"tier": {"asked": "auto", "by": "triage"}})
    assert not may_be_replaced(triaged, fleet(middle=""))
