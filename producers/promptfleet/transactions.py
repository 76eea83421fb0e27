"""Do something after the caller's own transaction commits, and never if it does not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import Doorbell

Ring = Callable[[Sequence[Doorbell]], None]
Existing = Callable[[sa.Connection, Sequence[Doorbell]], Sequence[Doorbell]]

ON_COMMIT = "promptfleet_on_commit"
"""Where a connection's `info` may have what calls a function after the commit, if others commit."""


def sync_connection(session: object) -> sa.Connection:
    """The connection of the caller's transaction.

    Raises:
        InvalidRequestError: It is no session or connection that synchronous code can use.
    """
    if isinstance(session, sa.Connection):
        return session
    if isinstance(session, Session | scoped_session):
        return session.connection()
    if isinstance(session, AsyncSession | AsyncConnection | async_scoped_session):
        raise _refusal("an asynchronous session belongs to AsyncClient")
    raise _refusal(f"must be a SQLAlchemy Session or Connection, not {type(session).__name__}")


async def async_connection(session: object) -> AsyncConnection:
    """The connection of the caller's transaction.

    Raises:
        InvalidRequestError: It is no session or connection that asynchronous code can use.
    """
    if isinstance(session, AsyncConnection):
        return session
    if isinstance(session, AsyncSession | async_scoped_session):
        connection: AsyncConnection = await session.connection()
        return connection
    if isinstance(session, Session | scoped_session | sa.Connection):
        raise _refusal("a synchronous session belongs to Client")
    raise _refusal(
        f"must be a SQLAlchemy AsyncSession or AsyncConnection, not {type(session).__name__}"
    )


def _refusal(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"session: {why}", field="session")


class CommitBells:
    """Doorbells that wait for the commit of the transaction they belong to.

    One for all connections of a backend. Whatever a savepoint took back is not rung for, and
    several jobs of one transaction are rung for together.
    """

    def __init__(self, ring: Ring, existing: Existing) -> None:
        """Nothing is listened to before the first `add`.

        Args:
            ring: Called once after each commit.
            existing: Finds, before the commit, those whose jobs a savepoint did not take back.
        """
        self._ring = ring
        self._existing = existing
        self._waiting: weakref.WeakKeyDictionary[sa.Connection, _Waiting] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, connection: sa.Connection, doorbells: Sequence[Doorbell]) -> None:
        """Ring for these after the connection's transaction commits."""
        if not doorbells:
            return
        if (on_commit := connection.info.get(ON_COMMIT)) is not None:
            on_commit(lambda: self._ring(doorbells))
            return
        if getattr(connection.connection, "autocommit", False):
            self._ring(doorbells)
            return
        waiting = self._waiting.get(connection)
        if waiting is None:
            waiting = self._waiting[connection] = _Waiting(self._ring, self._existing)
            waiting.listen(connection)
        waiting.doorbells.extend(doorbells)


class _Waiting:
    """The doorbells of one connection's transaction."""

    def __init__(self, ring: Ring, existing: Existing) -> None:
        self._ring = ring
        self._existing = existing
        self._some_taken_back = False
        self.doorbells: list[Doorbell] = []

    def listen(self, connection: sa.Connection) -> None:
        event.listen(connection, "commit", self._commit)
        event.listen(connection, "rollback", self._forget)
        event.listen(connection, "rollback_savepoint", self._doubt)
        event.listen(connection, "commit_twophase", self._commit_prepared)
        event.listen(connection, "rollback_twophase", self._forget)

    def _commit(self, connection: sa.Connection) -> None:
        doorbells = self._take(connection)
        if not doorbells:
            return
        # SQLAlchemy tells of a commit before it commits, and never after. So commit here: for the
        # driver, the commit that follows finds nothing left to do. A failure is raised from here
        # as it would be from there, and nothing is rung.
        connection.exec_driver_sql("COMMIT")
        self._ring(doorbells)

    def _commit_prepared(self, connection: sa.Connection, xid: object, prepared: object) -> None:  # noqa: ARG002  # the event's signature
        if doorbells := self._take(connection):
            self._ring(doorbells)  # a prepared transaction can no longer fail

    def _forget(self, *_: object) -> None:
        self.doorbells = []
        self._some_taken_back = False

    def _doubt(self, *_: object) -> None:
        self._some_taken_back = True

    def _take(self, connection: sa.Connection) -> Sequence[Doorbell]:
        doorbells, doubt = self.doorbells, self._some_taken_back
        self._forget()
        return self._existing(connection, doorbells) if doubt and doorbells else doorbells
