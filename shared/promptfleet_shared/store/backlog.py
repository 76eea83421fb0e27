"""How many jobs are not final: counted up to a bound, so that it never costs much."""

from __future__ import annotations

import sqlalchemy as sa

_OF_TENANT = sa.text("""
SELECT count(*) FROM (
    SELECT FROM jobs WHERE finished_at IS NULL AND tenant = :tenant LIMIT :most) AS unfinished
""")

# Of the tables' owner: the wall hides other tenants' jobs from the API, and not their number.
_OF_ALL = sa.text("SELECT promptfleet_backlog(CAST(:most AS bigint))")


def tenant_backlog(connection: sa.Connection, *, tenant: str, most: int) -> int:
    """How many of a tenant's jobs are not final, or `most` if there are more."""
    return int(connection.execute(_OF_TENANT, {"tenant": tenant, "most": most}).scalar_one())


def whole_backlog(connection: sa.Connection, *, most: int) -> int:
    """The same for the jobs of all tenants."""
    return int(connection.execute(_OF_ALL, {"most": most}).scalar_one())
