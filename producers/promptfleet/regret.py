"""What `tier="auto"` gave up, measured: the answers of a sample beside those of the top tier."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from rapidfuzz import fuzz

from promptfleet_shared.store.shadows import Pair, shadow_pairs

_PERCENT = 100.0
_COMPARED_CHARS = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Regret:
    """How a tier's answers differ from the top tier's to the same prompts.

    Attributes:
        pairs: How many prompts both have answered.
        equal: The share of answers that are the same but for whitespace, 0 to 1.
        similarity: The mean share of words that both answers have, whatever their order, 0 to 1
            (rapidfuzz's token_sort_ratio). Two good answers can differ much, so this is how often
            the top tier would have said something else, and no measure of quality.
        usd: US dollars of the tier's own calls; None where a price is not known.
        top_usd: The same of the top tier's.
        provider_ms: The median call of the tier, milliseconds.
        top_provider_ms: The median call of the top tier.
    """

    tier: str
    top_tier: str
    pairs: int
    equal: float
    similarity: float
    usd: Decimal | None
    top_usd: Decimal | None
    provider_ms: float
    top_provider_ms: float


def measure_regret(connection: Any, tenant: str, *, since_s: float, limit: int) -> list[Regret]:
    """The regret of each tier that was chosen, by the shadow sample of a tenant."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in shadow_pairs(connection, tenant, since_s=since_s, limit=limit):
        groups.setdefault((pair.chosen_tier, pair.top_tier), []).append(pair)
    return [_regret(tier, top, pairs) for (tier, top), pairs in sorted(groups.items())]


def _regret(tier: str, top_tier: str, pairs: Sequence[Pair]) -> Regret:
    texts = [(_words(pair.chosen_text), _words(pair.top_text)) for pair in pairs]
    similar = [fuzz.token_sort_ratio(one, other) / _PERCENT for one, other in texts]
    return Regret(
        tier=tier,
        top_tier=top_tier,
        pairs=len(pairs),
        equal=sum(one == other for one, other in texts) / len(pairs),
        similarity=statistics.mean(similar),
        usd=_sum(pair.chosen_usd for pair in pairs),
        top_usd=_sum(pair.top_usd for pair in pairs),
        provider_ms=_median(pair.chosen_ms for pair in pairs),
        top_provider_ms=_median(pair.top_ms for pair in pairs),
    )


def _words(text: str | None) -> str:
    return " ".join((text or "")[:_COMPARED_CHARS].split())


def _sum(values: Iterable[Decimal | None]) -> Decimal | None:
    known = list(values)
    return None if None in known else sum((v for v in known if v is not None), Decimal(0))


def _median(values: Iterable[float | None]) -> float:
    """Of the answers that were called for; 0 where all came from the cache."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else 0.0
