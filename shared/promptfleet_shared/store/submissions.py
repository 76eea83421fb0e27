"""Accept jobs: insert `queued` rows, once per idempotency key."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from promptfleet_shared.errors import IdempotencyConflictError, StoreRefusedError
from promptfleet_shared.jobs import CacheOptions, JobSpec, OnUnknown

RING_GRACE_S = 30
"""Seconds that a fresh doorbell has before the sweeper rings again."""

# On any conflict: an id that is there already is ours, of a try whose reply was lost.
_INSERT = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        id uuid, tenant text, tier text, kind text, model text, request text, input_tokens int,
        priority smallint, cache jsonb, metadata jsonb, idempotency_key text,
        request_digest text, callback_url text, on_unknown text, stream boolean, batch_id uuid,
        policy jsonb, concurrency_key text, decision jsonb, deadline_s float8)
), clock AS MATERIALIZED (SELECT clock_timestamp() AS now)
INSERT INTO jobs (id, tenant, tier, kind, model, request, input_tokens, priority, cache, metadata,
                  idempotency_key, request_digest, callback_url, on_unknown, stream, batch_id,
                  policy, concurrency_key, decision, created_at, run_at, rung_at, deadline,
                  sweep_at)
SELECT id, tenant, tier, kind, model, CAST(request AS json), input_tokens, priority, cache,
       metadata, idempotency_key, decode(request_digest, 'hex'), callback_url,
       coalesce(on_unknown, 'retry'), coalesce(stream, false), batch_id, policy,
       concurrency_key, decision, now, now, now,
       now + deadline_s * interval '1 second',
       now + least(deadline_s, :ring_grace_s) * interval '1 second'
  FROM input, clock
ON CONFLICT DO NOTHING
RETURNING id
""").bindparams(ring_grace_s=RING_GRACE_S)

_BY_KEY = sa.text("""
SELECT id, tenant, idempotency_key, encode(request_digest, 'hex') AS digest FROM jobs
 WHERE (tenant, idempotency_key) IN (SELECT * FROM unnest(CAST(:tenants AS text[]),
                                                          CAST(:keys AS text[])))
""")


_THERE = sa.text("""
SELECT id FROM jobs WHERE (tenant, id) IN (SELECT * FROM unnest(CAST(:tenants AS text[]),
                                                                CAST(:ids AS uuid[])))
""")

_GIVE_UP_SOON = sa.text("SET LOCAL idle_in_transaction_session_timeout = '5s'")


