"""Conversations that jobs take part in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def _instant(name: str) -> sa.Column[object]:
    default = sa.text("clock_timestamp()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=default)


def upgrade() -> None:
    """Add their tables, and the index that finds a conversation's unfinished jobs."""
    op.create_table(
        "conversations",
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("memory_id", sa.Text, nullable=False),
        sa.Column("turns", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("summary", sa.Text),
        sa.Column("summarised", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("holder", pg.UUID),
        sa.Column("holder_fence", sa.BigInteger),
        _instant("created_at"),
        _instant("updated_at"),
        sa.PrimaryKeyConstraint("tenant", "memory_id", name="conversations_pkey"),
    )
    op.create_index("conversations_updated_idx", "conversations", ["updated_at"])
    op.create_table(
        "conversation_turns",
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("memory_id", sa.Text, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("job_id", pg.UUID, nullable=False),
        sa.Column("messages", pg.JSON, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        _instant("created_at"),
        sa.PrimaryKeyConstraint("tenant", "memory_id", "n", name="conversation_turns_pkey"),
    )
    op.create_index(
        "jobs_memory_idx",
        "jobs",
        ["tenant", sa.text("(policy ->> 'memory_id')"), "id"],
        postgresql_where=sa.text("(policy ->> 'memory_id') IS NOT NULL AND finished_at IS NULL"),
    )


def downgrade() -> None:
    """Take them away: what was remembered is gone."""
    op.drop_index("jobs_memory_idx", "jobs")
    op.drop_table("conversation_turns")
    op.drop_table("conversations")
