"""Find jobs that other jobs sent out, by their idempotency keys, with what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from promptfleet_shared.jobs import JobState

_FIND = sa.text("""
SELECT jobs.tenant, idempotency_key, results.state, results.text, results.response::text,
       last_error ->> 'code'
  FROM unnest(CAST(:tenants AS text[]), CAST(:keys AS text[])) AS wanted (whose, key)
  JOIN jobs ON jobs.tenant = whose AND idempotency_key = key
  LEFT JOIN results ON results.job_id = jobs.id
""")


class Ended(NamedTuple):
    """How a job ended: its answer's text, and the provider's whole response as JSON."""

    state: JobState
    text: str | None
    response: str | None

    @property
    def succeeded(self) -> bool:
        """True if it has an answer."""
        return self.state is JobState.SUCCEEDED


class Unfinished(NamedTuple):
    """It is under way; `code` is why it was sent back last, if it was."""

    code: str | None


def find_errands(
    connection: sa.Connection, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Ended | Unfinished]:
    """Those of the jobs that are there, by tenant and idempotency key."""
    parameters = {"tenants": [tenant for tenant, _ in keys], "keys": [key for _, key in keys]}
    rows = connection.execute(_FIND, parameters).all()
    return {
        (row[0], row[1]): (
            Unfinished(row[5]) if row[2] is None else Ended(JobState(row[2]), row[3], row[4])
        )
        for row in rows
    }
