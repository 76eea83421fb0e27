"""The first tables: jobs, results, ledger, callbacks."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

FINAL = "'cancelled', 'expired', 'failed', 'succeeded'"
NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    """Create them."""
    op.create_table(
        "jobs",
        sa.Column("id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False, server_default="chat"),
        sa.Column("model", sa.Text),
        sa.Column("state", sa.Text, nullable=False, server_default="queued"),
        sa.Column("request", pg.JSON, nullable=False),
        _counter("input_tokens"),
        sa.Column("priority", sa.SmallInteger, nullable=False, server_default="5"),
        sa.Column("cache", pg.JSONB),
        sa.Column("metadata", pg.JSONB),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("request_digest", sa.LargeBinary),
        sa.Column("callback_url", sa.Text),
        _instant("created_at"),
        _instant("run_at"),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sweep_at", sa.DateTime(timezone=True), nullable=False),
        _instant("rung_at"),
        _counter("rings"),
        _counter("attempt"),
        _counter("crashes"),
        _counter("calls"),
        _counter("unknown_calls"),
        _counter("deferrals"),
        sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("last_error", pg.JSONB),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="jobs_pkey"),
        sa.CheckConstraint(
            "state IN ('cancelled', 'expired', 'failed', 'queued', 'running', 'submitted',"
            " 'succeeded')",
            name=op.f("jobs_state_check"),
        ),
        sa.CheckConstraint(
            "kind IN ('chat', 'completion', 'embedding')", name=op.f("jobs_kind_check")
        ),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("jobs_priority_check")),
        sa.CheckConstraint(
            f"(state IN ({FINAL})) = (finished_at IS NOT NULL)", name=op.f("jobs_finished_check")
        ),
    )
    op.create_index(
        "jobs_sweep_idx", "jobs", ["sweep_at"], postgresql_where=sa.text("finished_at IS NULL")
    )
    op.create_index(
        "jobs_idempotency_idx",
        "jobs",
        ["tenant", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "results",
        sa.Column("job_id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("response", pg.JSON),
        sa.Column("finish_reason", sa.Text),
        sa.Column("error", pg.JSONB),
        sa.Column("model", sa.Text),
        sa.Column("provider", sa.Text),
        sa.Column("deployment", sa.Text),
        _counter("input_tokens"),
        _counter("cached_tokens"),
        _counter("output_tokens"),
        _counter("reasoning_tokens"),
        sa.Column("cost_usd", sa.Numeric),
        sa.Column("cache", sa.Text, nullable=False, server_default="off"),
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
        sa.PrimaryKeyConstraint("job_id", name="results_pkey"),
        sa.CheckConstraint(f"state IN ({FINAL})", name=op.f("results_state_check")),
        sa.CheckConstraint(
            "cache IN ('coalesced', 'hit', 'miss', 'off')", name=op.f("results_cache_check")
        ),
    )
    op.create_table(
        "ledger",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("job_id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("provider", sa.Text),
        sa.Column("deployment", sa.Text),
        _counter("calls"),
        _counter("unknown_calls"),
        _counter("input_tokens"),
        _counter("cached_tokens"),
        _counter("output_tokens"),
        _counter("reasoning_tokens"),
        sa.Column("cost_usd", sa.Numeric),
        _instant("at"),
        sa.PrimaryKeyConstraint("id", name="ledger_pkey"),
    )
    op.create_index("ledger_at_idx", "ledger", ["at"], postgresql_using="brin")
    op.create_table(
        "callbacks",
        sa.Column("id", pg.UUID, nullable=False, server_default=sa.text("gen_random_uuid()")),
        sa.Column("job_id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        _counter("attempts"),
        _instant("next_at"),
        _instant("created_at"),
        sa.Column("delivered_at", sa.DateTime(timezone=True)),
        sa.Column("exhausted_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="callbacks_pkey"),
    )
    op.create_index(
        "callbacks_due_idx",
        "callbacks",
        ["next_at"],
        postgresql_where=sa.text("delivered_at IS NULL AND exhausted_at IS NULL"),
    )
    _tune()


def _tune() -> None:
    # Room in each page for the next version of a row, so that claims update in place.
    op.execute("ALTER TABLE jobs SET (fillfactor = 50)")
    # A job's row is written three times: its request moves out of line at the first and is not
    # copied by the others. Requests are read once, so compressing them is not worth the CPU.
    op.execute("ALTER TABLE jobs SET (toast_tuple_target = 512)")
    op.execute("ALTER TABLE jobs ALTER COLUMN request SET STORAGE EXTERNAL")
    # Rows come and go by the thousand; the planner's defaults would vacuum far too late.
    op.execute("ALTER TABLE jobs SET (autovacuum_vacuum_scale_factor = 0.05)")


def downgrade() -> None:
    """Drop them."""
    for table in ("callbacks", "ledger", "results", "jobs"):
        op.drop_table(table)


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _instant(name: str) -> sa.Column[dt.datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=NOW)
