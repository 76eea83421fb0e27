"""Batches that providers' own batch APIs have."""

from __future__ import annotations

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is needed."""


def downgrade() -> None:
    """Take it away."""
