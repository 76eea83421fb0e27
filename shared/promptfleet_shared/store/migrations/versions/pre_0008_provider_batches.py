"""Batches that providers' own batch APIs have."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    """Add them and their lines."""
    op.create_table(
        "provider_batches",
        sa.Column("id", pg.UUID, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("deployment", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False, server_default="gathering"),
        sa.Column("lines", sa.Integer, nullable=False, server_default="0"),
        sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("sent", sa.Integer, nullable=False, server_default="0"),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("file_id", sa.Text),
        sa.Column("provider_id", sa.Text),
        sa.Column("cancel_sent", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("error", pg.JSONB),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_NOW),
        sa.Column("submitting_at", sa.DateTime(timezone=True)),
        sa.Column("unknown_at", sa.DateTime(timezone=True)),
        sa.Column("submitted_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False, server_default=_NOW),
        sa.CheckConstraint(
            "state IN ('ended', 'gathering', 'preparing', 'submitted', 'submitting', 'unknown')",
            name="state",
        ),
        sa.CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)", name="ended"),
    )
    op.create_index(
        "provider_batches_gathering_idx",
        "provider_batches",
        ["tenant", "deployment", "kind", "model"],
        unique=True,
        postgresql_where=sa.text("state = 'gathering'"),
    )
    op.create_index(
        "provider_batches_due_idx",
        "provider_batches",
        ["lease_until"],
        postgresql_where=sa.text("state <> 'ended'"),
    )
    op.create_index(
        "provider_batches_provider_idx", "provider_batches", ["deployment", "provider_id"]
    )
    op.create_table(
        "provider_batch_lines",
        sa.Column("job_id", pg.UUID, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("batch_id", pg.UUID, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("request", pg.JSON),
        sa.Column("cache_key", sa.Text),
        sa.Column("queued_ms", sa.Float, nullable=False, server_default="0"),
        sa.Column("sent", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.PrimaryKeyConstraint("job_id", "fence", name="provider_batch_lines_pkey"),
    )
    op.create_index(
        "provider_batch_lines_batch_idx", "provider_batch_lines", ["batch_id", "job_id"]
    )


def downgrade() -> None:
    """Take them away: jobs that providers have are queued again, to be called by themselves."""
    op.execute(
        "UPDATE jobs SET state = 'queued', fence = fence + 1, claim_calls = 0,"
        " run_at = clock_timestamp(), sweep_at = clock_timestamp(),"
        " calls = calls + claim_calls, unknown_calls = unknown_calls + claim_calls"
        " WHERE state = 'submitted'"
    )
    op.drop_table("provider_batch_lines")
    op.drop_table("provider_batches")
