"""The pipeline's step that makes requests fit: whole batches, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import ClaimedJob, JobError, JobKind, Usage
from promptfleet_shared.policies.context import BM25, ContextOptions, ContextSection
from promptfleet_shared.policies.conversations import (
    MemoryOptions,
    MemorySection,
    MemoryStrategy,
)
from promptfleet_shared.store import conversations as store
from promptfleet_shared.store.conversations import Ask, NewSummary, Recollection
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.context.errands import Answers, Errand, ErrandSender
from promptfleet_workers.context.estimates import Estimates
from promptfleet_workers.context.fitting import Fitted, fit
from promptfleet_workers.context.remembering import Remembered, remember
from promptfleet_workers.context.windows import Window, smallest, windows_of
from promptfleet_workers.endings import Endings
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 1.0
FIRST_SLEEP_S = 2.0
LONGEST_SLEEP_S = 15.0
"""For an earlier turn, whose end wakes the next one: how long to rely on that."""
DATABASE_WAIT_S = 1.0
BYTES_A_TOKEN = 4
"""A token is a byte at least, so that a request of n bytes has n tokens at most …"""
TOKENS_A_PICTURES_BYTE = 18
"""… but for pictures: one of 765 tokens takes 44 bytes of JSON at least."""
_PICTURE = '"image_url"'
WINDOW_BYTES_A_TOKEN = 32
"""Of remembered turns, so much JSON a token is read: more than any text of them has."""
SUMMARY_BYTES = 4_000_000
KEPT_ROUTES = 1024

_TOO_LONG = JobError(
    code="context_length_exceeded", message="no model that may answer can hold the request"
)
_NO_ANSWERS: Answers = {}
_Route = tuple[Candidate, ...]


class Fitter:
    """Recalls conversations and fits requests to their models; see `Fitting` in the pipeline.

    A job that is neither near a window nor part of a conversation costs a comparison.
    """

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        endings: Endings,
        errands: ErrandSender,
        estimates: Estimates | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        """Look up the windows of the fleet's models."""
        self._database = database
        self._fleet = fleet
        self._endings = endings
        self._errands = errands
        self._estimates = estimates or Estimates()
        self._random = random
        endings.counted = self._settle
        self._windows = windows_of(fleet)
        self._small = {
            tier: self._small_input(section.models) for tier, section in fleet.tiers.items()
        }
        # By the id of a route, which is kept beside, so that its id stays its own.
        self._rooms: dict[int, tuple[_Route, int | None]] = {}
        self._routes: dict[tuple[int, tuple[str, ...]], tuple[_Route, _Route]] = {}

    def part(self, tier: str, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """Those that are sent as they are, and those that `fit` has to look at."""
        small = self._small.get(tier, 0)
        special = [
            work
            for work in works
            if work.job.input_tokens > small or work.job.policy or work.job.model is not None
        ]
        if special:
            special = [work for work in special if self._needs_look(work)]
        if not special:
            return list(works), special
        chosen = set(map(id, special))
        return [work for work in works if id(work) not in chosen], special

    async def fit(self, works: Sequence[Work]) -> list[Work]:
        """Recall and fit; those that can't go on now are given back or ended.

        Returns:
            The others; their request, route and estimate may be different.
        """
        try:
            await self._recall([work for work in works if _memory_id(work.job)])
            await self._fit_all([work for work in works if not work.ended and self._is_near(work)])
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("not_fitted", extra={"jobs": len(works), "error": str(error)})
            for work in works:
                if not self._endings.given_up(work):
                    self._endings.give_back(work, DATABASE_WAIT_S, counts=False)
        return [work for work in works if not work.ended]

    def _settle(self, work: Work, usage: Usage, candidate: Candidate) -> None:
        """The provider has counted a request that was counted here, too."""
        if work.counted is None or usage.input == work.job.input_tokens:
            return  # the latter: it did not count, and our own estimate stands there
        vocabulary, counted = work.counted
        if candidate.model_there == vocabulary:
            self._estimates.settle(vocabulary, counted, usage.input)

    # -- who needs it ------------------------------------------------------------------------

    def _small_input(self, models: tuple[str, ...]) -> int:
        """The estimate (a job's `input_tokens`) up to which nothing needs to be counted."""
        room = smallest(self._windows, models, self._fleet.context.reserve_output_tokens)
        if room is None:
            return 2**62
        return room // (BYTES_A_TOKEN * TOKENS_A_PICTURES_BYTE)

    def _needs_look(self, work: Work) -> bool:
        return "memory_id" in work.job.policy or self._is_near(work)

    def _is_near(self, work: Work) -> bool:
        """True unless the request fits for sure, by its bytes."""
        room = self._sure_room(work)
        if room is None:
            return False
        most = work.job.input_tokens * BYTES_A_TOKEN
        if work.job.kind is JobKind.CHAT and _PICTURE in work.request:
            most *= TOKENS_A_PICTURES_BYTE
        return most > room

    def _sure_room(self, work: Work) -> int | None:
        """Tokens that fit every model of its route, whatever it asks for."""
        if "context" in work.job.policy:
            return self._smallest(work.route, self._section(work.job).reserve_output_tokens)
        known = self._rooms.get(id(work.route))
        if known is not None:
            return known[1]
        if len(self._rooms) >= KEPT_ROUTES:
            self._rooms.clear()
        room = self._smallest(work.route, self._fleet.context.reserve_output_tokens)
        self._rooms[id(work.route)] = (work.route, room)
        return room

    def _smallest(self, route: _Route, reserve: int) -> int | None:
        models = tuple(dict.fromkeys(candidate.model for candidate in route))
        return smallest(self._windows, models, reserve)

    def _section(self, job: ClaimedJob) -> ContextSection:
        given = job.policy.get("context")
        if given is None:
            return self._fleet.context
        section = self._fleet.context.with_options(ContextOptions.model_validate(given))
        # Nobody would ever do the errands of a tier or model that is not there.
        if section.summary_tier not in self._fleet.tiers:
            section = section.model_copy(update={"summary_tier": None})
        if section.embedding_model not in self._fleet.models:
            section = section.model_copy(update={"relevance": BM25})
        return section

    # -- conversations -----------------------------------------------------------------------

    async def _recall(self, works: list[Work]) -> None:
        if not works:
            return
        asks = [self._ask(work) for work in works]
        taken = await self._database.insist(
            lambda connection: store.take_conversations(connection, asks), patience_s=PATIENCE_S
        )
        turns = []
        for work in works:
            if work.job.id in taken:
                turns.append((work, taken[work.job.id]))
            elif not self._endings.given_up(work):
                self._sleep(work)
        if not turns:
            return
        told = await asyncio.to_thread(self._remember_all, turns, _NO_ANSWERS)
        errands = [remembered.errand for remembered in told if remembered.errand is not None]
        if errands:
            answers = await self._errands.send(errands)
            if answers:
                told = await asyncio.to_thread(self._remember_all, turns, answers)
        await self._keep([r.summary for r in told if r.summary is not None])
        for (work, _), remembered in zip(turns, told, strict=True):
            _send_instead(work, remembered.request)
            work.turn = remembered.turn
            work.note("memory", **remembered.facts)

    def _remember_all(
        self, turns: Sequence[tuple[Work, Recollection]], answers: Answers
    ) -> list[Remembered]:
        return [
            remember(
                work.job,
                _memory_id(work.job) or "",
                recollection,
                request=work.request,
                section=self._memory(work.job),
                estimates=self._estimates,
                model=work.route[0].model_there,
                answers=answers,
            )
            for work, recollection in turns
        ]

    async def _keep(self, summaries: Sequence[NewSummary]) -> None:
        if summaries:
            await self._database.insist(
                lambda connection: store.summarise_conversations(connection, summaries),
                patience_s=PATIENCE_S,
            )

    def _ask(self, work: Work) -> Ask:
        section = self._memory(work.job)
        max_bytes = section.max_tokens * WINDOW_BYTES_A_TOKEN
        if section.strategy is MemoryStrategy.SUMMARY:
            max_bytes = max(max_bytes, SUMMARY_BYTES)
        job = work.job
        return Ask(job.id, job.fence, job.tenant, _memory_id(job) or "", max_bytes)

    def _memory(self, job: ClaimedJob) -> MemorySection:
        given = job.policy.get("memory")
        if given is None:
            return self._fleet.memory
        section = self._fleet.memory.with_options(MemoryOptions.model_validate(given))
        if section.summarization_model not in self._fleet.models:
            section = section.model_copy(update={"summarization_model": None})
        return section

    # -- fitting -----------------------------------------------------------------------------

    async def _fit_all(self, works: list[Work]) -> None:
        if not works:
            return
        fitted = await asyncio.to_thread(self._fit_each, works, _NO_ANSWERS)
        waiting = [n for n, found in enumerate(fitted) if found.errands]
        if waiting:
            answers = await self._errands.send(_errands(fitted))
            again = await asyncio.to_thread(self._fit_each, [works[n] for n in waiting], answers)
            for n, found in zip(waiting, again, strict=True):
                fitted[n] = found
        for work, found in zip(works, fitted, strict=True):
            if not self._endings.given_up(work):
                self._apply(work, found)

    def _fit_each(self, works: Sequence[Work], answers: Answers) -> list[Fitted]:
        return [
            fit(
                work.job,
                work.request,
                self._models(work),
                section=self._section(work.job),
                estimates=self._estimates,
                answers=answers,
            )
            for work in works
        ]

    def _models(self, work: Work) -> dict[str, Window | None]:
        return {candidate.model: self._windows.get(candidate.model) for candidate in work.route}

    def _apply(self, work: Work, found: Fitted) -> None:
        if found.errands:
            self._wait(work, f"a job for its {found.errands[0].purpose}")
            return
        if found.facts:
            work.note("context", **found.facts)
        if not found.models:
            self._endings.fail(work, _TOO_LONG)
            return
        if len(found.models) < len({candidate.model for candidate in work.route}):
            work.route = self._shorter(work, found.models)
        if found.request is not None:
            _send_instead(work, found.request)
        if found.counted:
            work.counted = (self._windows[found.models[0]].vocabulary, found.counted)
            work.job = work.job._replace(input_tokens=found.tokens)

    def _shorter(self, work: Work, models: tuple[str, ...]) -> _Route:
        """The route without the models that can't hold the request; equal ones are one object."""
        known = self._routes.get((id(work.route), models))
        if known is not None:
            return known[1]
        if len(self._routes) >= KEPT_ROUTES:
            self._routes.clear()
        shorter = tuple(candidate for candidate in work.route if candidate.model in models)
        self._routes[id(work.route), models] = (work.route, shorter)
        return shorter

    def _sleep(self, work: Work) -> None:
        """Come again when an earlier turn ends, or after a while if nobody calls."""
        work.note("waited", on="an earlier turn")
        longest = min(LONGEST_SLEEP_S, FIRST_SLEEP_S * 1.5 ** min(work.job.deferrals, 10))
        sleep_s = longest * (0.5 + self._random() / 2)
        self._endings.give_back(work, sleep_s, counts=False, waits_turn=True)

    def _wait(self, work: Work, what: str) -> None:
        """Come again soon, and ever later: the claim, the slot and the attempt are given back."""
        longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 1.5 ** min(work.job.deferrals, 10))
        work.note("waited", on=what)  # by itself: what it is told in the end must not hide it
        self._endings.give_back(work, longest * (0.5 + self._random() / 2), counts=False)


def _memory_id(job: ClaimedJob) -> str | None:
    found = job.policy.get("memory_id") if job.policy else None
    return found if isinstance(found, str) else None


def _send_instead(work: Work, request: str) -> None:
    if request is not work.request:
        work.request = request
        tokens = -(-len(request.encode("utf-8", "surrogatepass")) // BYTES_A_TOKEN)
        work.job = work.job._replace(input_tokens=tokens)


def _errands(fitted: Iterable[Fitted]) -> list[Errand]:
    return [errand for found in fitted for errand in found.errands]
