"""Batches that a provider's own batch API has: written down before the provider is asked.

A claimed job that goes this way leaves its worker: it is `submitted`, keeps the fence of that claim
and has no lease, and is a line of a batch. Who moves a batch on holds the batch's lease, and each
statement here asks for it; the jobs themselves are asked for their fence, so that an answer for a
job that was taken back, cancelled or has expired changes nothing.

    gathering → preparing → submitting → submitted → ended
                    ↑            ↓           ↑
                    └──────── unknown ───────┘
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from promptfleet_shared.jobs import ClaimedJob, Doorbell, JobError, JobKind
from promptfleet_shared.store.claims import CLAIMED_COLUMNS, claimed_job, doorbell, error_record

NO_ROW = uuid.UUID(int=0)
"""Before every id: where a walk over a batch's lines begins."""

# One row a destination is gathering: who finds it takes its lock until the jobs are attached, and
# who seals it waits for that. No row comes back where there is no room.
_ATTACH = sa.text("""
WITH input AS MATERIALIZED (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, held_fence bigint, request text, cache_key text, queued_ms float8,
        decision jsonb, reserved jsonb)
), room AS MATERIALIZED (
    INSERT INTO provider_batches AS open (id, tenant, deployment, kind, model, lines, bytes,
                                          lease_until)
    VALUES (:id, :tenant, :deployment, :kind, :model, :lines, :bytes,
            clock_timestamp() + :gather_s * interval '1 second')
    ON CONFLICT (tenant, deployment, kind, model) WHERE state = 'gathering'
    DO UPDATE SET lines = open.lines + :lines, bytes = open.bytes + :bytes
     WHERE open.lines + :lines <= :max_lines AND open.bytes + :bytes <= :max_bytes
    RETURNING open.id, open.lines, open.bytes
), locked AS MATERIALIZED (
    SELECT jobs.id AS locked_id, input.* FROM room, jobs JOIN input ON jobs.id = job_id
     WHERE fence = held_fence AND state = 'running' ORDER BY jobs.id FOR UPDATE OF jobs
), given AS (
    UPDATE jobs SET state = 'submitted', lease_owner = NULL, lease_until = NULL, claim_calls = 0,
           -- From here on it may be taken back, to be called by itself.
           run_at = deadline - :spill_s * interval '1 second',
           sweep_at = CASE WHEN cancel_requested THEN clock_timestamp()
                      ELSE deadline - :spill_s * interval '1 second' END,
           decision = CASE WHEN locked.decision IS NULL THEN jobs.decision
                      ELSE coalesce(jobs.decision, '{}') || locked.decision END
      FROM locked WHERE jobs.id = locked_id
), added AS (
    INSERT INTO provider_batch_lines (job_id, fence, batch_id, tenant, request, cache_key,
                                      queued_ms, reserved)
    SELECT job_id, held_fence, room.id, :tenant, CAST(request AS json), cache_key, queued_ms,
           reserved
      FROM locked, room
)
SELECT room.lines, room.bytes, locked_id FROM room LEFT JOIN locked ON true
""").bindparams(
    sa.bindparam("lines", type_=sa.Integer),
    sa.bindparam("bytes", type_=sa.BigInteger),
    sa.bindparam("spill_s", type_=sa.Float),
    sa.bindparam("gather_s", type_=sa.Float),
    sa.bindparam("max_lines", type_=sa.Integer),
    sa.bindparam("max_bytes", type_=sa.BigInteger),
)

_SEAL_FULL = sa.text("""
UPDATE provider_batches SET state = 'preparing', lease_until = clock_timestamp()
 WHERE tenant = :tenant AND deployment = :deployment AND kind = :kind AND model = :model
   AND state = 'gathering' AND lines >= :lines
""")

_COLUMNS = """id, tenant, deployment, kind, model, state, lines, sent, tries, file_id, provider_id,
       cancel_sent, created_at,
       extract(epoch FROM submitting_at)::float8 AS submitting_at,
       extract(epoch FROM clock_timestamp() - unknown_at)::float8 AS unknown_for_s"""

