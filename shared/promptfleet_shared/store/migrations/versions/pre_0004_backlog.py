"""A function that counts the fleet's jobs for those who may not see them."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# As the tables' owner, who is let through the wall; it answers with a number and nothing else.
_COUNT = """
CREATE FUNCTION promptfleet_backlog(most bigint) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS 'SELECT count(*) FROM (SELECT FROM jobs WHERE finished_at IS NULL LIMIT most) AS unfinished'
"""


def upgrade() -> None:
    """Add it."""
    op.execute(_COUNT)


def downgrade() -> None:
    """Take it away."""
    op.execute("DROP FUNCTION promptfleet_backlog(bigint)")
