"""What a claim may have called, what an unknown outcome means, and the delivery of callbacks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


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
    op.create_index("callbacks_job_idx", "callbacks", ["job_id"])
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
    op.drop_index("callbacks_job_idx", "callbacks")
    for column in ("last_error", "last_status", "lease_until", "endpoint"):
        op.drop_column("callbacks", column)
    op.drop_constraint(op.f("jobs_on_unknown_check"), "jobs")
    op.drop_column("jobs", "on_unknown")
    op.drop_column("jobs", "claim_calls")
