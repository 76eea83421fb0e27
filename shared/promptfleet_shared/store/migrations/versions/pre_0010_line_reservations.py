"""What lines of providers' batches have reserved of budgets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add it."""
    op.add_column("provider_batch_lines", sa.Column("reserved", pg.JSONB))


def downgrade() -> None:
    """Take it away."""
    op.drop_column("provider_batch_lines", "reserved")
