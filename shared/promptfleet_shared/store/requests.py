"""Read what jobs ask for: the largest part of a row, wanted by few."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from promptfleet_shared.store.tables import jobs


def read_requests(
    connection: sa.Connection, ids: Sequence[uuid.UUID], *, tenant: str
) -> dict[uuid.UUID, dict[str, Any]]:
    """The request of each of the jobs that the tenant has, decoded."""
    query = sa.select(jobs.c.id, jobs.c.request).where(
        jobs.c.id == sa.any_(sa.literal(list(ids), sa.ARRAY(sa.Uuid))), jobs.c.tenant == tenant
    )
    return {row[0]: row[1] for row in connection.execute(query)}
