"""The real job table under a clock that a test turns, and everything that can be read of it."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from tests.rows import spec

from promptfleet_shared.jobs import JobSpec
from promptfleet_shared.store.tables import (
    callbacks,
    jobs,
    ledger,
    provider_batch_lines,
    provider_batches,
    results,
)

START = 2_000_000_000.0  # whole seconds, which no conversion rounds

# Names are looked up in pg_catalog first, unless the path says otherwise: so the store's own
# statements, unchanged, ask this function.
_CLOCK = """
CREATE SCHEMA turned;
CREATE FUNCTION turned.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
    RETURN to_timestamp(current_setting('turned.now')::float8);
"""

Row = sa.RowMapping
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All rows, by their jobs."""

    jobs: dict[uuid.UUID, Row]
    results: dict[uuid.UUID, list[Row]]
    callbacks: dict[uuid.UUID, list[Row]]
    ledger: dict[uuid.UUID, list[Row]]


class JobTable:
    """One connection to the tables; its clock stands still unless it is turned."""

    def __init__(self, database: sa.Engine) -> None:
        self.now = START
        self._numbers = itertools.count()
        self._connection = database.connect()

    @classmethod
    def prepare(cls, database: sa.Engine) -> None:
        """Give the database its clock; once."""
        with database.begin() as connection:
            connection.exec_driver_sql(_CLOCK)

    def open(self) -> None:
        """Begin with empty tables at `START`."""
        for table in (jobs, results, callbacks, ledger, provider_batches, provider_batch_lines):
            self._connection.execute(sa.delete(table))
        self._connection.exec_driver_sql("SET search_path = turned, public, pg_catalog")
        self._connection.commit()
        self.turn_to(START)
        told = self.run(lambda c: c.exec_driver_sql("SELECT clock_timestamp()").scalar_one())
        assert told.timestamp() == START, "the statements have another clock"

    def close(self) -> None:
        self._connection.close()

    def turn_to(self, instant: float) -> None:
        """It is `instant` now, in seconds since 1970."""
        self.now = instant
        self._connection.exec_driver_sql(f"SET turned.now = '{instant!r}'")
        self._connection.commit()

    def run(self, statement: Callable[[sa.Connection], T]) -> T:
        """Run a statement in a transaction of its own."""
        with self._connection.begin():
            return statement(self._connection)

    def spec(self, **fields: Any) -> JobSpec:
        """A job whose id is of the table's own time."""
        return spec(id=self.new_id(), **fields)

    def snapshot(self) -> Snapshot:
        """All rows as they are."""
        return Snapshot(
            jobs={row["id"]: row for row in self._rows(jobs)},
            results=_by_job(self._rows(results)),
            callbacks=_by_job(self._rows(callbacks)),
            ledger=_by_job(self._rows(ledger)),
        )

    def _rows(self, table: sa.Table) -> Sequence[Row]:
        return self.run(lambda connection: connection.execute(sa.select(table)).mappings().all())

    def batches(self) -> tuple[dict[uuid.UUID, Row], Sequence[Row]]:
        """All of providers' batches, and all lines."""
        rows = {row["id"]: row for row in self._rows(provider_batches)}
        return rows, self._rows(provider_batch_lines)

    def new_id(self) -> uuid.UUID:
        """A UUIDv7 (RFC 9562): milliseconds, then a number."""
        head = int(self.now * 1000) << 80 | 0x7 << 76 | 0b10 << 62
        return uuid.UUID(int=head | next(self._numbers))


def _by_job(rows: Sequence[Row]) -> dict[uuid.UUID, list[Row]]:
    found: dict[uuid.UUID, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return dict(found)