def insert_jobs(connection: sa.Connection, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
    """Insert the jobs in one statement; the caller commits.

    May be repeated after a lost reply: what is there already is found again, and not doubled.

    Returns:
        The id of each spec's job, in order: its own, or that of the job which was accepted
        earlier under the same idempotency key with the same request.

    Raises:
        IdempotencyConflictError: A key was used with another request. Nothing is inserted.
        StoreRefusedError: The database took the statement, and not the jobs.
    """
    if not specs:
        return []
    keyed = [spec for spec in specs if spec.idempotency_key is not None]
    digests = {spec.id: request_digest(spec) for spec in keyed}
    unique = _first_of_each_key(keyed, digests)
    fresh = [s for s in specs if s.idempotency_key is None or unique[_key(s)] == s.id]
    if keyed:
        # Two callers that insert the same keys must wait for each other in the same order.
        fresh.sort(key=lambda spec: (spec.tenant, spec.idempotency_key or ""))
    records = orjson.dumps([_record(spec, digests.get(spec.id)) for spec in fresh])
    inserted = set(connection.execute(_INSERT, {"records": records.decode()}).scalars().all())
    if len(inserted) < len(fresh):
        unique |= _accepted_earlier(connection, [s for s in fresh if s.id not in inserted], digests)
    return [s.id if s.idempotency_key is None else unique[_key(s)] for s in specs]


def give_up_soon(connection: sa.Connection) -> None:
    """Let Postgres end this transaction 5 s after it last heard of its client.

    One that was lost between two statements would hold its rows until TCP gives up, and a repeat
    of the insert would wait for them.
    """
    connection.execute(_GIVE_UP_SOON)


def request_digest(spec: JobSpec) -> str:
    """What makes two submissions under one idempotency key the same request."""
    tier = asked_tier(spec)
    facts: list[object] = [tier, spec.kind, spec.model, spec.callback_url, spec.metadata]
    if spec.on_unknown is not OnUnknown.RETRY:  # else digests of earlier versions would change
        facts.append(spec.on_unknown)
    if spec.policy or spec.concurrency_key:
        facts.append([spec.policy, spec.concurrency_key])
    dumped = orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(dumped + b"\0" + spec.request).hexdigest()


def asked_tier(spec: JobSpec) -> str:
    """The tier that was asked for: the choice for `auto` may differ when it is made again."""
    if spec.decision is None:
        return spec.tier
    asked: str = spec.decision.get("tier", {}).get("asked", spec.tier)
    return asked


def _key(spec: JobSpec) -> tuple[str, str | None]:
    return spec.tenant, spec.idempotency_key


def _first_of_each_key(
    keyed: Sequence[JobSpec], digests: dict[uuid.UUID, str]
) -> dict[tuple[str, str | None], uuid.UUID]:
    """The id that stands for each key within this call."""
    first: dict[tuple[str, str | None], uuid.UUID] = {}
    for spec in keyed:
        winner = first.setdefault(_key(spec), spec.id)
        if digests[winner] != digests[spec.id]:
            raise IdempotencyConflictError(field="idempotency_key")
    return first


def _accepted_earlier(
    connection: sa.Connection, refused: Sequence[JobSpec], digests: dict[uuid.UUID, str]
) -> dict[tuple[str, str | None], uuid.UUID]:
    """Read back what stands in the way of the refused: who has their keys, and their own ids."""
    keyed = [spec for spec in refused if spec.idempotency_key is not None]
    known: dict[tuple[str, str | None], sa.Row[Any]] = {}
    if keyed:
        known = {(row.tenant, row.idempotency_key): row for row in _by_key(connection, keyed)}
    for spec in keyed:
        if _key(spec) in known and known[_key(spec)].digest != digests[spec.id]:
            raise IdempotencyConflictError(field="idempotency_key")
    unkeyed = [spec for spec in refused if spec.idempotency_key is None]
    there = _there(connection, unkeyed) if unkeyed else set()
    missing = sum(_key(s) not in known for s in keyed) + sum(s.id not in there for s in unkeyed)
    if missing:  # pruned since, or a trigger of somebody's dropped the rows: never say "accepted"
        raise StoreRefusedError(f"the database did not keep {missing} of the jobs")
    return {key: row.id for key, row in known.items()}


def _by_key(connection: sa.Connection, specs: Sequence[JobSpec]) -> sa.CursorResult[Any]:
    parameters = {"tenants": [s.tenant for s in specs], "keys": [s.idempotency_key for s in specs]}
    return connection.execute(_BY_KEY, parameters)


def _there(connection: sa.Connection, specs: Sequence[JobSpec]) -> set[uuid.UUID]:
    parameters = {"tenants": [s.tenant for s in specs], "ids": [s.id for s in specs]}
    return set(connection.execute(_THERE, parameters).scalars().all())


def _record(spec: JobSpec, digest: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": spec.id,
        "tenant": spec.tenant,
        "tier": spec.tier,
        "kind": spec.kind,
        # As a string, since JSON within JSON could not hold an escaped NUL.
        "request": spec.request.decode(),
        "input_tokens": spec.input_tokens,
        "priority": spec.priority,
        "deadline_s": spec.deadline_s,
    }
    # Absent keys are NULL, and cheaper to read than nulls.
    optional = {
        "model": spec.model,
        "cache": _cache_record(spec.cache),
        "metadata": spec.metadata,
        "idempotency_key": spec.idempotency_key,
        "request_digest": digest,
        "callback_url": spec.callback_url,
        "on_unknown": None if spec.on_unknown is OnUnknown.RETRY else spec.on_unknown,
        "stream": spec.stream or None,
        "batch_id": spec.batch_id,
        "policy": spec.policy,
        "concurrency_key": spec.concurrency_key,
        "decision": spec.decision,
    }
    record.update((name, value) for name, value in optional.items() if value is not None)
    return record


def _cache_record(cache: CacheOptions | None) -> dict[str, Any] | None:
    if cache is None:
        return None
    return {"mode": cache.mode, "ttl_s": cache.ttl_s, "namespace": cache.namespace}
