"""What a claim may have called, what an unknown outcome means, and the delivery of callbacks."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _instant(name: str) -> sa.Column[dt.datetime]:
    now = sa.text("clock_timestamp()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=now)


def upgrade() -> None:
    """Add columns, which Postgres does without rewriting a table, and the endpoints' table."""
    op.add_column("jobs", sa.Column("claim_calls", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("on_unknown", sa.Text, nullable=False, server_default="retry"))
    op.create_check_constraint(
        op.f("jobs_on_unknown_check"), "jobs", "on_unknown IN ('fail', 'retry')"
    )
    # The outbox is small: only what is not delivered yet counts, and a rewrite is quick.
    op.add_column(
        "callbacks",
        sa.Column("endpoint", sa.Text, sa.Computed("split_part(url, '?', 1)", persisted=True)),
    )
    op.alter_column("callbacks", "endpoint", nullable=False)
    op.add_column("callbacks", sa.Column("lease_until", sa.DateTime(timezone=True)))
    op.add_column("callbacks", sa.Column("last_status", sa.Integer))
    op.add_column("callbacks", sa.Column("last_error", sa.Text))
    op.add_column("callbacks", _instant("begun_at"))
    op.create_index("callbacks_job_idx", "callbacks", ["job_id"])
    op.drop_index("callbacks_due_idx", "callbacks")
    op.create_index(
        "callbacks_due_idx",
        "callbacks",
        ["tenant", "endpoint", "next_at"],
        postgresql_where=sa.text("delivered_at IS NULL AND exhausted_at IS NULL"),
    )
    op.create_index(
        "callbacks_lease_idx",
        "callbacks",
        ["lease_until"],
        postgresql_where=sa.text("lease_until IS NOT NULL"),
    )
    op.create_index(
        "callbacks_exhausted_idx",
        "callbacks",
        ["tenant", "exhausted_at"],
        postgresql_where=sa.text("exhausted_at IS NOT NULL"),
    )
    op.create_table(
        "callback_endpoints",
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("paused_until", sa.DateTime(timezone=True)),
        sa.Column("disabled_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("tenant", "endpoint", name="callback_endpoints_pkey"),
    )


def downgrade() -> None:
    """Undo it; what was being delivered is delivered again."""
    op.drop_table("callback_endpoints")
    for index in ("job", "lease", "exhausted", "due"):
        op.drop_index(f"callbacks_{index}_idx", "callbacks")
    op.create_index(
        "callbacks_due_idx",
        "callbacks",
        ["next_at"],
        postgresql_where=sa.text("delivered_at IS NULL AND exhausted_at IS NULL"),
    )
    for column in ("begun_at", "last_error", "last_status", "lease_until", "endpoint"):
        op.drop_column("callbacks", column)
    op.drop_constraint(op.f("jobs_on_unknown_check"), "jobs")
    op.drop_column("jobs", "on_unknown")
    op.drop_column("jobs", "claim_calls")
