"""What a failure of the database is read as, when Postgres says it and when nobody does."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import event, exc
from sqlalchemy.pool import QueuePool

from promptfleet_shared.store.failures import is_collision, may_be_done, will_pass


def failure(sqlstate: str | None, *, broken: bool = False) -> exc.DBAPIError:
    """What SQLAlchemy raises for it; `broken` if the connection is gone."""
    orig = psycopg.OperationalError() if sqlstate is None else psycopg.errors.lookup(sqlstate)()
    kind = exc.OperationalError if isinstance(orig, psycopg.OperationalError) else exc.DBAPIError
    return kind("INSERT", None, orig, connection_invalidated=broken)


@pytest.mark.parametrize("sqlstate", [None, "08006", "40P01", "53100", "53300", "57P01", "57014"])
def test_what_passes(sqlstate: str | None) -> None:
    assert will_pass(failure(sqlstate))
    assert not may_be_done(failure(sqlstate))  # never sent, or undone
    assert may_be_done(failure(sqlstate, broken=True))


@pytest.mark.parametrize("sqlstate", ["22001", "23505", "42P01", "28P01", "53400", "XX000"])
def test_what_is_refused(sqlstate: str) -> None:
    assert not will_pass(failure(sqlstate))
    assert not may_be_done(failure(sqlstate))


def test_two_connections_in_a_row_that_were_dead_when_the_pool_gave_them_out() -> None:
    """The pool has no class for it; see `Pool.connect` and `DisconnectionError`."""

    def refuse(*_: object) -> None:
        raise exc.DisconnectionError

    pool = QueuePool(Dead, pool_size=1)  # type: ignore[arg-type]
    event.listen(pool, "checkout", refuse)
    with pytest.raises(exc.InvalidRequestError) as caught:
        pool.connect()

    assert will_pass(caught.value)
    assert not may_be_done(caught.value)
    assert not will_pass(exc.InvalidRequestError("another mistake"))


class Dead:
    """What a pool holds."""

    def close(self) -> None:
        pass

    def rollback(self) -> None:
        pass


def test_a_server_that_ended_the_session_and_refused() -> None:
    """E.g. a dropped database: no repeat finds it again."""
    assert not will_pass(failure("57P04", broken=True))


def test_a_read_only_server_did_nothing_although_we_leave_it() -> None:
    assert will_pass(failure("25006", broken=True))
    assert not may_be_done(failure("25006", broken=True))


def test_collisions_are_worth_a_repeat_at_once() -> None:
    assert [is_collision(failure(s)) for s in ("40001", "40P01", "53100", None)] == [
        *(True, True),
        *(False, False),
    ]


def test_a_pool_without_a_free_connection_sent_nothing() -> None:
    assert will_pass(exc.TimeoutError())
    assert not may_be_done(exc.TimeoutError())


@pytest.mark.parametrize("error", [exc.InvalidRequestError(), ValueError(), exc.ArgumentError()])
def test_mistakes_of_ours_are_no_failures_of_the_database(error: Exception) -> None:
    assert not will_pass(error)
    assert not may_be_done(error)
