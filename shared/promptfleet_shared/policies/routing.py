"""`tier="auto"`: the conditions of tiers, and which tier they choose; pure, for both sides.

A tier is a queue, so the choice is made before a job is accepted: from what the caller says of the
prompt, else from an estimate of how hard it is. The one exception is triage, where a small model
is asked by a worker.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from promptfleet_shared.policies.complexity import HIGHEST, LOWEST, Estimate
from promptfleet_shared.policies.section import Count, Section, Share
from promptfleet_shared.tiers import AUTO_TIER

RULES, TRIAGE = "rules", "triage"
DOTTED_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""A user's function, as in `my_app.prompts:score`."""


def _one_or_many(value: object) -> object:
    """A single one stands for a list of one."""
    return value if isinstance(value, list | tuple) else (value,)


def _scalars(value: object) -> tuple[object, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(item, str | bool | int | float) for item in values):
        msg = "must be a string, a number, true or false, or a list of these"
        raise ValueError(msg)
    return values


Score = Annotated[float, Field(ge=LOWEST, le=HIGHEST)]
DottedPath = Annotated[str, Field(pattern=DOTTED_PATH)]


class Complexity(enum.StrEnum):
    """How hard a prompt is, in three steps."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


ESTIMATED = frozenset({"complexity", "needs_reasoning", "needs_creativity", "is_simple_query"})
"""The attributes that an estimate has where the caller says nothing of them."""
KNOWN = ESTIMATED | {"critical_task"}


Levels = Annotated[tuple[Complexity, ...], Field(min_length=1), BeforeValidator(_one_or_many)]


class Conditions(Section):
    """What must be true of a prompt for its tier: all that stands here.

    Any other name is an attribute of your own: it holds where the caller gives that very value, or
    one of the values of a list.

    Attributes:
        complexity: "low", "medium" or "high", or a list of these.
        needs_reasoning: Whether the prompt asks for thought; estimated where the caller is silent.
        needs_creativity: Whether it asks for something made up; estimated likewise.
        is_simple_query: Whether it is short and asks for a fact or a rewording; estimated likewise.
        critical_task: What the caller says of it; false where it says nothing.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Annotated[Any, BeforeValidator(_scalars)]]  # pyright: ignore[reportIncompatibleVariableOverride]

    complexity: Levels | None = None
    needs_reasoning: bool | None = None
    needs_creativity: bool | None = None
    is_simple_query: bool | None = None
    critical_task: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.wanted():
            msg = "must have at least one condition"
            raise ValueError(msg)
        for name in self.__pydantic_extra__:
            if near := difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8):
                msg = f"{name!r} is too like {near[0]!r}: was that meant?"
                raise ValueError(msg)
        return self

    def wanted(self) -> Mapping[str, Any]:
        """The values that each attribute may have, by its name."""
        stated = {**dict(self), **self.__pydantic_extra__}
        return {name: value for name, value in stated.items() if value is not None}


AnyConditions = Annotated[
    tuple[Conditions, ...], Field(min_length=1), BeforeValidator(_one_or_many)
]
"""One table of conditions, or a list of them."""


class EscalateOn(Section):
    """What is wrong with a whole answer, so that the next tier is asked.

    Attributes:
        json_schema: True: it must follow the JSON schema of the request's `response_format` (or be
            JSON, for "json_object"), if it has one. Or a JSON schema that it must follow.
        refusal: True: it must not be a refusal.
        cut_off: True: it must not have ended for lack of tokens.
        min_chars: Characters that it must have.
        function: Your own check, as `module:function`, given the answer's text and the request
            (decoded JSON); false is a failure. In a job's option: the name of one of
            `[routing.checks]`.
    """

    json_schema: bool | dict[str, Any] = False
    refusal: bool = False
    cut_off: bool = False
    min_chars: Annotated[int, Field(ge=0)] = 0
    function: str | None = None

    @property
    def is_empty(self) -> bool:
        """True if nothing is checked."""
        return self == EscalateOn()


class TriageSection(Section):
    """Asking a small model how hard a prompt is.

    Attributes:
        model: A model of fleet.toml; by default the first of the first tier.
        max_tokens: Tokens that its verdict may have.
        cache_ttl_s: Seconds that a verdict is kept for equal prompts.
        max_chars: Characters of the prompt that it is shown: the begin and the end.
    """

    model: str | None = None
    max_tokens: Count = 8
    cache_ttl_s: Count = 86_400
    max_chars: Annotated[int, Field(ge=200)] = 4_000


class ShadowSection(Section):
    """Running a sample of `tier="auto"` on the top tier, too, to see what the choice costs.

    Attributes:
        share: Of the jobs that succeed on a lower tier, 0 to 1.
        priority: Of the second job; 0, the least urgent, by default.
        deadline_s: Seconds until it is of no use any more.
    """

    share: Share = 0.0
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    deadline_s: Annotated[float, Field(gt=0)] = 3_600.0


