"""What a tier makes of its requests: the bound of their answers, and triage before they run."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import CacheMode, ClaimedJob, JobKind
from promptfleet_shared.policies.routing import TRIAGE
from promptfleet_shared.policies.tier_choice import DECISION
from promptfleet_workers.endings import Endings
from promptfleet_workers.routing import Router
from promptfleet_workers.triage import Triage
from promptfleet_workers.work import Work

BYTES_A_TOKEN = 4
_BOUNDS = ("max_tokens", "max_completion_tokens")
_WITH_BOUND = frozenset({JobKind.CHAT, JobKind.COMPLETION})


class Tiering:
    """Prepares claimed jobs by their tiers, before anything else is done about them."""

    def __init__(self, *, fleet: Fleet, router: Router, triage: Triage, endings: Endings) -> None:
        """Ask nobody yet.

        Args:
            fleet: Tiers and their bounds.
            router: Where the small model is.
            triage: What it is asked.
            endings: Moves jobs to their tiers.
        """
        self._bounds = {
            name: section.max_tokens
            for name, section in fleet.tiers.items()
            if section.max_tokens is not None
        }
        self._router = router
        self._endings = endings
        self._triage = triage

    async def sift(self, works: list[Work]) -> tuple[list[Work], list[Work]]:
        """Prepare works: those that can go on, and those whose triage is to be called for first."""
        undecided = [work for work in works if _is_undecided(work.job)]
        if undecided:
            works = [work for work in works if not _is_undecided(work.job)]
        if self._bounds:
            for work in works:
                self._bound(work)
        return works, (await self._sift(undecided) if undecided else [])

    def _bound(self, work: Work) -> None:
        most = self._bounds.get(work.job.tier)
        if most is not None and work.job.kind in _WITH_BOUND:
            work.request = bounded(work.request, most)

    async def _sift(self, works: Sequence[Work]) -> list[Work]:
        """Move those whose verdict is known, or that nobody may be asked about."""
        asking = []
        for work in works:
            if self._may_ask(work) and self._set_up(work):
                asking.append(work)
            else:
                self._endings.choose_tier(work, None)
        levels = await self._triage.known([work.triage_key for work in asking])
        for work, level in zip(asking, levels, strict=True):
            if level is not None:
                self._endings.choose_tier(work, level)
        return [work for work in asking if not work.ended]

    def _may_ask(self, work: Work) -> bool:
        """False for a job that has lost a worker, or must not cost a call."""
        job = work.job
        return job.crashes == 0 and job.cache.mode is not CacheMode.ONLY

    def _set_up(self, work: Work) -> bool:
        """Make it ask the small model instead; false if there is none."""
        route = self._router.route(work.job._replace(model=self._triage.model))
        if self._triage.model is None or not route:
            return False
        work.triage_key = self._triage.key(work.job)
        work.request = self._triage.request(work.job)
        work.route = route
        work.triage_of = work.job
        # The question is a small chat of its own: no stream of the job may show its answer.
        work.job = work.job._replace(
            kind=JobKind.CHAT, stream=False, input_tokens=len(work.request) // BYTES_A_TOKEN
        )
        return True


def _is_undecided(job: ClaimedJob) -> bool:
    """True for one that was queued for triage and has had none."""
    decided = job.decision.get(DECISION) if job.decision else None
    return decided is not None and "chosen" not in decided and decided.get("by") == TRIAGE


def bounded(request: str, most: int) -> str:
    """The request with a bound of its answer's tokens: `most`, or its own if that is lower.

    Example:
        >>> bounded('{"messages":[]}', 100)
        '{"max_tokens":100,"messages":[]}'
    """
    if not any(f'"{name}"' in request for name in _BOUNDS):
        return f'{{"max_tokens":{most},{request[1:]}'
    body = orjson.loads(request)
    given = [name for name in _BOUNDS if isinstance(body.get(name), int)]
    if not given:
        return f'{{"max_tokens":{most},{request[1:]}'
    if all(body[name] <= most for name in given):
        return request
    body.update({name: min(most, body[name]) for name in given})
    return orjson.dumps(body).decode()
