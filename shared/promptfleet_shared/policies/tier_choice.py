"""Decides `tier="auto"` for a request, by the caller's words, a scorer, and a tier's conditions."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.policies.complexity import (
    HIGHEST,
    LOWEST,
    Estimate,
    PromptFacts,
    estimate_complexity,
    prompt_facts,
)
from promptfleet_shared.policies.functions import find_function
from promptfleet_shared.policies.routing import (
    RULES,
    TRIAGE,
    Choice,
    Complexity,
    RoutingSection,
    TierRule,
    choose_tier,
    estimated_facts,
)
from promptfleet_shared.tiers import AUTO_TIER, DEFAULT_TIERS

log = logging.getLogger(__name__)

FUNCTION = "function"
DECISION = "tier"
"""The key of this feature in a job's decision."""

Find = Callable[[str], Callable[..., Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a scorer says of a prompt.

    Attributes:
        by: "rules", "function" or "triage".
        estimate: What the rules found, whoever has the last word on the complexity.
    """

    by: str
    level: Complexity
    score: float | None
    estimate: Estimate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A request's tier, and all that led to it.

    Attributes:
        tier: Where the job is queued: for a triage that is still to be made, the tier that makes
            it.
        verdict: The scorer's, if one was asked.
        choice: None while a triage has not been made.
    """

    tier: str
    verdict: Verdict | None = None
    choice: Choice | None = None

    def record(self) -> dict[str, Any]:
        """What the job's result tells."""
        if self.choice is None:
            return {"asked": AUTO_TIER, "by": TRIAGE}
        verdict = self.verdict
        by = self.choice.by
        record: dict[str, Any] = {"asked": AUTO_TIER, "chosen": self.tier, "by": by}
        if verdict is None:
            return record
        record["by"] = verdict.by
        if by == "no_match":
            record["no_match"] = True
        record |= {"level": verdict.level.value, "reasons": dict(verdict.estimate.reasons)}
        if verdict.score is not None:
            record["score"] = verdict.score
        return record


class TierChooser:
    """Chooses tiers; safe to use from many threads."""

    def __init__(
        self,
        rules: Sequence[TierRule],
        *,
        fallback: str,
        section: RoutingSection | None = None,
        triage_tier: str | None = None,
        find: Find = find_function,
    ) -> None:
        """Import nothing yet.

        Args:
            rules: A rule for each tier, from the cheapest to the best.
            fallback: The tier of prompts for which no tier's conditions hold.
            section: [routing] of fleet.toml.
            triage_tier: The tier whose workers ask the small model; None where no triage is made.
            find: Finds a user's function by its dotted path.
        """
        self._rules = tuple(rules)
        self._section = section or RoutingSection()
        self._fallback = self._section.on_no_match or fallback
        self._triage_tier = triage_tier
        self._find = functools.cache(find)
        self._broken: set[str] = set()

    @classmethod
    def of_names(cls, tiers: Sequence[str] | None, *, fallback: str) -> TierChooser:
        """For tiers of which nothing but the names is known."""
        names = tuple(tiers or DEFAULT_TIERS)
        return cls([TierRule(tier=name) for name in names], fallback=fallback)

    @property
    def tiers(self) -> tuple[str, ...]:
        """From the cheapest to the best."""
        return tuple(rule.tier for rule in self._rules)

    @property
    def checks(self) -> frozenset[str]:
        """The names of users' checks that a job may ask for."""
        return frozenset(self._section.checks)

    def decide(
        self, request: bytes | str, policy: Mapping[str, Any], *, may_triage: bool = True
    ) -> Decision:
        """The tier of a request.

        Args:
            request: The job's part of the provider's body, as JSON.
            policy: The job's options; `attributes` and `complexity` count here.
            may_triage: False for a request that must not wait for a small model's opinion.
        """
        if may_triage and self._section.scorer == TRIAGE and self._triage_tier is not None:
            if (choice := self._by_words_alone(policy)) is not None:
                return Decision(tier=choice.tier, choice=choice)
            return Decision(tier=self._triage_tier)
        return self._decide(request, policy, self._score)

    def decide_by_triage(
        self, request: bytes | str, policy: Mapping[str, Any], level: Complexity
    ) -> Decision:
        """The tier after a small model has said how hard the request is."""

        def verdict(facts: PromptFacts) -> Verdict:
            estimate = estimate_complexity(facts)
            return Verdict(by=TRIAGE, level=level, score=None, estimate=estimate)

        return self._decide(request, policy, verdict)

    def _decide(
        self,
        request: bytes | str,
        policy: Mapping[str, Any],
        judge: Callable[[PromptFacts], Verdict],
    ) -> Decision:
        verdicts: list[Verdict] = []
        stated = self._stated(policy)

        def estimated() -> Mapping[str, Any]:
            verdict = judge(prompt_facts(orjson.loads(request), policy.get("attributes") or {}))
            verdicts.append(verdict)
            return estimated_facts(verdict.estimate, verdict.level)

        choice = choose_tier(self._rules, stated, estimated, self._fallback)
        verdict = verdicts[0] if verdicts and choice.by != "attributes" else None
        return Decision(tier=choice.tier, choice=choice, verdict=verdict)

    def _by_words_alone(self, policy: Mapping[str, Any]) -> Choice | None:
        """The choice, if the caller has said enough for one."""

        def estimated() -> Mapping[str, Any]:
            return {"complexity": Complexity.LOW}

        choice = choose_tier(self._rules, self._stated(policy), estimated, self._fallback)
        return choice if choice.by == "attributes" else None

    def _stated(self, policy: Mapping[str, Any]) -> dict[str, Any]:
        """What the caller says, the complexity as one of the three steps."""
        stated = dict(policy.get("attributes") or {})
        complexity = policy.get("complexity", stated.get("complexity"))
        if complexity is not None:
            stated["complexity"] = self._level(complexity)
        return stated

    def _level(self, value: float | str) -> Complexity:
        return Complexity(value) if isinstance(value, str) else self._section.level(value)

    def _score(self, facts: PromptFacts) -> Verdict:
        estimate = estimate_complexity(facts)
        by, level = RULES, self._section.level(estimate.score)
        score: float | None = estimate.score
        path = self._section.scorer
        if ":" in path and (said := self._ask_function(path, facts)) is not None:
            by, level = FUNCTION, self._level(said)
            score = said if isinstance(said, float) else None
        return Verdict(by=by, level=level, score=score, estimate=estimate)

    def _ask_function(self, path: str, facts: PromptFacts) -> float | Complexity | None:
        """What the user's function says; None if it fails, and then the rules have the word."""
        if path in self._broken:
            return None
        try:
            function = self._find(path)
        except ConfigurationError as error:
            self._broken.add(path)
            log.warning("scorer_not_found", extra={"function": path, "error": error.message})
            return None
        try:
            return _valid(function(facts))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            # Never its text, which could hold the prompt.
            log.warning("scorer_failed", extra={"function": path, "error": type(error).__name__})
            return None


def _valid(said: object) -> float | Complexity:
    if isinstance(said, str):
        return Complexity(said)
    if isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said):
        raise TypeError(type(said).__name__)
    if not LOWEST <= said <= HIGHEST:
        raise ValueError("not from 1 to 10")
    return round(float(said), 2)
