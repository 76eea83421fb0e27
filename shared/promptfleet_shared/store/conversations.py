"""Conversations: whose turn it is, what was said before, and how a turn is added.

A conversation belongs to one job at a time, its holder: turns are taken in the order of
submission, and each sees the answers of all before it. A holder holds as long as its claim, so
nothing is to be given back: a claim that was released, lost or finished holds nothing.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import orjson
import sqlalchemy as sa

from promptfleet_shared.jobs import Conversation, ConversationTurn
from promptfleet_shared.store.claims import storable_text

# One snapshot decides: if it shows that nobody holds a conversation, it shows the last holder's
# turn, too, since that was written with the holder's end. A holder that came after the snapshot is
# not the one that was seen, and who was not seen is not replaced. Rows that somebody else has
# locked are passed over, so that nobody waits and nothing deadlocks: the job comes again.
_TAKE = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, job_fence bigint, tenant text, memory_id text, max_bytes bigint)
), seen AS MATERIALIZED (
    SELECT input.*, holder, holder_fence, c.memory_id IS NOT NULL AS known
      FROM input LEFT JOIN conversations c
           ON c.tenant = input.tenant AND c.memory_id = input.memory_id
), free AS MATERIALIZED (
    SELECT * FROM seen
     WHERE NOT EXISTS (
               SELECT FROM jobs WHERE id = holder AND id <> job_id
                  AND (state = 'running' AND fence = holder_fence OR state = 'submitted'))
       AND NOT EXISTS (
               SELECT FROM jobs WHERE jobs.tenant = seen.tenant
                  AND (jobs.policy ->> 'memory_id') IS NOT NULL
                  AND (jobs.policy ->> 'memory_id') = seen.memory_id
                  AND finished_at IS NULL AND id < job_id)
), locked AS MATERIALIZED (
    SELECT c.tenant, c.memory_id FROM conversations c JOIN free
           ON c.tenant = free.tenant AND c.memory_id = free.memory_id
     WHERE c.holder IS NOT DISTINCT FROM free.holder
       AND c.holder_fence IS NOT DISTINCT FROM free.holder_fence
     ORDER BY c.tenant, c.memory_id FOR NO KEY UPDATE OF c SKIP LOCKED
), taken AS (
    UPDATE conversations c SET holder = job_id, holder_fence = job_fence
      FROM locked JOIN free ON locked.tenant = free.tenant AND locked.memory_id = free.memory_id
     WHERE c.tenant = locked.tenant AND c.memory_id = locked.memory_id
    RETURNING c.holder
), begun AS (
    INSERT INTO conversations (tenant, memory_id, holder, holder_fence)
    SELECT tenant, memory_id, job_id, job_fence FROM free WHERE NOT known
     ORDER BY tenant, memory_id
    ON CONFLICT DO NOTHING RETURNING holder
)
SELECT job_id, summary, summarised, turns, (
           SELECT json_agg(json_build_array(n, messages) ORDER BY n)::text
             FROM (SELECT n, messages, sum(bytes) OVER (ORDER BY n DESC) - bytes AS newer
                     FROM conversation_turns t
                    WHERE t.tenant = free.tenant AND t.memory_id = free.memory_id
                      AND n > summarised) AS said
            WHERE newer < max_bytes) AS said
  FROM free LEFT JOIN conversations c ON c.tenant = free.tenant AND c.memory_id = free.memory_id
 WHERE job_id IN (SELECT holder FROM taken UNION ALL SELECT holder FROM begun)
""")

_SUMMARISE = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, tenant text, memory_id text, summary text, known bigint, up_to bigint)
)
UPDATE conversations c SET summary = input.summary, summarised = up_to FROM input
 WHERE c.tenant = input.tenant AND c.memory_id = input.memory_id AND holder = job_id
   AND summarised = known
""")

_READ = sa.text("""
SELECT summary, created_at, updated_at, (
           SELECT json_agg(json_build_array(n, job_id, messages,
                                            extract(epoch FROM t.created_at)) ORDER BY n)::text
             FROM conversation_turns t
            WHERE t.tenant = c.tenant AND t.memory_id = c.memory_id)
  FROM conversations c WHERE tenant = :tenant AND memory_id = :memory_id
