"""What a failure of the database means: will it pass, and may the statement have been done?

| SQLSTATE                                  | Read as |
|-------------------------------------------|---------|
| none: refused, timed out, broken off      | passes |
| 08…: the connection                       | passes |
| 25006: read-only, as after a failover     | passes, on another connection |
| 25P03, 25P04: the transaction took long   | passes |
| 40001, 40P01, 40003: lost against another | passes, at once |
| 53000, 53100, 53200, 53300: disk, memory, connections are used up | passes |
| 55P03, 57014: a lock, the statement took long | passes |
| 57P01, 57P02, 57P03, 57P05: shutting down, starting | passes |
| 58000, 58030: the operating system failed | passes |
| all others, e.g. 22…, 23…, 42…, 53400, 54…, XX… | refused: it would be refused again |
"""

from __future__ import annotations

from sqlalchemy import exc

_PASSING = frozenset(
    {
        *("25006", "25P03", "25P04"),
        *("40001", "40003", "40P01"),
        *("53000", "53100", "53200", "53300"),
        *("55P03", "57014", "57P01", "57P02", "57P03", "57P05"),
        *("58000", "58030"),
    }
)
_CONNECTION_CLASS = "08"
_COLLISIONS = frozenset({"40001", "40P01"})
READ_ONLY = "25006"
# What the pool says, without a class of its own, once two connections in a row were dead.
_DEAD_AT_CHECKOUT = "This connection is closed"


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE that Postgres answered with; None where it did not answer."""
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def will_pass(error: BaseException) -> bool:
    """True if the database is away or overloaded: the same statement may succeed later.

    False where it refused the statement, and would again.
    """
    if isinstance(error, exc.TimeoutError):  # of the pool: every connection is in use
        return True
    if not isinstance(error, exc.DBAPIError):
        return isinstance(error, exc.InvalidRequestError) and _DEAD_AT_CHECKOUT in str(error)
    sqlstate = sqlstate_of(error)
    if sqlstate is None:
        return error.connection_invalidated or isinstance(error, exc.OperationalError)
    return sqlstate in _PASSING or sqlstate.startswith(_CONNECTION_CLASS)


def is_collision(error: BaseException) -> bool:
    """True for a deadlock or a serialization failure: undone, and worth a repeat at once."""
    return sqlstate_of(error) in _COLLISIONS


def may_be_done(error: BaseException) -> bool:
    """True if the connection broke with a statement under way: it may have been committed.

    False where the statement was never sent, or Postgres told that it was undone.
    """
    if not isinstance(error, exc.DBAPIError) or not will_pass(error):
        return False
    return error.connection_invalidated and sqlstate_of(error) != READ_ONLY
