"""The parts of the response cache, as a worker's other parts get them."""

from __future__ import annotations

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.policies.caching import CacheSection
from promptfleet_workers.caching.filling import Filling, ProbeIndex
from promptfleet_workers.caching.look_up import LookUp, Semantic
from promptfleet_workers.caching.protocol import ResponseCache
from promptfleet_workers.caching.single_flight import Flight
from promptfleet_workers.caching.values import Codec
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims
from promptfleet_workers.endings import Endings


class Caching:
    """A cache, what reads and writes it, and who takes part in the fleet's single flight."""

    def __init__(
        self,
        cache: ResponseCache,
        section: CacheSection,
        *,
        codec: Codec | None = None,
        flight: Flight | None = None,
        semantic: Semantic | None = None,
        index: ProbeIndex | None = None,
    ) -> None:
        """Put them together; nothing is asked yet."""
        self.cache = cache
        self.codec = codec or Codec()
        self.flight = flight
        self.filling = Filling(cache, section, codec=self.codec, flight=flight, index=index)
        self._semantic = semantic
        self._index = index

    def look_up(self, fleet: Fleet, claims: Claims, endings: Endings, caller: Caller) -> LookUp:
        """What asks the cache for the batches of a pipeline with these parts."""
        return LookUp(
            self.cache,
            fleet=fleet,
            claims=claims,
            endings=endings,
            caller=caller,
            codec=self.codec,
            flight=self.flight,
            semantic=self._semantic,
        )

    async def aclose(self) -> None:
        """End leases, and close connections."""
        if self.flight is not None:
            await self.flight.aclose()
        if self._index is not None:
            await self._index.aclose()
        await self.cache.aclose()
