"""What goes into the cache: answers, once their jobs' ends stand in the database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from promptfleet_shared.jobs import JobState, Outcome
from promptfleet_shared.policies.caching import CacheSection
from promptfleet_shared.store.claims import storable_text
from promptfleet_workers.caching.probe import Probe
from promptfleet_workers.caching.protocol import Item, ResponseCache
from promptfleet_workers.caching.single_flight import Flight
from promptfleet_workers.caching.values import Codec
from promptfleet_workers.providers.protocol import Completion
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work


class Answered(NamedTuple):
    """An answer on its way into the cache."""

    completion: Completion
    candidate: Candidate


class ProbeIndex(Protocol):
    """Where prompts are kept that others may be alike."""

    async def add(self, probes: Sequence[Probe]) -> None:
        """Keep them. Raises nothing."""
        ...

    async def aclose(self) -> None:
        """Give back connections."""
        ...


class Filling:
    """Fills the cache behind a worker's back, and ends the leases of what it fills."""

    def __init__(
        self,
        cache: ResponseCache,
        section: CacheSection,
        *,
        codec: Codec | None = None,
        flight: Flight | None = None,
        index: ProbeIndex | None = None,
    ) -> None:
        """Know nothing yet.

        Args:
            cache: What to fill.
            section: What fleet.toml says about it.
            codec: Writes its values.
            flight: The fleet's single flight, where there is one.
            index: The semantic cache's, where there is one.
        """
        self._cache = cache
        self._section = section
        self._codec = codec or Codec()
        self._flight = flight
        self._index = index
        self._items: dict[uuid.UUID, tuple[Item, Probe | None]] = {}
        self._fresh: dict[str, Answered] = {}
        self._fills: set[asyncio.Task[None]] = set()

    def known(self, key: str) -> Answered | None:
        """An answer that equal jobs can have before it is in the cache."""
        return self._fresh.get(key)

    def keep(self, work: Work, completion: Completion, candidate: Candidate) -> None:
        """The work's call was answered; what is worth keeping is kept once that is written."""
        key = work.key
        if key is None:
            return
        # An answer of a second choice must not pass for the first one's until its time is up.
        if candidate.model != work.key_model or not self._fits(completion):
            self.release(key)
            return
        ttl_s = work.job.cache.ttl_s or self._section.ttl_s
        item = (key, self._codec.encode(key, completion), ttl_s)
        self._items[work.job.id] = (item, work.probe)
        self._fresh[key] = Answered(completion, candidate)

    def release(self, key: str) -> None:
        """No answer to keep will come from here: somebody else may call."""
        if self._flight is not None:
            self._flight.release(key)

    def written(self, outcomes: Sequence[Outcome]) -> None:
        """These ends have been written; fill the cache with their answers."""
        if not self._items:
            return
        known: list[tuple[Item, Probe | None]] = []
        for outcome in outcomes:
            found = self._items.pop(outcome.job_id, None)
            if found is None:
                continue
            if outcome.state is JobState.SUCCEEDED:
                known.append(found)
            else:  # the database could not hold the answer
                self._fresh.pop(found[0][0], None)
                self.release(found[0][0])
        if known:
            task = asyncio.create_task(self._fill(known))
            self._fills.add(task)
            task.add_done_callback(self._fills.discard)

    async def drain(self) -> None:
        """Wait until all that is kept is in the cache."""
        while self._fills:
            await asyncio.wait(self._fills)
        if self._flight is not None:
            await self._flight.idle()

    async def _fill(self, known: Sequence[tuple[Item, Probe | None]]) -> None:
        items = [item for item, _ in known]
        keys = [key for key, _, _ in items]
        await self._cache.set_many(items)
        for key in keys:
            self._fresh.pop(key, None)
        if self._flight is not None:
            self._flight.settled(keys)
        if self._index is not None:
            await self._index.add([probe for _, probe in known if probe is not None])

    def _fits(self, completion: Completion) -> bool:
        if len(completion.response) > self._section.max_value_bytes:
            return False
        return storable_text(completion.text) == completion.text