# Nobody waits for a `submitting` batch: its lease ends only where its worker was lost in between.
_CLAIM = sa.text(f"""
WITH due AS MATERIALIZED (
    SELECT id AS due_id FROM provider_batches
     WHERE state <> 'ended' AND lease_until <= clock_timestamp()
       AND deployment = ANY(CAST(:deployments AS text[]))
     ORDER BY lease_until LIMIT :most FOR UPDATE SKIP LOCKED)
UPDATE provider_batches SET lease_owner = :owner,
       lease_until = clock_timestamp() + CAST(:lease_s AS float8) * interval '1 second',
       unknown_at = CASE WHEN state = 'submitting' THEN clock_timestamp() ELSE unknown_at END,
       state = CASE state WHEN 'gathering' THEN 'preparing' WHEN 'submitting' THEN 'unknown'
               ELSE state END
  FROM due WHERE id = due_id
RETURNING {_COLUMNS}
""")  # noqa: S608 - nothing of a caller's, here and below

_HELD = """id = :id AND tenant = :tenant AND lease_owner = :owner
   AND lease_until > clock_timestamp()"""
_LEASE = "lease_until = clock_timestamp() + CAST(:lease_s AS float8) * interval '1 second'"

_HOLD = sa.text(f"UPDATE provider_batches SET {_LEASE} WHERE {_HELD} RETURNING id")  # noqa: S608

_PAUSE = sa.text(f"""
UPDATE provider_batches SET lease_owner = NULL, {_LEASE}, tries = tries + :tries,
       error = coalesce(:error, error)
 WHERE {_HELD}
""").bindparams(  # noqa: S608
    sa.bindparam("tries", type_=sa.Integer),
    sa.bindparam("error", type_=pg.JSONB(none_as_null=True)),
)

# From here on a line may be paid for: what ends its job without an answer counts its call.
_MARK = sa.text(f"""
WITH held AS MATERIALIZED (
    UPDATE provider_batches SET {_LEASE} WHERE {_HELD} AND state = 'preparing' RETURNING id
), page AS MATERIALIZED (
    SELECT job_id, fence AS held_fence FROM provider_batch_lines, held
     WHERE batch_id = held.id AND job_id > CAST(:after AS uuid) ORDER BY job_id LIMIT :limit
), locked AS MATERIALIZED (
    SELECT jobs.id AS locked_id, held_fence FROM jobs JOIN page ON jobs.id = job_id
     WHERE fence = held_fence AND state = 'submitted' AND NOT cancel_requested
     ORDER BY jobs.id FOR UPDATE OF jobs
), charged AS (
    UPDATE jobs SET claim_calls = 1 FROM locked WHERE jobs.id = locked_id
), marked AS (
    UPDATE provider_batch_lines AS line SET sent = locked_id IS NOT NULL
      FROM page LEFT JOIN locked ON locked_id = job_id
     WHERE line.job_id = page.job_id AND line.fence = page.held_fence
)
SELECT (SELECT count(*) FROM held) AS held, count(page.job_id) AS seen,
       count(locked_id) AS marked, max(page.job_id::text) AS last
  FROM page LEFT JOIN locked ON locked_id = job_id
""")  # noqa: S608

_SENT = sa.text("""
SELECT line.job_id, line.fence, coalesce(line.request, jobs.request)::text AS request
  FROM provider_batch_lines AS line JOIN jobs ON jobs.id = line.job_id
 WHERE line.batch_id = :id AND line.tenant = :tenant AND sent AND line.job_id > CAST(:after AS uuid)
 ORDER BY line.job_id LIMIT :limit
""")

_NOTE_FILE = sa.text(f"""
UPDATE provider_batches SET file_id = :file_id, sent = :sent, {_LEASE}
 WHERE {_HELD} AND state = 'preparing' RETURNING id
""")  # noqa: S608

_BEGIN = sa.text(f"""
UPDATE provider_batches SET state = 'submitting', submitting_at = clock_timestamp(),
       sent = :sent, {_LEASE}
 WHERE {_HELD} AND state = 'preparing' RETURNING id
""")  # noqa: S608

_SUBMITTED = sa.text("""
UPDATE provider_batches SET state = 'submitted', provider_id = :provider_id, tries = 0,
       submitted_at = clock_timestamp(), lease_owner = NULL,
       lease_until = clock_timestamp() + CAST(:lease_s AS float8) * interval '1 second'
 WHERE id = :id AND tenant = :tenant
   AND (state IN ('submitting', 'unknown') AND provider_id IS NULL
        OR state = 'submitted' AND provider_id = :provider_id)
RETURNING id
""")

