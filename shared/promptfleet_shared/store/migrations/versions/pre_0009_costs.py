"""Costs that are estimated, and budgets."""

from __future__ import annotations

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is needed."""


def downgrade() -> None:
    """Take it away."""
