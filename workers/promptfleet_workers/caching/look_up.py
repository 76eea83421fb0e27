"""The look-up: which jobs of a batch have an answer, which wait for one, and which must call."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Protocol

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import CacheMode, CacheStatus, JobError
from promptfleet_workers.caching.keys import cache_key, canonical
from promptfleet_workers.caching.protocol import Reply, ResponseCache, Turn
from promptfleet_workers.caching.questions import Question
from promptfleet_workers.caching.semantic import Asked, Found
from promptfleet_workers.caching.single_flight import Flight
from promptfleet_workers.caching.values import Codec, Kept
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims
from promptfleet_workers.endings import Endings
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

_NOT_THERE = JobError(code="cache_miss", message="the cache has no answer, and none may be bought")


class Semantic(Protocol):
    """Finds answers by meaning."""

    def question(self, work: Work) -> Question | None:
        """What of the work may be answered so, if anything."""
        ...

    async def find(self, asked: Sequence[Asked]) -> Mapping[uuid.UUID, Found]:
        """The answers that prompts alike have, by their works' job ids. Raises nothing."""
        ...


class LookUp:
    """Asks the cache for whole batches, and sees to the jobs that wait for others' calls."""

    def __init__(
        self,
        cache: ResponseCache,
        *,
        fleet: Fleet,
        claims: Claims,
        endings: Endings,
        caller: Caller,
        codec: Codec | None = None,
        flight: Flight | None = None,
        semantic: Semantic | None = None,
    ) -> None:
        """Take the place of who restarts jobs: they may have to wait, too.

        Args:
            cache: Where answers are.
            fleet: What fleet.toml says.
            claims: What this worker holds.
            endings: Ends jobs, and knows which are equal.
            caller: Calls for those without an answer.
            codec: Reads the cache's values.
            flight: The fleet's single flight, where there is one.
            semantic: The semantic cache, where there is one.
        """
        self._cache = cache
        self._section = fleet.cache
        self._claims = claims
        self._endings = endings
        self._caller = caller
        self._codec = codec or Codec()
        self._flight = flight
        self._semantic = semantic
        self._names = {name: _model_name(fleet, name) for name in fleet.models}
        self._waits: set[asyncio.Task[None]] = set()
        self._passed_on: str | None = None
        self._call_heir = endings.restart
        endings.restart = self._restart

    async def __call__(self, works: Sequence[Work]) -> list[Work]:
        """End the jobs whose answer is known; returns those that are to be called now."""
        calling: list[Work] = []
        asking: list[Work] = []
        reading: list[Work] = []
        for work in works:
            mode = work.job.cache.mode
            if mode is CacheMode.OFF or not self._section.enabled:
                self._without_cache(work, calling)
                continue
            self._name(work)
            if mode is CacheMode.ONLY:
                reading.append(work)
            elif self._endings.leads(work):
                (calling if mode is CacheMode.REFRESH else asking).append(work)
        if asking:
            calling += await self._ask(asking)
        if reading:
            await self._read(reading)
        return calling

    async def known(self, works: Sequence[Work]) -> list[Work]:
        """End the jobs whose answer is kept; returns the others, named for theirs to be kept.

        Those lead nobody and wait for nobody: a provider's batch may have them for a day.
        """
        reading = []
        for work in works:
            mode = work.job.cache.mode
            if mode is CacheMode.OFF or not self._section.enabled:
                if mode is CacheMode.ONLY:
                    self._endings.fail(work, _NOT_THERE)
                continue
            self._name(work)
            if mode is not CacheMode.REFRESH:
                reading.append(work)
        await self._read(reading)
        return [work for work in works if not work.ended]

    def questions(self, works: list[Work]) -> tuple[list[Asked], list[Work]]:
        """Those that may be answered by their meaning, and those that are to be called at once."""
        if self._semantic is None:
            return [], works
        asked: list[Asked] = []
        others: list[Work] = []
        for work in works:
            question = self._semantic.question(work)
            if question is None:
                others.append(work)
            else:
                asked.append((work, question))
        return asked, others

    async def by_meaning(self, asked: Sequence[Asked]) -> list[Work]:
        """End those whose answer a prompt alike has; returns the others, to be called."""
        assert self._semantic is not None  # noqa: S101 - it made these questions
        found = await self._semantic.find(asked)
        calling = []
        for work, _ in asked:
            answer = found.get(work.job.id)
            if work.ended or self._endings.given_up(work):
                continue
            if answer is None:
                calling.append(work)
                continue
            work.cache = CacheStatus.SEMANTIC
            work.note("cache", similarity=answer.similarity, **self._age(answer.kept))
            self._endings.succeed(work, answer.kept.completion, work.route[0])
        return calling

    async def idle(self) -> None:
        """Wait until no job waits for another worker's call."""
        while self._waits:
            await asyncio.wait(self._waits)
            await asyncio.sleep(0)  # what is called when they are done

    # -- asking --------------------------------------------------------------------------------

    def _without_cache(self, work: Work, calling: list[Work]) -> None:
        if work.job.cache.mode is CacheMode.ONLY:
            self._endings.fail(work, _NOT_THERE)
        else:
            calling.append(work)

    def _name(self, work: Work) -> None:
        """Give the work the key of its answer."""
        work.cache = CacheStatus.MISS
        work.key_model = model = work.route[0].model
        work.key = cache_key(
            work.job.cache.namespace or self._section.namespace,
            work.job.tenant,
            self._names[model],
            work.job.kind,
            canonical(work.request, as_stored=work.request is work.job.request),
        )

    async def _ask(self, works: Sequence[Work]) -> list[Work]:
        """The leaders of these keys: those that are to be called."""
        keys = [work.key or "" for work in works]
        replies = await self._replies(keys)
        calling: list[Work] = []
        for work, reply in zip(works, replies, strict=True):
            if work.ended:
                continue
            if reply is Turn.WAIT:
                self._wait(work)
            elif not self._answered(work, reply):
                calling.append(work)
        return calling

    async def _replies(self, keys: Sequence[str]) -> Sequence[Reply]:
        if self._flight is not None:
            return await self._flight.ask(keys)
        values = await self._cache.get_many(keys)
        return [Turn.CALL if value is None else value for value in values]

    async def _read(self, works: Sequence[Work]) -> None:
        """End those whose answer is there, and those that may have no other."""
        values = await self._cache.get_many([work.key or "" for work in works])
        for work, value in zip(works, values, strict=True):
            if value is not None and self._answered(work, value):
                continue
            if work.job.cache.mode is CacheMode.ONLY:
                self._endings.fail(work, _NOT_THERE)

    def _answered(self, work: Work, reply: Reply, status: CacheStatus = CacheStatus.HIT) -> bool:
        """End the work if the reply is an answer."""
        kept = self._codec.decode(work.key or "", reply) if isinstance(reply, bytes) else None
        if kept is None:
            return False
        work.cache = status
        if status is CacheStatus.HIT:
            work.note("cache", **self._age(kept))
        self._endings.succeed(work, kept.completion, work.route[0])
        return True

    def _age(self, kept: Kept) -> dict[str, int]:
        age_s = self._codec.age_s(kept)
        return {} if age_s is None else {"age_s": age_s}

    # -- waiting -------------------------------------------------------------------------------

    def _wait(self, work: Work) -> None:
        """Let the work, and those that follow it, wait for another worker's call."""
        task = asyncio.create_task(self._await_answer(work))
        self._claims.work(task, [work.job])
        self._waits.add(task)
        task.add_done_callback(lambda done: self._waited(done, work))

    async def _await_answer(self, work: Work) -> None:
        began_at = time.monotonic()
        # No longer than a call of its own might take.
        limit_s = min(work.remaining_s, work.route[0].timeouts.timeout_ms / 1000)
        reply: Reply = Turn.CALL
        try:
            async with asyncio.timeout(limit_s):
                assert self._flight is not None  # noqa: S101 - nobody else tells to wait
                reply = await self._flight.turn(work.key or "")
        except TimeoutError:
            pass
        work.note("cache", waited_ms=round((time.monotonic() - began_at) * 1000))
        self._claims.rest([work.job])
        if self._endings.given_up(work) or self._answered(work, reply, CacheStatus.COALESCED):
            return
        self._call_heir(work)

    def _waited(self, task: asyncio.Task[None], work: Work) -> None:
        self._waits.discard(task)
        if task.cancelled():  # it was aborted; those that followed it wait on
            self._claims.rest([work.job])
            self._passed_on = work.key
            self._endings.given_up(work)
            self._passed_on = None
        elif (error := task.exception()) is not None:
            log.error("wait_crashed", extra={"error": type(error).__name__})
            self._caller.give_back_idle([work])

    def _restart(self, heir: Work) -> None:
        if heir.key is not None and heir.key == self._passed_on:
            self._wait(heir)
        else:
            self._call_heir(heir)


def _model_name(fleet: Fleet, model: str) -> str:
    """What the answers of a model are kept as, whichever of its deployments gives them."""
    first = fleet.models[model].deployments[0]
    return f"{first.provider}/{first.model or model}"