_UNKNOWN = sa.text(f"""
UPDATE provider_batches SET state = 'unknown', unknown_at = clock_timestamp(), {_LEASE},
       lease_owner = NULL
 WHERE {_HELD} AND state = 'submitting'
""")  # noqa: S608

_AGAIN = sa.text(f"""
UPDATE provider_batches SET state = 'preparing', unknown_at = NULL, {_LEASE}, lease_owner = NULL,
       tries = tries + 1, error = coalesce(:error, error)
 WHERE {_HELD} AND state IN ('submitting', 'unknown')
""").bindparams(sa.bindparam("error", type_=pg.JSONB(none_as_null=True)))  # noqa: S608

_WAITING = sa.text(f"""
WITH answered AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[])) AS a (job_id, fence))
SELECT {CLAIMED_COLUMNS}, cache_key, line_request, line_queued_ms, reserved
  FROM (SELECT jobs.*, line.cache_key, line.request::text AS line_request, line.reserved,
               line.queued_ms AS line_queued_ms
          FROM answered JOIN provider_batch_lines AS line USING (job_id, fence)
          JOIN jobs ON jobs.id = job_id AND jobs.fence = line.fence
         WHERE line.batch_id = :batch_id AND line.tenant = :tenant AND jobs.tenant = :tenant
           AND state = 'submitted') AS waiting
""")  # noqa: S608

_LEFT = sa.text("""
SELECT line.job_id, line.fence FROM provider_batch_lines AS line
  JOIN jobs ON jobs.id = line.job_id AND jobs.fence = line.fence
 WHERE line.batch_id = :batch_id AND line.tenant = :tenant AND state = 'submitted'
   AND line.job_id > CAST(:after AS uuid)
 ORDER BY line.job_id LIMIT :limit
""")

_WANTED = sa.text("""
SELECT EXISTS (
    SELECT FROM provider_batch_lines AS line
      JOIN jobs ON jobs.id = line.job_id AND jobs.fence = line.fence
     WHERE line.batch_id = :batch_id AND line.tenant = :tenant AND state = 'submitted'
       AND NOT cancel_requested)
""")

# Queued again under a new fence: the line's late answer, should one come, is nobody's.
_RETURN = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, held_fence bigint, delay_s float8, counts boolean, calls int,
        unknown_calls int, error jsonb, policy jsonb)
), locked AS MATERIALIZED (
    SELECT id, input.* FROM jobs JOIN input ON id = job_id
     WHERE fence = held_fence AND state = 'submitted' AND tenant = :tenant
     ORDER BY id FOR UPDATE OF jobs
), returned AS (
    UPDATE jobs SET state = 'queued', fence = fence + 1, claim_calls = 0,
           run_at = clock_timestamp() + delay_s * interval '1 second',
           rung_at = clock_timestamp(),
           sweep_at = CASE WHEN cancel_requested THEN clock_timestamp() ELSE least(deadline,
                      clock_timestamp() + delay_s * interval '1 second') END,
           attempt = attempt - CASE WHEN counts THEN 0 ELSE 1 END,
           deferrals = deferrals + CASE WHEN counts THEN 0 ELSE 1 END,
           calls = jobs.calls + locked.calls,
           unknown_calls = jobs.unknown_calls + locked.unknown_calls,
           last_error = coalesce(locked.error, last_error),
           policy = coalesce(jobs.policy, '{}') || coalesce(locked.policy, '{}')
      FROM locked WHERE jobs.id = locked.id
    RETURNING jobs.id, tenant, tier, priority, concurrency_key, metadata, locked.calls,
              locked.unknown_calls
), paid AS (
    INSERT INTO ledger (job_id, tenant, tier, metadata, calls, unknown_calls)
    SELECT id, tenant, tier, metadata, calls, unknown_calls FROM returned WHERE calls > 0
)
SELECT id, tier, priority, tenant, concurrency_key FROM returned
""")

_CANCEL_SENT = sa.text(f"""
UPDATE provider_batches SET cancel_sent = true, {_LEASE} WHERE {_HELD}
""")  # noqa: S608

_END = sa.text(f"""
WITH ended AS (
    UPDATE provider_batches SET state = 'ended', ended_at = clock_timestamp(), lease_owner = NULL,
           error = coalesce(:error, error)
     WHERE {_HELD} AND state <> 'ended' RETURNING id
)
DELETE FROM provider_batch_lines USING ended WHERE batch_id = ended.id
""").bindparams(sa.bindparam("error", type_=pg.JSONB(none_as_null=True)))  # noqa: S608

_KNOWN = sa.text("""
SELECT provider_id FROM provider_batches
 WHERE deployment = ANY(CAST(:deployments AS text[])) AND provider_id = ANY(CAST(:ids AS text[]))
