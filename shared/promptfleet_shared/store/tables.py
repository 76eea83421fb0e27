"""The tables, as SQLAlchemy sees them; a test holds the migrations against them."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from promptfleet_shared.jobs import FINAL_STATES, CacheStatus, JobKind, JobState, OnUnknown

metadata = sa.MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(column_0_label)s_idx",
    }
)


def _one_of(column: str, values: object) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in sorted(values))  # type: ignore[call-overload]
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _instant(name: str, *, nullable: bool = False) -> sa.Column[dt.datetime]:
    default = None if nullable else sa.text("clock_timestamp()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=default)


def _text(name: str, *, nullable: bool = False, default: str | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable, server_default=default)


def _usage() -> list[sa.Column[int]]:
    names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
    return [_counter(name) for name in names]


# The claim changes only columns that no index knows, so that Postgres can update in place (HOT):
# `finished_at`, not `state`, is what the partial index asks for.
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("tier"),
    _text("kind", default=JobKind.CHAT.value),
    _text("model", nullable=True),
    _text("state", default=JobState.QUEUED.value),
    sa.Column("request", pg.JSON, nullable=False),
    _counter("input_tokens"),
    sa.Column("priority", sa.SmallInteger, nullable=False, server_default="5"),
    sa.Column("cache", pg.JSONB),
    sa.Column("metadata", pg.JSONB),
    _text("idempotency_key", nullable=True),
    sa.Column("request_digest", sa.LargeBinary),
    _text("callback_url", nullable=True),
    _instant("created_at"),
    _instant("run_at"),
    sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
    # When the sweeper looks at the job next; the one timer of a job.
    sa.Column("sweep_at", sa.DateTime(timezone=True), nullable=False),
    _instant("rung_at"),
    _counter("rings"),
    _counter("attempt"),
    _counter("crashes"),
    _counter("calls"),
    _counter("unknown_calls"),
    # Calls that the present claim has begun or is about to begin: what a lost lease is charged.
    _counter("claim_calls"),
    _text("on_unknown", default=OnUnknown.RETRY.value),
    _counter("deferrals"),
    sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
    _text("lease_owner", nullable=True),
    _instant("lease_until", nullable=True),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("last_error", pg.JSONB),
    _instant("finished_at", nullable=True),
    _one_of("state", JobState),
    _one_of("kind", JobKind),
    _one_of("on_unknown", OnUnknown),
    sa.CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
    sa.CheckConstraint(
        "(state IN ('cancelled', 'expired', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
        name="finished",
    ),
    sa.Index("jobs_sweep_idx", "sweep_at", postgresql_where=sa.text("finished_at IS NULL")),
    sa.Index(
        "jobs_idempotency_idx",
        "tenant",
        "idempotency_key",
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    ),
)

# No foreign key to jobs: its check would take a row lock on the job that the same statement has
# just written, at a tenth of the whole cost of finishing; the statement itself joins the two.
results = sa.Table(
    "results",
    metadata,
    sa.Column("job_id", pg.UUID, primary_key=True),
    _text("tenant"),
    _text("tier"),
    _text("state"),
    _text("text", nullable=True),
    sa.Column("response", pg.JSON),
    _text("finish_reason", nullable=True),
    sa.Column("error", pg.JSONB),
    _text("model", nullable=True),
    _text("provider", nullable=True),
    _text("deployment", nullable=True),
    *_usage(),
    sa.Column("cost_usd", sa.Numeric),
    _text("cache", default=CacheStatus.OFF.value),
    _counter("attempts"),
    _counter("calls"),
    sa.Column("batch_id", pg.UUID),
    sa.Column("batch_size", sa.Integer, nullable=False, server_default="1"),
    sa.Column("queued_ms", sa.Float, nullable=False, server_default="0"),
    sa.Column("provider_ms", sa.Float),
    sa.Column("total_ms", sa.Float, nullable=False, server_default="0"),
    sa.Column("metadata", pg.JSONB),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    _instant("finished_at"),
    _one_of("state", FINAL_STATES),
    _one_of("cache", CacheStatus),
)

# What was paid, and what may have been: a row for each finished or released claim that called.
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("job_id", pg.UUID, nullable=False),
    _text("tenant"),
    _text("tier"),
    _text("model", nullable=True),
    _text("provider", nullable=True),
    _text("deployment", nullable=True),
    _counter("calls"),
    _counter("unknown_calls"),
    *_usage(),
    sa.Column("cost_usd", sa.Numeric),
    _instant("at"),
    sa.Index("ledger_at_idx", "at", postgresql_using="brin"),
)

# The outbox of signed callbacks, written with the result that they tell of.
callbacks = sa.Table(
    "callbacks",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
    sa.Column("job_id", pg.UUID, nullable=False),
    _text("tenant"),
    _text("url"),
    # The URL without its query: what is slowed down, paused and disabled as one.
    sa.Column(
        "endpoint", sa.Text, sa.Computed("split_part(url, '?', 1)", persisted=True), nullable=False
    ),
    _text("event"),
    _counter("attempts"),
    _instant("next_at"),
    _instant("created_at"),
    _instant("delivered_at", nullable=True),
    _instant("exhausted_at", nullable=True),
    _instant("lease_until", nullable=True),
    sa.Column("last_status", sa.Integer),
    _text("last_error", nullable=True),
    sa.Index("callbacks_job_idx", "job_id"),
    sa.Index(
        "callbacks_due_idx",
        "next_at",
        postgresql_where=sa.text("delivered_at IS NULL AND exhausted_at IS NULL"),
    ),
)

# What is known of those who receive callbacks; a row comes with an endpoint's first failure.
callback_endpoints = sa.Table(
    "callback_endpoints",
    metadata,
    _text("tenant"),
    _text("endpoint"),
    _counter("failures"),
    _instant("paused_until", nullable=True),
    _instant("disabled_at", nullable=True),
    sa.PrimaryKeyConstraint("tenant", "endpoint", name="callback_endpoints_pkey"),
)
