"""The semantic cache: the answer to a prompt that means the same, where no equal one is known."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from promptfleet_shared.policies.caching import CacheSection
from promptfleet_workers.caching.probe import Match, Probe
from promptfleet_workers.caching.protocol import ResponseCache
from promptfleet_workers.caching.questions import Question, question_of
from promptfleet_workers.caching.values import Codec, Kept
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

Asked = tuple[Work, Question]


class Found(NamedTuple):
    """An answer by meaning, and how alike the prompts are."""

    kept: Kept
    similarity: float


class Embedder(Protocol):
    """Turns texts into vectors."""

    async def embed(self, asked: Sequence[Asked]) -> list[list[float] | None]:
        """The embedding of each text, and its cost noted on its work. Raises nothing."""
        ...


class Verifier(Protocol):
    """Has the last word."""

    async def same(self, work: Work, asked: str, known: str, similarity: float) -> bool:
        """True if one answer is right for both prompts. Raises nothing."""
        ...


class Index(Protocol):
    """Where prompts are kept by their vectors."""

    def normalized(self, numbers: Sequence[float]) -> bytes | None:
        """An embedding as a probe keeps it; None for one without a direction."""
        ...

    async def nearest(self, probes: Sequence[Probe], threshold: float) -> list[list[Match]]:
        """For each probe the prompts that are alike, the nearest first. Raises nothing."""
        ...


class SemanticCache:
    """Looks for answers by meaning, a batch at a time."""

    def __init__(
        self,
        section: CacheSection,
        *,
        cache: ResponseCache,
        codec: Codec,
        index: Index,
        embedder: Embedder,
        verifier: Verifier | None,
    ) -> None:
        """Ask nobody yet.

        Args:
            section: [cache] of fleet.toml.
            cache: Where the answers are.
            codec: Reads them.
            index: Where the prompts are.
            embedder: Makes their vectors.
            verifier: Has the last word, if anybody has.
        """
        self._section = section
        self._cache = cache
        self._codec = codec
        self._index = index
        self._embedder = embedder
        self._verifier = verifier

    def question(self, work: Work) -> Question | None:
        """What of the work may be answered by meaning."""
        return question_of(
            work,
            namespace=work.job.cache.namespace or self._section.namespace,
            embedding_model=self._section.semantic.model or "",
        )

    async def find(self, asked: Sequence[Asked]) -> Mapping[uuid.UUID, Found]:
        """The answers that are known, by their works' job ids; the other works get probes."""
        vectors = await self._embedder.embed(asked)
        probed = []
        for (work, question), numbers in zip(asked, vectors, strict=True):
            vector = None if numbers is None else self._index.normalized(numbers)
            if vector is not None and work.key is not None:
                work.probe = self._probe(work, work.key, question, vector)
                probed.append((work, work.probe))
        near = await self._index.nearest(
            [probe for _, probe in probed], self._section.semantic.threshold
        )
        known = await self._known([match for matches in near for match in matches])
        found = await asyncio.gather(
            *(
                self._first(work, probe, matches, known)
                for (work, probe), matches in zip(probed, near, strict=True)
            )
        )
        return {
            work.job.id: answer
            for (work, _), answer in zip(probed, found, strict=True)
            if answer is not None
        }

    def _probe(self, work: Work, key: str, question: Question, vector: bytes) -> Probe:
        ttl_s = work.job.cache.ttl_s or self._section.ttl_s
        return Probe(
            bucket=question.bucket, vector=vector, text=question.text, key=key, ttl_s=ttl_s
        )

    async def _known(self, matches: Sequence[Match]) -> Mapping[str, Kept]:
        """The answers of these prompts, as far as they are still there."""
        keys = list({match.key: None for match in matches})
        values = await self._cache.get_many(keys)
        known = {}
        for key, value in zip(keys, values, strict=True):
            kept = None if value is None else self._codec.decode(key, value)
            if kept is not None:
                known[key] = kept
        return known

    async def _first(
        self, work: Work, probe: Probe, matches: Sequence[Match], known: Mapping[str, Kept]
    ) -> Found | None:
        for match in matches:
            kept = known.get(match.key)
            if kept is not None:
                if await self._agreed(work, probe, match):
                    return Found(kept, match.similarity)
                return None  # those that are less alike would not do better
        return None

    async def _agreed(self, work: Work, probe: Probe, match: Match) -> bool:
        if self._verifier is None:
            return True
        if match.text is None:
            return False
        return await self._verifier.same(work, probe.text, match.text, match.similarity)