""")

_OWNS = sa.text("""
SELECT EXISTS (SELECT FROM provider_batch_lines
 WHERE batch_id = :batch_id AND tenant = :tenant AND job_id = :job_id AND fence = :fence)
""")

_PRUNE = sa.text("""
DELETE FROM provider_batches
 WHERE state = 'ended' AND id < CAST(:floor AS uuid)
   AND ended_at < clock_timestamp() - :age_s * interval '1 second'
""")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where lines go together: one tenant's, to one endpoint of one deployment, for one model."""

    tenant: str
    deployment: str
    kind: JobKind
    model: str

    @property
    def parameters(self) -> dict[str, Any]:
        """What the statements are given."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewLine:
    """A claimed job that is to become a line.

    Attributes:
        request: What is sent, where that is not the job's own request.
        bytes: Of the whole line.
        cache_key: Of its answer in the response cache.
        decision: What was decided about it so far.
        reserved: What it has reserved of budgets: nanodollars by "budget:value".
    """

    job_id: uuid.UUID
    fence: int
    bytes: int
    request: str | None = None
    cache_key: str | None = None
    queued_ms: float = 0.0
    decision: Mapping[str, Any] | None = None
    reserved: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How much of a batch there may be, and how long it is open."""

    max_lines: int
    max_bytes: int
    gather_s: float
    spill_before_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A provider's batch under this worker's lease, as it was when it was claimed.

    Attributes:
        lines: Jobs that were ever attached.
        sent: Of them, those that are in what the provider gets; known from `submitting` on.
        submitting_at: Seconds since 1970 when the provider was about to be asked, by our database.
        unknown_for_s: Seconds since it was noticed that nobody knows what came of that.
    """

    id: uuid.UUID
    tenant: str
    deployment: str
    kind: JobKind
    model: str
    state: str
    lines: int
    sent: int
    tries: int
    file_id: str | None
    provider_id: str | None
    cancel_sent: bool
    submitting_at: float | None
    unknown_for_s: float | None
    owner: str
    lease_s: float

    @property
    def parameters(self) -> dict[str, Any]:
        """What each statement about it asks for."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "owner": self.owner,
            "lease_s": self.lease_s,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LineKey:
    """What tells a line: its job, under the fence of the claim that was given away."""

    job_id: uuid.UUID
    fence: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SentLine:
    """A line as it is sent."""

    key: LineKey
    request: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A job that waits for its line's answer, and what it has reserved of budgets."""

    job: ClaimedJob
    cache_key: str | None
    request: str
    reserved: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Some of a batch's lines, marked: from here on the provider may get them.

    Attributes:
        marked: Those whose job still waits; the others are left out.
        last: Where the next page begins; None after the last one.
    """

    marked: int
    last: uuid.UUID | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Return:
    """A job that the batch has no answer for, queued again.

    Attributes:
        delay_s: Seconds until it may run.
        counts: True if that burns an attempt.
        policy: What is to change in its policy, such as the way that it goes.
    """

    key: LineKey
    delay_s: float = 0.0
    counts: bool = False
    calls: int = 0
    unknown_calls: int = 0
    error: JobError | None = None
    policy: Mapping[str, Any] | None = None


def attach(
    connection: sa.Connection,
    destination: Destination,
    lines: Sequence[NewLine],
    *,
    new_id: uuid.UUID,
    room: Room,
) -> set[uuid.UUID] | None:
    """Give claimed jobs to the batch that is gathering there, or to a new one; the caller commits.

    Each becomes `submitted` under its fence; a job whose fence has moved on is left out.

    Args:
        connection: In a transaction that the caller commits.
        destination: Where all of the lines go.
        lines: At most `room.max_lines`.
        new_id: Of the batch, should there be none.
        room: The limits of one batch.

    Returns:
        The jobs that were given; None if the batch that is gathering has no room for them.
    """
    rows = connection.execute(
        _ATTACH,
        {
            **destination.parameters,
            "id": new_id,
            "records": orjson.dumps([_line_record(line) for line in lines]).decode(),
            "lines": len(lines),
            "bytes": sum(line.bytes for line in lines),
            "max_lines": room.max_lines,
            "max_bytes": room.max_bytes,
            "gather_s": room.gather_s,
            "spill_s": room.spill_before_s,
        },
    ).all()
    if not rows:
        return None
    if rows[0].lines >= room.max_lines:
        seal(connection, destination, lines=room.max_lines)
    return {row.locked_id for row in rows if row.locked_id is not None}


def _line_record(line: NewLine) -> dict[str, Any]:
    return {
        "job_id": line.job_id,
        "held_fence": line.fence,
        "request": line.request,
        "cache_key": line.cache_key,
        "queued_ms": line.queued_ms,
        "decision": line.decision,
        "reserved": line.reserved,
    }


def seal(connection: sa.Connection, destination: Destination, *, lines: int = 0) -> None:
    """Let no more jobs into the batch that is gathering, if it has so many lines: it is due now."""
    connection.execute(_SEAL_FULL, {**destination.parameters, "lines": lines})


def claim_due(
    connection: sa.Connection,
    deployments: Sequence[str],
    *,
    owner: str,
    lease_s: float,
    limit: int,
) -> list[Held]:
    """Take up to `limit` batches that somebody should look at now.

    What was gathering is `preparing`; what was `submitting` under a lease that lapsed is `unknown`.
    """
    parameters = {"deployments": list(deployments), "owner": owner, "lease_s": lease_s}
    rows = connection.execute(_CLAIM, {**parameters, "most": limit})
    return [_held(row, owner, lease_s) for row in rows.all()]


def _held(row: Any, owner: str, lease_s: float) -> Held:
    return Held(
        id=row.id,
        tenant=row.tenant,
        deployment=row.deployment,
        kind=JobKind(row.kind),
        model=row.model,
        state=row.state,
        lines=row.lines,
        sent=row.sent,
        tries=row.tries,
        file_id=row.file_id,
        provider_id=row.provider_id,
        cancel_sent=row.cancel_sent,
        submitting_at=row.submitting_at,
        unknown_for_s=row.unknown_for_s,
        owner=owner,
        lease_s=lease_s,
    )


def hold(connection: sa.Connection, held: Held) -> bool:
    """Extend the lease; false if the batch is somebody else's by now."""
    return connection.execute(_HOLD, held.parameters).first() is not None


