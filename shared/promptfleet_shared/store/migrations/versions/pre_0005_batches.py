"""Batches: callbacks that tell of them, and a function that finds those of all tenants."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# As the tables' owner, who is let through the wall: an API process moves the batches of all tenants
# on, and sees each of them as its tenant. It answers with ids and nothing else.
_CLAIM = """
CREATE FUNCTION promptfleet_claim_batches(runner text, lease_s float8, most int)
RETURNS TABLE (batch uuid, whose text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path FROM CURRENT
AS $$
WITH due AS MATERIALIZED (
    SELECT id FROM batches
     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
       AND coalesce(lease_until <= clock_timestamp(), true)
     ORDER BY lease_until NULLS FIRST LIMIT most FOR UPDATE SKIP LOCKED)
UPDATE batches SET lease_owner = runner,
       lease_until = clock_timestamp() + lease_s * interval '1 second'
  FROM due WHERE batches.id = due.id
RETURNING batches.id, batches.tenant
$$
"""


def upgrade() -> None:
    """Add them."""
    op.execute(_CLAIM)
    op.alter_column("callbacks", "job_id", nullable=True)
    op.add_column("callbacks", sa.Column("payload", pg.JSON))
    # In two steps: the second one checks the rows that are there and locks nobody out.
    op.execute(
        "ALTER TABLE callbacks ADD CONSTRAINT callbacks_subject_check"
        " CHECK ((job_id IS NULL) <> (payload IS NULL)) NOT VALID"
    )
    op.execute("ALTER TABLE callbacks VALIDATE CONSTRAINT callbacks_subject_check")


def downgrade() -> None:
    """Take them away: callbacks that tell of batches are gone."""
    op.execute("DELETE FROM callbacks WHERE job_id IS NULL")
    op.drop_constraint(op.f("callbacks_subject_check"), "callbacks", type_="check")
    op.drop_column("callbacks", "payload")
    op.alter_column("callbacks", "job_id", nullable=False)
    op.execute("DROP FUNCTION promptfleet_claim_batches(text, float8, int)")
