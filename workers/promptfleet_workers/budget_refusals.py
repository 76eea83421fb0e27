"""What becomes of a job that a budget has no money for."""

from __future__ import annotations

from promptfleet_shared.jobs import JobError
from promptfleet_workers.budgets import BudgetRefusal, Reason
from promptfleet_workers.endings import Endings
from promptfleet_workers.work import Work


def refuse(endings: Endings, work: Work, refusal: BudgetRefusal) -> None:
    """Give the job back until there may be money for it; or fail it, if that is too late."""
    work.note("budget", name=refusal.budget, reason=refusal.reason.value)
    wait_s = refusal.wait_s
    if wait_s is None or (refusal.reason is Reason.SPENT and wait_s >= work.remaining_s):
        message = f"the budget {refusal.budget!r} is spent until after the job's deadline"
        endings.fail(work, JobError(code="budget_exceeded", message=message))
    else:
        message = f"the budget {refusal.budget!r} has no money for the job now"
        error = JobError(code=f"budget_{refusal.reason.value}", message=message)
        endings.give_back(work, wait_s, counts=False, error=error)