def pause(
    connection: sa.Connection,
    held: Held,
    pause_s: float,
    *,
    failed: bool = False,
    error: JobError | None = None,
) -> None:
    """Give the batch back, for whoever looks at it after `pause_s` seconds."""
    parameters = {**held.parameters, "lease_s": pause_s, "tries": int(failed)}
    connection.execute(_PAUSE, {**parameters, "error": error_record(error)})


def mark_lines(
    connection: sa.Connection, held: Held, *, after: uuid.UUID, limit: int
) -> Page | None:
    """Mark the next lines as to be sent; None if the batch is somebody else's by now."""
    parameters = {**held.parameters, "after": after, "limit": limit}
    row = connection.execute(_MARK, parameters).one()
    if not row.held:
        return None
    return Page(marked=row.marked, last=uuid.UUID(row.last) if row.seen == limit else None)


def sent_lines(
    connection: sa.Connection, held: Held, *, after: uuid.UUID, limit: int
) -> list[SentLine]:
    """Up to `limit` of the marked lines, in the order of their jobs."""
    parameters = {**held.parameters, "after": after, "limit": limit}
    return [
        SentLine(key=LineKey(job_id=row.job_id, fence=row.fence), request=row.request)
        for row in connection.execute(_SENT, parameters).all()
    ]


def note_file(connection: sa.Connection, held: Held, file_id: str, *, sent: int) -> bool:
    """Write down where the provider keeps the lines, before they are asked for. As `hold`."""
    parameters = {**held.parameters, "file_id": file_id, "sent": sent}
    return connection.execute(_NOTE_FILE, parameters).first() is not None


def begin_submitting(connection: sa.Connection, held: Held, *, sent: int) -> bool:
    """Write down that the provider is about to be asked to make the batch. As `hold`."""
    parameters = {**held.parameters, "sent": sent}
    return connection.execute(_BEGIN, parameters).first() is not None