""")

# Who adds a turn holds the conversation's row: first that one, which waits for them, so that the
# second statement sees what they added.
_DELETE = sa.text("""
DELETE FROM conversations WHERE tenant = :tenant AND memory_id = :memory_id RETURNING turns
""")
_DELETE_TURNS = sa.text("""
DELETE FROM conversation_turns WHERE tenant = :tenant AND memory_id = :memory_id
""")

# What a job that is not final belongs to stays; so nothing adds a turn meanwhile.
_PRUNE = sa.text("""
WITH old AS MATERIALIZED (
    SELECT tenant, memory_id FROM conversations c
     WHERE updated_at < clock_timestamp() - :age_s * interval '1 second'
       AND NOT EXISTS (
               SELECT FROM jobs WHERE jobs.tenant = c.tenant
                  AND (jobs.policy ->> 'memory_id') IS NOT NULL
                  AND (jobs.policy ->> 'memory_id') = c.memory_id AND finished_at IS NULL)
     ORDER BY updated_at LIMIT :limit FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM conversations c USING old
     WHERE c.tenant = old.tenant AND c.memory_id = old.memory_id
    RETURNING c.tenant, c.memory_id
), forgotten AS (
    DELETE FROM conversation_turns t USING gone
     WHERE t.tenant = gone.tenant AND t.memory_id = gone.memory_id
)
SELECT count(*) FROM gone
""")


class Ask(NamedTuple):
    """A claimed job that wants its conversation.

    Attributes:
        max_bytes: JSON of the newest turns that is wanted, as many turns as that begins.
    """

    job_id: uuid.UUID
    fence: int
    tenant: str
    memory_id: str
    max_bytes: int


class Recollection(NamedTuple):
    """What a conversation holds for the job whose turn it is.

    Attributes:
        summary: Of the turns up to number `summarised`; None where none was made.
        summarised: The number of the last turn that the summary tells of; 0 without one.
        turns: How many turns there are in all.
        said: The newest turns after those as JSON, the oldest first: `[[number, [message, …]], …]`.
            Decoding it takes time where it is long.
    """

    summary: str | None
    summarised: int
    turns: int
    said: str


class NewSummary(NamedTuple):
    """A summary of the turns up to `up_to`, to replace the one up to `known`."""

    job_id: uuid.UUID
    tenant: str
    memory_id: str
    summary: str
    known: int
    up_to: int


def take_conversations(
    connection: sa.Connection, asks: Sequence[Ask]
) -> dict[uuid.UUID, Recollection]:
    """Let those jobs hold their conversations whose turn it is; the caller commits.

    Returns:
        What each of them is to remember. A job that is missing has to come again: a job that was
        submitted before it is not final yet, or one of the same conversation runs.
    """
    records = [
        {
            "job_id": ask.job_id,
            "job_fence": ask.fence,
            "tenant": ask.tenant,
            "memory_id": ask.memory_id,
            "max_bytes": ask.max_bytes,
        }
        for ask in asks
    ]
    rows = connection.execute(_TAKE, {"records": orjson.dumps(records).decode()}).all()
    return {row[0]: Recollection(row[1], row[2] or 0, row[3] or 0, row[4] or "[]") for row in rows}


def summarise_conversations(connection: sa.Connection, summaries: Sequence[NewSummary]) -> int:
    """Keep summaries, each while its job holds the conversation; returns how many were kept."""
    records = [
        {**summary._asdict(), "summary": storable_text(summary.summary)} for summary in summaries
    ]
    return connection.execute(_SUMMARISE, {"records": orjson.dumps(records).decode()}).rowcount


def read_conversation(
    connection: sa.Connection, memory_id: str, *, tenant: str
) -> Conversation | None:
    """A conversation of the tenant; None if there is none."""
    row = connection.execute(_READ, {"tenant": tenant, "memory_id": memory_id}).one_or_none()
    if row is None:
        return None
    turns = [
        ConversationTurn(
            number=number,
            job_id=uuid.UUID(job_id),
            messages=messages,
            created_at=dt.datetime.fromtimestamp(float(at), tz=dt.UTC),
        )
        for number, job_id, messages, at in orjson.loads(row[3] or "[]")
    ]
    return Conversation(
        memory_id=memory_id, turns=turns, summary=row[0], created_at=row[1], updated_at=row[2]
    )


def delete_conversation(connection: sa.Connection, memory_id: str, *, tenant: str) -> bool:
    """Forget a conversation, in a transaction that the caller commits; false if there is none.

    A job that is under way goes on, and its turn is not remembered.
    """
    parameters = {"tenant": tenant, "memory_id": memory_id}
    found = connection.execute(_DELETE, parameters).one_or_none() is not None
    connection.execute(_DELETE_TURNS, parameters)
    return found


def prune_conversations(connection: sa.Connection, *, age_s: float, limit: int = 100) -> int:
    """Delete up to `limit` conversations whose last turn is `age_s` seconds old."""
    count: int = connection.execute(_PRUNE, {"age_s": age_s, "limit": limit}).scalar_one()
    return count
