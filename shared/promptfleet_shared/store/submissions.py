"""Accept jobs: insert `queued` rows, once per idempotency key."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from promptfleet_shared.errors import IdempotencyConflictError
from promptfleet_shared.jobs import CacheOptions, JobSpec

RING_GRACE_S = 10
"""Seconds that a fresh doorbell has before the sweeper rings again."""

_INSERT = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        id uuid, tenant text, tier text, kind text, model text, request text, input_tokens int,
        priority smallint, cache jsonb, metadata jsonb, idempotency_key text,
        request_digest text, callback_url text, deadline_s float8)
), clock AS MATERIALIZED (SELECT clock_timestamp() AS now)
INSERT INTO jobs (id, tenant, tier, kind, model, request, input_tokens, priority, cache, metadata,
                  idempotency_key, request_digest, callback_url, created_at, run_at, rung_at,
                  deadline, sweep_at)
SELECT id, tenant, tier, kind, model, CAST(request AS json), input_tokens, priority, cache,
       metadata, idempotency_key, decode(request_digest, 'hex'), callback_url, now, now, now,
       now + deadline_s * interval '1 second',
       now + least(deadline_s, :ring_grace_s) * interval '1 second'
  FROM input, clock
ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING id
""").bindparams(ring_grace_s=RING_GRACE_S)

_BY_KEY = sa.text("""
SELECT id, tenant, idempotency_key, encode(request_digest, 'hex') AS digest FROM jobs
 WHERE (tenant, idempotency_key) IN (SELECT * FROM unnest(CAST(:tenants AS text[]),
                                                          CAST(:keys AS text[])))
""")


def insert_jobs(connection: sa.Connection, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
    """Insert the jobs in one statement; the caller commits.

    Returns:
        The id of each spec's job, in order: its own, or that of the job which was accepted
        earlier under the same idempotency key with the same request.

    Raises:
        IdempotencyConflictError: A key was used with another request. Nothing is inserted.
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
    if keyed and len(inserted) < len(fresh):
        unique |= _accepted_earlier(connection, [s for s in fresh if s.id not in inserted], digests)
    return [s.id if s.idempotency_key is None else unique[_key(s)] for s in specs]


def request_digest(spec: JobSpec) -> str:
    """What makes two submissions under one idempotency key the same request."""
    facts = [spec.tier, spec.kind, spec.model, spec.callback_url, spec.metadata]
    dumped = orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(dumped + b"\0" + spec.request).hexdigest()


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
    rows = connection.execute(
        _BY_KEY,
        {"tenants": [s.tenant for s in refused], "keys": [s.idempotency_key for s in refused]},
    )
    known = {(row.tenant, row.idempotency_key): row for row in rows}
    for spec in refused:
        if known[_key(spec)].digest != digests[spec.id]:
            raise IdempotencyConflictError(field="idempotency_key")
    return {key: row.id for key, row in known.items()}


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
    }
    record.update((name, value) for name, value in optional.items() if value is not None)
    return record


def _cache_record(cache: CacheOptions | None) -> dict[str, Any] | None:
    if cache is None:
        return None
    return {"mode": cache.mode, "ttl_s": cache.ttl_s, "namespace": cache.namespace}
