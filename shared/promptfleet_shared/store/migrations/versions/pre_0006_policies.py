"""Options that steer how a job is answered, what was decided by them, and what that saved."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("jobs", sa.Column("policy", pg.JSONB))
    op.add_column("jobs", sa.Column("decision", pg.JSONB))
    op.add_column("jobs", sa.Column("concurrency_key", sa.Text))
    op.add_column("results", sa.Column("decision", pg.JSONB))
    op.add_column("results", sa.Column("saved_usd", sa.Numeric))
    op.create_index("ledger_tenant_idx", "ledger", ["tenant", "at"])
    _allow("coalesced", "hit", "miss", "off", "semantic")


def downgrade() -> None:
    """Take them away."""
    op.execute("UPDATE results SET cache = 'hit' WHERE cache = 'semantic'")
    _allow("coalesced", "hit", "miss", "off")
    op.drop_index("ledger_tenant_idx", "ledger")
    for column in ("saved_usd", "decision"):
        op.drop_column("results", column)
    for column in ("concurrency_key", "decision", "policy"):
        op.drop_column("jobs", column)


def _allow(*statuses: str) -> None:
    """Let results tell these of the cache.

    In two steps: the second one reads the rows that are there and locks nobody out.
    """
    name = op.f("results_cache_check")
    listed = ", ".join(f"'{status}'" for status in statuses)
    op.drop_constraint(name, "results")
    op.execute(f"ALTER TABLE results ADD CONSTRAINT {name} CHECK (cache IN ({listed})) NOT VALID")
    op.execute(f"ALTER TABLE results VALIDATE CONSTRAINT {name}")
