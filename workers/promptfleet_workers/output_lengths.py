"""How long answers may become that nothing bounds: learned from those of late."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.store import costs as costs_store
from promptfleet_shared.store.database import AsyncDatabase

log = logging.getLogger(__name__)

ANSWERS = 500
"""The longest of the last 500 to 1,000 answers counts, so that one long one is forgotten again."""
_MAX_KNOWN = 10_000

_Of = tuple[str, str]


class _Latest:
    """The longest of the answers since the last turn, and of those between the last two."""

    __slots__ = ("answers", "before", "now")

    def __init__(self) -> None:
        self.answers = self.now = self.before = 0

    def add(self, tokens: int) -> None:
        self.now = max(self.now, tokens)
        self.answers += 1
        if self.answers >= ANSWERS:
            self.answers, self.before, self.now = 0, self.now, 0


class OutputLengths:
    """The longest answers of each model and tier: at first the ledger's, then this worker's."""

    def __init__(self, database: AsyncDatabase, models: Mapping[str, str]) -> None:
        """Know nothing yet; `models` are the models of deployments."""
        self._database = database
        self._models = models
        self._latest: dict[_Of, _Latest] = {}
        self.is_known = False

    async def read(self) -> None:
        """Ask the ledger; where that fails, at the next time again."""
        try:
            known = await self._database.run(costs_store.longest_outputs)
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("output_lengths_unknown", extra={"error": str(error)})
            return
        self.is_known = True
        for (deployment, tier), tokens in known.items():
            self.learn(deployment, tier, tokens)

    def learn(self, deployment: str, tier: str, tokens: int) -> None:
        """An answer had so many tokens."""
        model = self._models.get(deployment)
        if model is None or not tokens:
            return
        latest = self._latest.get((model, tier))
        if latest is None:
            if len(self._latest) >= _MAX_KNOWN:
                self._latest.clear()
            latest = self._latest[model, tier] = _Latest()
        latest.add(tokens)

    def longest(self, model: str, tier: str) -> int:
        """Tokens of the longest answer of late; 0 where none was seen."""
        latest = self._latest.get((model, tier))
        return 0 if latest is None else max(latest.now, latest.before)
