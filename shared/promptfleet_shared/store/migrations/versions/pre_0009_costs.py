"""Costs that are estimated or bounded, and whose they are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("estimated_usd", sa.Numeric),
    ("at_most_usd", sa.Numeric),
    ("metadata", pg.JSONB),
)


def upgrade() -> None:
    """Add them."""
    for name, kind in _COLUMNS:
        op.add_column("ledger", sa.Column(name, kind()))


def downgrade() -> None:
    """Take them away."""
    for name, _ in reversed(_COLUMNS):
        op.drop_column("ledger", name)
