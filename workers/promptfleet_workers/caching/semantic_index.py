"""Prompts by their embeddings: a Redis stream a bucket, and the search in the worker's memory.

Plain Redis and Valkey have no vector type, and Postgres may have no pgvector; and a bucket is
small, since all but the meaning must be equal in it. So each worker keeps a copy of the buckets it
meets, reads what was added since with the look-up's one round trip, and compares by brute force:
2,000 vectors of 1,536 numbers take a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_workers.caching.probe import Match, Probe

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0
COOL_DOWN_S = 2.0
MAX_MATCHES = 3
"""Neighbours that are tried: the answer of the nearest may be gone already."""
MAX_LOCAL_BYTES = 256 * 1024 * 1024
_FIELD = b"e"
_HEAD = struct.Struct(">I")

Vectors = npt.NDArray[np.float32]


class Seal(Protocol):
    """Keeps what is stored from who has no key."""

    def seal(self, name: str, plain: bytes) -> bytes:
        """The bytes, sealed."""
        ...

    def open(self, name: str, value: bytes) -> bytes | None:
        """The bytes as they were; None if they are not for us."""
        ...


class _Row(NamedTuple):
    key: str
    text: str | None
    until: float


class _Bucket:
    """A copy of a bucket, as far as it was read."""

    def __init__(self, dimensions: int) -> None:
        self.last_id = b"0"
        self.rows: list[_Row] = []
        self.vectors: Vectors = np.empty((0, dimensions), np.float32)

    def add(self, rows: list[_Row], vectors: list[Vectors], *, limit: int, now: float) -> None:
        """Take entries in; what has expired and what is too much, the oldest first, goes."""
        self.rows += rows
        if vectors:
            self.vectors = np.concatenate([self.vectors, np.stack(vectors)])
        alive = [n for n, row in enumerate(self.rows) if row.until > now][-limit:]
        if len(alive) < len(self.rows):
            self.rows = [self.rows[n] for n in alive]
            self.vectors = self.vectors[alive]

    def nearest(self, vector: Vectors, threshold: float) -> list[Match]:
        """The prompts from this similarity on, the nearest first."""
        if not self.rows:
            return []
        cosines = self.vectors @ vector
        near = [int(n) for n in np.argsort(cosines)[::-1][:MAX_MATCHES] if cosines[n] >= threshold]
        return [
            Match(self.rows[n].key, self.rows[n].text, min(1.0, round(float(cosines[n]), 4)))
            for n in near
        ]


class SemanticIndex:
    """Finds and keeps prompts; raises nothing: without Redis nothing is near anything."""

    def __init__(
        self,
        url: str,
        *,
        max_entries: int,
        codec: Seal,
        keep_texts: bool,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connect with the first use.

        Args:
            url: As in redis://user:password@host:6379/0.
            max_entries: Prompts in a bucket; the oldest go first.
            codec: Seals what is kept.
            keep_texts: True where somebody compares the prompts themselves.
            timeout_s: Seconds that a round trip may take.
            cool_down_s: Seconds without another try after a failure.
            clock: Seconds since 1970.
        """
        self._max_entries = max_entries
        self._codec = codec
        self._keep_texts = keep_texts
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = asyncio.Lock()
        self._redis = impatient_client(url, connect_s=timeout_s)

    def normalized(self, numbers: Sequence[float]) -> bytes | None:
        """An embedding as a probe keeps it; None for one without a direction."""
        try:
            vector = np.asarray(numbers, np.float32)
        except (ValueError, TypeError):
            return None
        length = float(np.linalg.norm(vector)) if vector.ndim == 1 else 0.0
        if not np.isfinite(length) or length == 0.0:
            return None
        return bytes((vector / np.float32(length)).astype("<f4").tobytes())

    async def nearest(self, probes: Sequence[Probe], threshold: float) -> list[list[Match]]:
        """For each probe the prompts that are alike, the nearest first: one round trip."""
        if not probes or time.monotonic() < self._cold_until:
            return [[] for _ in probes]
        async with self._lock:
            names = list({probe.bucket: None for probe in probes})
            try:
                news = await self._read(names)
            except REDIS_FAILURES as error:
                self._cool_down(error)
                return [[] for _ in probes]
            return await asyncio.to_thread(self._search, probes, threshold, news)

    async def add(self, probes: Sequence[Probe]) -> None:
        """Keep prompts that have been answered."""
        if not probes or time.monotonic() < self._cold_until:
            return
        try:
            async with asyncio.timeout(self._timeout_s), self._pipeline() as pipeline:
                for probe in probes:
                    pipeline.xadd(
                        probe.bucket,
                        {_FIELD: self._entry(probe)},
                        maxlen=self._max_entries,
                        approximate=False,
                    )
                    pipeline.expire(probe.bucket, probe.ttl_s)
                await pipeline.execute()
        except REDIS_FAILURES as error:
            self._cool_down(error)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _pipeline(self) -> Any:
        return self._redis.pipeline(transaction=False)

    async def _read(
        self, names: Sequence[str]
    ) -> dict[str, list[tuple[bytes, dict[bytes, bytes]]]]:
        """What is new in these buckets."""
        async with asyncio.timeout(self._timeout_s), self._pipeline() as pipeline:
            for name in names:
                known = self._buckets.get(name)
                after = b"(" + known.last_id if known else b"-"
                pipeline.xrange(name, min=after, count=self._max_entries)
            return dict(zip(names, await pipeline.execute(), strict=True))

    def _search(
        self,
        probes: Sequence[Probe],
        threshold: float,
        news: dict[str, list[tuple[bytes, dict[bytes, bytes]]]],
    ) -> list[list[Match]]:
        found = []
        for probe in probes:
            vector = np.frombuffer(probe.vector, np.float32)
            bucket = self._buckets.get(probe.bucket)
            if bucket is None or bucket.vectors.shape[1] != len(vector):
                bucket = self._buckets[probe.bucket] = _Bucket(len(vector))
            self._buckets.move_to_end(probe.bucket)
            self._take_in(probe.bucket, bucket, news.pop(probe.bucket, []))
            found.append(bucket.nearest(vector, threshold))
        self._forget_oldest()
        return found

    def _take_in(
        self, name: str, bucket: _Bucket, entries: list[tuple[bytes, dict[bytes, bytes]]]
    ) -> None:
        rows, vectors = [], []
        for entry_id, fields in entries:
            bucket.last_id = entry_id
            entry = self._opened(name, fields.get(_FIELD, b""))
            if entry is not None and len(entry[1]) == bucket.vectors.shape[1]:
                rows.append(entry[0])
                vectors.append(entry[1])
        bucket.add(rows, vectors, limit=self._max_entries, now=self._clock())

    def _forget_oldest(self) -> None:
        size = sum(bucket.vectors.nbytes for bucket in self._buckets.values())
        while size > MAX_LOCAL_BYTES and len(self._buckets) > 1:
            size -= self._buckets.popitem(last=False)[1].vectors.nbytes

    # An entry: the length of its facts, the facts as JSON, and the vector in 16 bits a number.
    def _entry(self, probe: Probe) -> bytes:
        text = probe.text if self._keep_texts else None
        facts = orjson.dumps([probe.key, text, int(self._clock()) + probe.ttl_s])
        vector = np.frombuffer(probe.vector, np.float32).astype("<f2").tobytes()
        return self._codec.seal(probe.bucket, _HEAD.pack(len(facts)) + facts + vector)

    def _opened(self, name: str, sealed: bytes) -> tuple[_Row, Vectors] | None:
        plain = self._codec.open(name, sealed)
        if plain is None or len(plain) < _HEAD.size:
            return None
        (length,) = _HEAD.unpack_from(plain)
        end = _HEAD.size + length
        try:
            key, text, until = orjson.loads(plain[_HEAD.size : end])
            vector = np.frombuffer(plain[end:], "<f2").astype(np.float32)
        except (ValueError, TypeError):
            return None
        return _Row(key, text, until), vector

    def _cool_down(self, error: Exception) -> None:
        self._cold_until = time.monotonic() + self._cool_down_s
        facts = {"error": type(error).__name__, "cool_down_s": self._cool_down_s}
        log.warning("semantic_cache_unavailable", extra=facts)
