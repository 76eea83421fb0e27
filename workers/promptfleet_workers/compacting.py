"""Leave out of requests what changes nothing, before their answers are looked for."""

from __future__ import annotations

from collections.abc import Sequence

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import JobKind
from promptfleet_shared.policies.compact import OPTION, compact_request
from promptfleet_workers.work import Work


class Compactor:
    """Compacts the requests of those jobs that want it, by their option or their tier's."""

    def __init__(self, fleet: Fleet) -> None:
        """Read which tiers do so."""
        self._tiers = {tier: fleet.compact_options(tier).enabled for tier in fleet.tier_names}

    def compact(self, tier: str, works: Sequence[Work]) -> None:
        """Compact what is sent for these jobs; their decisions tell how many bytes that saved."""
        by_tier = self._tiers.get(tier, False)
        for work in works:
            policy = work.job.policy
            wanted = policy.get(OPTION, by_tier) if policy else by_tier
            if wanted and work.job.kind is not JobKind.EMBEDDING:
                _compact(work)


def _compact(work: Work) -> None:
    compacted = compact_request(work.request)
    if compacted is not work.request:
        saved = len(work.request.encode()) - len(compacted.encode())
        work.request = compacted
        work.note(OPTION, bytes_saved=saved)