def note_submitted(
    connection: sa.Connection, held: Held, provider_id: str, *, pause_s: float
) -> bool:
    """The provider has it, under this name; looked at again after `pause_s` seconds.

    It asks for no lease: whoever knows the name may write it down, as long as nobody has written
    another one. False if somebody has.
    """
    parameters = {**held.parameters, "provider_id": provider_id, "lease_s": pause_s}
    return connection.execute(_SUBMITTED, parameters).first() is not None


def note_unknown(connection: sa.Connection, held: Held, *, pause_s: float) -> None:
    """Nobody knows whether the provider made it: to be looked for after `pause_s` seconds."""
    connection.execute(_UNKNOWN, {**held.parameters, "lease_s": pause_s})


def prepare_again(
    connection: sa.Connection, held: Held, *, pause_s: float, error: JobError | None = None
) -> None:
    """The provider has not made it, for certain: it is to be asked after `pause_s` seconds."""
    parameters = {**held.parameters, "lease_s": pause_s, "error": error_record(error)}
    connection.execute(_AGAIN, parameters)


def waiting_jobs(connection: sa.Connection, held: Held, keys: Sequence[LineKey]) -> list[Waiting]:
    """The jobs of those of the lines that nothing has ended yet."""
    parameters = {
        "ids": [key.job_id for key in keys],
        "fences": [key.fence for key in keys],
        "batch_id": held.id,
        "tenant": held.tenant,
    }
    return [_waiting(row) for row in connection.execute(_WAITING, parameters).all()]


def _waiting(row: Any) -> Waiting:
    job = claimed_job(row)._replace(queued_ms=row.line_queued_ms)
    request = row.line_request or job.request
    return Waiting(job=job, cache_key=row.cache_key, request=request, reserved=row.reserved)


def left_lines(
    connection: sa.Connection, held: Held, *, after: uuid.UUID, limit: int
) -> list[LineKey]:
    """Up to `limit` lines whose jobs still wait."""
    parameters = {"batch_id": held.id, "tenant": held.tenant, "after": after, "limit": limit}
    return [
        LineKey(job_id=row.job_id, fence=row.fence)
        for row in connection.execute(_LEFT, parameters).all()
    ]


def is_wanted(connection: sa.Connection, held: Held) -> bool:
    """True if a job still waits for an answer from the batch."""
    parameters = {"batch_id": held.id, "tenant": held.tenant}
    return bool(connection.execute(_WANTED, parameters).scalar_one())


def return_lines(
    connection: sa.Connection, held: Held, returns: Sequence[Return]
) -> list[Doorbell]:
    """Queue jobs again, where the fence still holds; the doorbells to ring after their delays."""
    records = [
        {
            "job_id": item.key.job_id,
            "held_fence": item.key.fence,
            "delay_s": item.delay_s,
            "counts": item.counts,
            "calls": item.calls,
            "unknown_calls": item.unknown_calls,
            "error": error_record(item.error),
            "policy": item.policy,
        }
        for item in returns
    ]
    parameters = {"records": orjson.dumps(records).decode(), "tenant": held.tenant}
    rows = connection.execute(_RETURN, parameters).all()
    return [doorbell(row) for row in rows]


def note_cancel(connection: sa.Connection, held: Held) -> None:
    """The provider was asked to cancel it."""
    connection.execute(_CANCEL_SENT, held.parameters)


def end(connection: sa.Connection, held: Held, *, error: JobError | None = None) -> None:
    """Nothing of the batch is to come any more; its lines are gone."""
    connection.execute(_END, {**held.parameters, "error": error_record(error)})


def known_ids(
    connection: sa.Connection, deployments: Sequence[str], ids: Sequence[str]
) -> set[str]:
    """Those of a provider's names for batches that are written down here, for any tenant."""
    parameters = {"deployments": list(deployments), "ids": list(ids)}
    return set(connection.execute(_KNOWN, parameters).scalars())


def owns_line(connection: sa.Connection, held: Held, key: LineKey) -> bool:
    """True if the line is one of this batch's."""
    parameters = {"batch_id": held.id, "tenant": held.tenant}
    return bool(connection.execute(_OWNS, {**parameters, **dataclasses.asdict(key)}).scalar_one())


def prune(connection: sa.Connection, *, floor: uuid.UUID, age_s: float) -> None:
    """Forget batches that ended more than `age_s` seconds ago; `floor` as for `sweeping.prune`."""
    connection.execute(_PRUNE, {"floor": floor, "age_s": age_s})
