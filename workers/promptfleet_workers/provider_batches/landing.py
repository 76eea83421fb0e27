"""What comes back from a provider's batch lands like any other answer, each under its fence."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import CacheStatus, ClaimedJob, JobError
from promptfleet_shared.policies.provider_batches import OPTION
from promptfleet_shared.store import provider_batches as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.provider_batches import NO_ROW, Held, LineKey, Return, Waiting
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.endings import Endings
from promptfleet_workers.provider_batches.lines import key_of
from promptfleet_workers.provider_batches.pricing import BatchPricer
from promptfleet_workers.provider_batches.returning import PAGE, Returner, return_of
from promptfleet_workers.providers.batch_protocol import BatchApi, BatchView, LineAnswer
from promptfleet_workers.providers.protocol import Answer, Completion
from promptfleet_workers.retries import Verdict, classify
from promptfleet_workers.routing import Candidate, Router
from promptfleet_workers.work import Batch, Work

log = logging.getLogger(__name__)

CHUNK = 200
"""Answers that are written together."""
_NO_ANSWER = ProviderError(
    "the provider's batch is over and has no answer for the job",
    code="no_answer",
    unknown_outcome=True,
)


class Lander:
    """The steps of a batch that the provider has."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        router: Router,
        apis: Mapping[str, BatchApi],
        endings: Endings,
        pricer: BatchPricer,
        returner: Returner,
        budgets: Budgets | None = None,
    ) -> None:
        """Land nothing yet.

        Args:
            database: Where the jobs wait.
            fleet: How often to look.
            router: Gives the candidate that a batch was given for.
            apis: Those of the deployments, by their names.
            endings: Its own, for no ticket or slot is taken for these jobs.
            pricer: What lines cost.
            returner: For jobs without an answer.
            budgets: Have what lines reserved, where the fleet has any.
        """
        self._budgets = budgets
        self._database = database
        self._options = fleet.batch_service
        self._router = router
        self._apis = apis
        self._endings = endings
        self._pricer = pricer
        self._returner = returner

    async def poll(self, held: Held) -> None:
        """Look how it stands: wait on, or land what it has."""
        api = self._apis[held.deployment]
        try:
            view = await api.look(held.provider_id or "")
        except ProviderError:
            if await self._is_wanted(held):
                raise
            await self._database.run(lambda connection: store.end(connection, held))
            return
        if view.is_over:
            await self._land(api, held, view)
            return
        if not held.cancel_sent and not await self._is_wanted(held):
            await api.cancel(view.provider_id)
            await self._database.run(lambda connection: store.note_cancel(connection, held))
        pause_s = self._options.poll_s
        await self._database.run(lambda connection: store.pause(connection, held, pause_s))

    async def _is_wanted(self, held: Held) -> bool:
        return await self._database.run(lambda connection: store.is_wanted(connection, held))

    async def _land(self, api: BatchApi, held: Held, view: BatchView) -> None:
        if view.failure is not None:
            await self._returner.return_all(held, view.failure)
            return
        seen: set[LineKey] = set()
        async for chunk in _chunks(api.answers(view, held.kind)):
            answers = {
                key: item.answer
                for item in chunk
                if (key := key_of(item.custom_id)) is not None and key not in seen
            }
            seen.update(answers)
            await self._land_chunk(held, answers)
        await self._endings.drain()
        if await self._return_unanswered(held, seen):
            log.info("provider_batch_landed", extra={"batch": str(held.id), "lines": len(seen)})
            await self._database.run(lambda connection: store.end(connection, held))
        else:  # the database did not take some: what is there is read once more
            await self._database.run(
                lambda connection: store.pause(connection, held, self._options.poll_s, failed=True)
            )

    async def _land_chunk(self, held: Held, answers: Mapping[LineKey, Answer]) -> None:
        waiting = await self._database.run(
            lambda connection: store.waiting_jobs(connection, held, list(answers))
        )
        returns: list[Return] = []
        for item in waiting:
            key = LineKey(job_id=item.job.id, fence=item.job.fence)
            given = self._land_one(held, item, answers[key])
            if given is not None:
                returns.append(return_of(key, given))
        await self._endings.flush()
        await self._returner.give_back(held, returns)

    def _land_one(self, held: Held, item: Waiting, answer: Answer) -> ProviderError | None:
        """End the job by its answer; the failure of one that is to be called by itself instead."""
        candidate = self._candidate(held, item.job)
        if candidate is None:
            return _NO_ANSWER  # fleet.toml has no such deployment any more
        work = self._work(held, item, candidate)
        if isinstance(answer, Completion):
            model = answer.model or candidate.model_there
            work.saved_usd = self._pricer.saved(
                candidate.deployment.provider, model, answer.usage, candidate.price_as
            )
            self._adopt(work, item)
            self._endings.succeed(work, answer, candidate)
            return None
        if classify(answer).verdict is not Verdict.FINAL:
            return answer
        self._adopt(work, item)
        facts = JobError(code=answer.code, message=answer.message, status=answer.status)
        self._endings.fail(work, facts, candidate=candidate)
        return None

    def _adopt(self, work: Work, item: Waiting) -> None:
        """It ends now, and with it what its line has reserved."""
        if self._budgets is not None:
            self._budgets.adopt(work, item.reserved)

    def _candidate(self, held: Held, job: ClaimedJob) -> Candidate | None:
        """The deployment that had the batch, as the job's route has it."""
        for candidate in self._router.route(job):
            if candidate.deployment.name == held.deployment:
                return candidate
        return None

    def _work(self, held: Held, item: Waiting, candidate: Candidate) -> Work:
        now = time.monotonic()
        work = Work(
            job=item.job,
            batch=Batch(id=held.id, size=held.sent),
            asked_at=now,
            claimed_at=now,
            route=self._router.route(item.job),
            request=item.request,
            key=item.cache_key,
            key_model=None if item.cache_key is None else candidate.model,
            cache=CacheStatus.OFF if item.cache_key is None else CacheStatus.MISS,
            calls=1,
        )
        work.note(OPTION, way="batch", provider_batch=held.provider_id)
        return work

    async def _return_unanswered(self, held: Held, seen: set[LineKey]) -> bool:
        """Send those without an answer the ordinary way; false if some with one still wait."""
        all_landed = True
        after = NO_ROW
        while True:
            keys = await self._database.run(
                functools.partial(store.left_lines, held=held, after=after, limit=PAGE)
            )
            all_landed = all_landed and seen.isdisjoint(keys)
            missing = [return_of(key, _NO_ANSWER) for key in keys if key not in seen]
            await self._returner.give_back(held, missing)
            if len(keys) < PAGE:
                return all_landed
            after = keys[-1].job_id


async def _chunks(answers: AsyncIterator[LineAnswer]) -> AsyncIterator[Sequence[LineAnswer]]:
    chunk: list[LineAnswer] = []
    async for answer in answers:
        chunk.append(answer)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