class RoutingSection(Section):
    """How `tier="auto"` is decided.

    Attributes:
        scorer: "rules", "triage", or a function of yours as `module:function`, given a
            `PromptFacts`: it returns a number from 1 to 10, or "low", "medium" or "high".
        medium_from: The score from which a prompt is of medium complexity, 1 to 10.
        high_from: The score from which it is of high complexity.
        on_no_match: The tier where no tier's conditions hold; the default tier without it.
        checks: Your functions that jobs may name in `escalate_on`, by these names.
    """

    scorer: str = RULES
    medium_from: Score = 3.0
    high_from: Score = 5.0
    on_no_match: str | None = None
    checks: dict[str, DottedPath] = Field(default_factory=dict)
    triage: TriageSection = TriageSection()
    shadow: ShadowSection = ShadowSection()

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.scorer not in {RULES, TRIAGE} and ":" not in self.scorer:
            msg = f'scorer: must be "{RULES}", "{TRIAGE}" or "module:function"'
            raise ValueError(msg)
        if self.high_from < self.medium_from:
            msg = "high_from: must not be below medium_from"
            raise ValueError(msg)
        return self

    def mistake(self, tiers: Sequence[str], models: Iterable[str]) -> str | None:
        """What does not fit the rest of fleet.toml, as `field: what is wrong`."""
        if AUTO_TIER in tiers:
            return f"tiers.{AUTO_TIER}: the name is taken: it stands for the choice among the tiers"
        if self.on_no_match is not None and self.on_no_match not in tiers:
            return f"routing.on_no_match: {self.on_no_match!r} is none of {', '.join(tiers)}"
        if self.triage.model is not None and self.triage.model not in models:
            return f"routing.triage.model: no [models.{self.triage.model}] is defined"
        return None

    def knows_check(self, name: str) -> bool:
        """True for a name of one of `checks`, or a function's path."""
        return name in self.checks or re.fullmatch(DOTTED_PATH, name) is not None

    def level(self, score: float) -> Complexity:
        """Which of the three steps a score is."""
        if score >= self.high_from:
            return Complexity.HIGH
        return Complexity.MEDIUM if score >= self.medium_from else Complexity.LOW


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TierRule:
    """A tier and what must be true of its prompts: one of these, each as a whole.

    Attributes:
        conditions: What each attribute may be, by its name; none where the tier has no conditions.
    """

    tier: str
    conditions: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Whether one condition of a tier holds, to explain a decision."""

    tier: str
    attribute: str
    wanted: Any
    found: Any
    holds: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The tier of a prompt, and why.

    Attributes:
        by: "attributes" where the caller's words were enough, "estimate", or "no_match".
        estimate: What was estimated, if anything had to be.
        checks: The conditions that were looked at, in order.
    """

    tier: str
    by: str
    estimate: Mapping[str, Any] | None = None
    checks: tuple[Check, ...] = ()


def tier_rule(tier: str, conditions: Sequence[Conditions] | None) -> TierRule:
    """The rule of a section of fleet.toml."""
    return TierRule(tier=tier, conditions=tuple(item.wanted() for item in conditions or ()))


def choose_tier(
    rules: Sequence[TierRule],
    stated: Mapping[str, Any],
    estimated: Callable[[], Mapping[str, Any]],
    fallback: str,
) -> Choice:
    """The tier for a prompt.

    First what the caller states, by itself: the first tier of which one set of conditions is
    stated in full, and holds. Else the first of which it holds with what is estimated. Where no
    tier has conditions, the complexity alone chooses: low is the first tier, high the last.

    Args:
        rules: A rule for each tier, from the cheapest to the best.
        stated: The caller's attributes; `complexity` as a `Complexity`.
        estimated: Gives the attributes of `ESTIMATED`; called once at most, only where needed.
        fallback: The tier where nothing holds.
    """
    checks: list[Check] = []
    if (tier := _first(rules, stated, checks)) is not None:
        return Choice(tier=tier, by="attributes", checks=tuple(checks))
    facts = {"critical_task": False, **estimated(), **stated}
    has_conditions = any(rule.conditions for rule in rules)
    by = "attributes" if "complexity" in stated and not has_conditions else "estimate"
    checks.clear()
    if not has_conditions:
        chosen = rules[_by_level(len(rules), Complexity(facts["complexity"]))].tier
        return Choice(tier=chosen, by=by, estimate=facts)
    tier = _first(rules, facts, checks)
    if tier is None:
        return Choice(tier=fallback, by="no_match", estimate=facts, checks=tuple(checks))
    return Choice(tier=tier, by=by, estimate=facts, checks=tuple(checks))


def _first(
    rules: Sequence[TierRule],
    facts: Mapping[str, Any],
    checks: list[Check],
) -> str | None:
    """The first tier of which a set of conditions holds; what is not among the facts does not."""
    for rule in rules:
        for wanted in rule.conditions:
            found = [_check(rule.tier, name, value, facts) for name, value in wanted.items()]
            checks.extend(found)
            if all(check.holds for check in found):
                return rule.tier
    return None


def _check(tier: str, name: str, wanted: object, facts: Mapping[str, Any]) -> Check:
    accepted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = facts.get(name)
    holds = any(_same(found, value) for value in accepted)
    return Check(tier=tier, attribute=name, wanted=wanted, found=found, holds=holds)


def _same(found: object, wanted: object) -> bool:
    """Equal, and not merely as 1 and True are."""
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def _by_level(tiers: int, level: Complexity) -> int:
    """Of two tiers, a prompt of medium complexity gets the better one."""
    return {Complexity.LOW: 0, Complexity.MEDIUM: tiers // 2, Complexity.HIGH: tiers - 1}[level]


def estimated_facts(estimate: Estimate, level: Complexity) -> dict[str, Any]:
    """The attributes that conditions ask for, of an estimate by the rules."""
    return {
        "complexity": level,
        "needs_reasoning": estimate.needs_reasoning,
        "needs_creativity": estimate.needs_creativity,
        "is_simple_query": estimate.is_simple_query,
    }


def next_tier(tiers: Iterable[str], tier: str) -> str | None:
    """The tier after this one; None after the last."""
    names = list(tiers)
    at = names.index(tier) + 1 if tier in names else len(names)
    return names[at] if at < len(names) else None
