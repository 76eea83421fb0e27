"""What people ask of the outbox: list it, deliver a callback again, enable an endpoint again."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import uuid

import sqlalchemy as sa

_STATE = """CASE WHEN delivered_at IS NOT NULL THEN 'delivered'
            WHEN exhausted_at IS NOT NULL THEN 'exhausted' ELSE 'pending' END"""

_LIST = sa.text(f"""
SELECT id, job_id, event, endpoint, {_STATE} AS state, attempts, created_at, next_at, delivered_at,
       exhausted_at, last_status, last_error, paused_until, disabled_at
  FROM callbacks LEFT JOIN callback_endpoints USING (tenant, endpoint)
 WHERE tenant = :tenant AND (CAST(:state AS text) IS NULL OR {_STATE} = :state)
 ORDER BY created_at DESC, id LIMIT :limit
""")  # noqa: S608 - nothing of a caller's

# What is being delivered just now is left alone. A replay is a schedule of its own, under the same
# id; and who asks for one thinks that the receiver is well again, so it is tried at once.
_REPLAY = """
WITH chosen AS MATERIALIZED (
    SELECT c.id AS callback_id, disabled_at IS NOT NULL AS disabled,
           coalesce(lease_until > clock_timestamp(), false) AS in_flight
      FROM callbacks c LEFT JOIN callback_endpoints USING (tenant, endpoint)
     WHERE tenant = :tenant AND {chosen} ORDER BY c.id FOR UPDATE OF c
), replayed AS (
    UPDATE callbacks SET attempts = 0, begun_at = clock_timestamp(), next_at = clock_timestamp(),
           delivered_at = NULL, exhausted_at = NULL, lease_until = NULL
      FROM chosen WHERE id = callback_id AND NOT disabled AND NOT in_flight
    RETURNING tenant, endpoint
), tried AS (
    UPDATE callback_endpoints e SET paused_until = clock_timestamp()
      FROM (SELECT DISTINCT tenant, endpoint FROM replayed) AS r
     WHERE e.tenant = r.tenant AND e.endpoint = r.endpoint AND paused_until > clock_timestamp()
)
SELECT count(*) FILTER (WHERE NOT disabled AND NOT in_flight) AS replayed,
       count(*) FILTER (WHERE disabled) AS disabled,
       count(*) FILTER (WHERE in_flight AND NOT disabled) AS in_flight FROM chosen
"""
_REPLAY_ONE = sa.text(_REPLAY.format(chosen="c.id = :id"))
_REPLAY_EXHAUSTED = sa.text(
    _REPLAY.format(
        chosen="""exhausted_at IS NOT NULL
       AND (CAST(:endpoint AS text) IS NULL OR endpoint = split_part(:endpoint, '?', 1))"""
    )
)

_ENABLE = sa.text("""
DELETE FROM callback_endpoints
 WHERE tenant = :tenant AND endpoint = split_part(:endpoint, '?', 1) RETURNING endpoint
""")

_COUNTS = sa.text("""
SELECT (SELECT count(*) FROM callbacks
         WHERE delivered_at IS NULL AND exhausted_at IS NULL) AS pending,
       (SELECT count(*) FROM callbacks WHERE exhausted_at IS NOT NULL) AS exhausted,
       (SELECT count(*) FROM callback_endpoints WHERE disabled_at IS NOT NULL) AS disabled
""")


class CallbackState(enum.StrEnum):
    """What became of a callback so far."""

    PENDING = "pending"
    DELIVERED = "delivered"
    EXHAUSTED = "exhausted"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CallbackRow:
    """A callback as people see it; without its URL's query, where receivers keep secrets.

    Attributes:
        job_id: The job that it tells of; None for what is no job's end.
        paused_until: Until when its endpoint is left alone, if it is.
        disabled_at: When its endpoint wanted no more callbacks, if it did.
    """

    id: uuid.UUID
    job_id: uuid.UUID | None
    event: str
    endpoint: str
    state: CallbackState
    attempts: int
    created_at: dt.datetime
    next_at: dt.datetime
    delivered_at: dt.datetime | None
    exhausted_at: dt.datetime | None
    last_status: int | None
    last_error: str | None
    paused_until: dt.datetime | None
    disabled_at: dt.datetime | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What a replay did.

    Attributes:
        replayed: Callbacks that are due now.
        disabled: Those left alone since their endpoint is disabled.
        in_flight: Those left alone since they are being delivered just now.
    """

    replayed: int
    disabled: int
    in_flight: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CallbackCounts:
    """How many callbacks wait, how many are given up, and how many endpoints are disabled."""

    pending: int
    exhausted: int
    disabled: int


def list_callbacks(
    connection: sa.Connection, *, tenant: str, state: CallbackState | None = None, limit: int = 100
) -> list[CallbackRow]:
    """A tenant's callbacks, the newest first."""
    parameters = {"tenant": tenant, "state": state, "limit": limit}
    rows = connection.execute(_LIST, parameters).mappings()
    return [CallbackRow(**{**row, "state": CallbackState(row["state"])}) for row in rows]


def replay_one(connection: sa.Connection, callback_id: uuid.UUID, *, tenant: str) -> Replay:
    """Deliver a callback again, whatever became of it; all counts are 0 if there is none.

    The caller commits, here and below.
    """
    return _replay(connection.execute(_REPLAY_ONE, {"id": callback_id, "tenant": tenant}))


def replay_exhausted(
    connection: sa.Connection, *, tenant: str, endpoint: str | None = None
) -> Replay:
    """Deliver all exhausted callbacks again, optionally only those to one URL."""
    parameters = {"endpoint": endpoint, "tenant": tenant}
    return _replay(connection.execute(_REPLAY_EXHAUSTED, parameters))


def enable_endpoint(connection: sa.Connection, endpoint: str, *, tenant: str) -> bool:
    """Post to a URL again that was disabled or paused; false if it was neither."""
    parameters = {"endpoint": endpoint, "tenant": tenant}
    return connection.execute(_ENABLE, parameters).first() is not None


def callback_counts(connection: sa.Connection) -> CallbackCounts:
    """How the outbox of all tenants is."""
    return CallbackCounts(**connection.execute(_COUNTS).mappings().one())


def _replay(rows: sa.CursorResult[tuple[int, int, int]]) -> Replay:
    return Replay(**rows.mappings().one())
