"""What was used of limits of an hour and longer: Redis counts, and this remembers.

A window is kept as a whole, as it was seen at one moment; a later sight takes an earlier one's
place. Limits of the fleet, of deployments and of API keys have no tenant: theirs is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import orjson
import sqlalchemy as sa

# Who was stopped between looking and writing must not undo what others wrote since. A sight from
# more than a minute ahead is another Redis', whose clock was wrong.
_KEEP = sa.text("""
INSERT INTO limit_windows AS kept (tenant, name, pieces, seen_us, expires_at)
SELECT tenant, name, pieces, :seen_us, clock_timestamp() + 2 * period_s * interval '1 second'
  FROM json_to_recordset(CAST(:records AS json)) AS r (
       tenant text, name text, period_s double precision, pieces jsonb)
 ORDER BY tenant, name
ON CONFLICT (tenant, name) DO UPDATE
   SET pieces = excluded.pieces, seen_us = excluded.seen_us, expires_at = excluded.expires_at
 WHERE kept.seen_us < excluded.seen_us OR kept.seen_us > excluded.seen_us + 60000000
""")

_RECALL = sa.text("""
SELECT w.name, w.pieces
  FROM json_to_recordset(CAST(:records AS json)) AS r (tenant text, name text)
  JOIN limit_windows w ON w.tenant = r.tenant AND w.name = r.name
 WHERE w.expires_at > clock_timestamp()
""")

_PRUNE = sa.text("""
DELETE FROM limit_windows WHERE (tenant, name) IN (
    SELECT tenant, name FROM limit_windows WHERE expires_at < clock_timestamp()
     LIMIT :limit FOR UPDATE SKIP LOCKED)
""")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitWindow:
    """What was used of one limit.

    Attributes:
        tenant: Whose limit it is; empty where it is no tenant's.
        name: Its name in Redis; no two tenants' are the same.
        period_s: Seconds.
        pieces: What was used in each sixtieth of the period, by the sixtieth's number since 1970.
    """

    tenant: str
    name: str
    period_s: float
    pieces: Mapping[int, float]


def keep_windows(
    connection: sa.Connection, windows: Sequence[LimitWindow], *, seen_us: int
) -> None:
    """Keep these windows as they were seen at `seen_us`, microseconds of Redis' clock."""
    records = [
        {
            "tenant": window.tenant,
            "name": window.name,
            "period_s": window.period_s,
            "pieces": {str(piece): used for piece, used in window.pieces.items()},
        }
        for window in windows
    ]
    connection.execute(_KEEP, {"records": orjson.dumps(records).decode(), "seen_us": seen_us})


def recall_windows(
    connection: sa.Connection, wanted: Sequence[tuple[str, str]]
) -> dict[str, list[tuple[int, float]]]:
    """What was used of the windows of these tenants and names, by name, as far as it is kept."""
    records = [{"tenant": tenant, "name": name} for tenant, name in wanted]
    rows = connection.execute(_RECALL, {"records": orjson.dumps(records).decode()})
    return {
        name: [(int(piece), float(used)) for piece, used in pieces.items()] for name, pieces in rows
    }


def prune_windows(connection: sa.Connection, *, limit: int) -> int:
    """Forget windows whose whole period has passed; how many, `limit` at most."""
    return connection.execute(_PRUNE, {"limit": limit}).rowcount
