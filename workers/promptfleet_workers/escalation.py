"""Which answers are not good enough for their tier, and which tier is asked next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import JobKind
from promptfleet_shared.policies.routing import EscalateOn, next_tier
from promptfleet_shared.policies.tier_choice import DECISION
from promptfleet_workers.answer_checks import AnswerChecks
from promptfleet_workers.providers.protocol import Completion
from promptfleet_workers.work import Work

OPTION = "escalate_on"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failing:
    """An answer that is not good enough.

    Attributes:
        check: Which check it failed.
        tier: The tier that is to go on; None where the answer is final all the same.
    """

    check: str
    tier: str | None


class AnswerJudge(Protocol):
    """Says whether a whole answer is good enough."""

    def judge(self, work: Work, completion: Completion) -> Failing | None:
        """What is wrong with the answer; None if nothing is."""
        ...


class Escalation:
    """Judges by the checks of the job's tier, or by its own."""

    def __init__(self, fleet: Fleet, checks: AnswerChecks | None = None) -> None:
        """Check nothing yet.

        Args:
            fleet: Tiers in order, their checks, and how many calls a job may cost.
            checks: How answers are checked.
        """
        self._fleet = fleet
        self._checks = checks or AnswerChecks(fleet.routing.checks)
        self._of_tier = {
            name: section.escalate_on
            for name, section in fleet.tiers.items()
            if section.escalate_on is not None and not section.escalate_on.is_empty
        }

    def judge(self, work: Work, completion: Completion) -> Failing | None:
        """What is wrong with the answer; None if nothing is.

        A stream is judged at its end: the next tier's answer is a new take, as a retry's is, and
        takes the place of what readers have. A job that names its model gets that model's answer.
        """
        job = work.job
        own = job.policy.get(OPTION)
        checks = self._of_tier.get(job.tier) if own is None else self._own(own)
        if checks is None or job.kind is JobKind.EMBEDDING:
            return None
        failed = self._checks.failed(checks, job.request, completion)
        if failed is None:
            return None
        return Failing(check=failed, tier=self._next(work))

    def _own(self, option: Mapping[str, Any]) -> EscalateOn | None:
        """A job's own checks; of functions, only those that fleet.toml names."""
        try:
            checks = EscalateOn(**option)
        except (ValidationError, TypeError):
            return None
        if checks.function is not None and checks.function not in self._fleet.routing.checks:
            checks = checks.model_copy(update={"function": None})
        return None if checks.is_empty else checks

    def _next(self, work: Work) -> str | None:
        """The tier after the job's; None where it may not go on."""
        if work.job.model is not None:
            return None
        tier = next_tier(self._fleet.tier_names, work.job.tier)
        if tier is None or work.all_calls >= self._fleet.retry_options(tier).max_calls:
            return None
        # With less time than this answer took, there would be none in the end.
        return tier if work.remaining_s > (work.provider_ms or 0.0) / 1000 else None


def tier_record(work: Work) -> dict[str, Any]:
    """What is known of how the job came to its tier; a copy."""
    known = work.job.decision.get(DECISION) or {"asked": work.job.tier, "by": "caller"}
    return {**known, **(work.decision or {}).get(DECISION, {})}
