"""Pairs of answers to one prompt: by the tier that was chosen for it, and by the top tier."""

from __future__ import annotations

import dataclasses
import uuid
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

SHADOW = "shadow"
"""What chose the tier of a second job, and the key under which its decision names the first."""
SHADOW_METADATA = "promptfleet_shadow_of"
"""The key of a second job's metadata that has the first one's id."""

# A second job ends after its first one, so the span bounds both.
_PAIRS = sa.text("""
SELECT chosen.job_id, chosen.tier, chosen.text AS chosen_text, chosen.cost_usd AS chosen_usd,
       chosen.provider_ms AS chosen_ms, chosen.decision->'tier'->>'level' AS level,
       top.tier AS top_tier, top.text AS top_text, top.cost_usd AS top_usd,
       top.provider_ms AS top_ms
  FROM results AS top
  JOIN results AS chosen ON chosen.job_id = CAST(top.metadata->>'promptfleet_shadow_of' AS uuid)
   AND chosen.tenant = top.tenant
 WHERE top.tenant = :tenant AND top.state = 'succeeded' AND chosen.state = 'succeeded'
   AND top.decision->'tier'->>'by' = 'shadow'
   AND top.finished_at >= clock_timestamp() - :since_s * interval '1 second'
 ORDER BY top.finished_at DESC LIMIT :limit
""")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One prompt's two answers.

    Attributes:
        level: How hard the prompt was taken to be, if that was estimated.
        chosen_usd: What the call cost; None where no price is known, 0 from the cache.
    """

    job_id: uuid.UUID
    level: str | None
    chosen_tier: str
    chosen_text: str | None
    chosen_usd: Decimal | None
    chosen_ms: float | None
    top_tier: str
    top_text: str | None
    top_usd: Decimal | None
    top_ms: float | None


def shadow_pairs(
    connection: sa.Connection, tenant: str, *, since_s: float, limit: int
) -> list[Pair]:
    """The latest prompts of a tenant that both tiers have answered.

    Args:
        connection: To read with.
        tenant: Whose prompts.
        since_s: Seconds back from now.
        limit: Pairs at most.
    """
    parameters = {"tenant": tenant, "since_s": since_s, "limit": limit}
    return [_pair(row) for row in connection.execute(_PAIRS, parameters)]


def _pair(row: Any) -> Pair:
    return Pair(
        job_id=row.job_id,
        level=row.level,
        chosen_tier=row.tier,
        chosen_text=row.chosen_text,
        chosen_usd=row.chosen_usd,
        chosen_ms=row.chosen_ms,
        top_tier=row.top_tier,
        top_text=row.top_text,
        top_usd=row.top_usd,
        top_ms=row.top_ms,
    )
