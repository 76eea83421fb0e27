"""Transactions of users' tests: jobs in memory follow them without a statement of their own.

Unlike in production, a job follows its *session*: tests often run a session inside of an outer
transaction that they roll back in the end, and `session.commit()` counts there all the same.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from promptfleet_shared.errors import InvalidRequestError

Action = Callable[[], None]


def synchronous(session: object) -> object:
    """What an asynchronous session or connection stands on.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(session, async_scoped_session):
        session = session.registry()
    if isinstance(session, AsyncSession):
        return session.sync_session
    if isinstance(session, AsyncConnection):
        return session.sync_connection
    msg = f"session: must be an AsyncSession or AsyncConnection, not {type(session).__name__}"
    raise InvalidRequestError(msg, field="session")


def follow(session: object, commit: Action, rollback: Action) -> None:
    """Do the one or the other when the transaction ends.

    Raises:
        InvalidRequestError: It is no session or connection that synchronous code can use.
    """
    if isinstance(session, scoped_session):
        session = session.registry()
    if isinstance(session, Session):
        _of_session(session).add(session, commit, rollback)
    elif isinstance(session, sa.Connection):
        _of_connection(session).add(session, commit, rollback)
    else:
        msg = f"session: must be a Session or Connection, not {type(session).__name__}"
        raise InvalidRequestError(msg, field="session")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What waits for the end of a transaction, and the savepoints around it."""

    commit: Action
    rollback: Action
    within: tuple[SessionTransaction, ...] = ()


class _SessionFollower:
    """The entries of one session."""

    def __init__(self, session: Session) -> None:
        self._entries: list[_Entry] = []
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_soft_rollback", self._after_rollback)
        event.listen(session, "after_transaction_end", self._after_end)

    def add(self, session: Session, commit: Action, rollback: Action) -> None:
        if not session.in_transaction():
            session.begin()
        within = []
        transaction = session.get_nested_transaction() or session.get_transaction()
        while transaction is not None:
            within.append(transaction)
            transaction = transaction.parent
        self._entries.append(_Entry(commit=commit, rollback=rollback, within=tuple(within)))

    def _after_commit(self, session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint's end is no commit
        entries, self._entries = self._entries, []
        for entry in entries:
            entry.commit()

    def _after_rollback(self, session: Session, transaction: SessionTransaction) -> None:  # noqa: ARG002  # the event's signature
        gone = [entry for entry in self._entries if transaction in entry.within]
        self._entries = [entry for entry in self._entries if entry not in gone]
        for entry in gone:
            entry.rollback()

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:  # closed without a commit
            self._after_rollback(session, transaction)


class _ConnectionFollower:
    """The entries of one connection."""

    def __init__(self, connection: sa.Connection) -> None:
        self._entries: list[_Entry] = []
        self._savepoints: list[int] = []
        event.listen(connection, "commit", self._commit)
        event.listen(connection, "rollback", self._rollback)
        event.listen(connection, "savepoint", self._savepoint)
        event.listen(connection, "release_savepoint", self._release)
        event.listen(connection, "rollback_savepoint", self._rollback_savepoint)

    def add(self, connection: sa.Connection, commit: Action, rollback: Action) -> None:
        if not connection.in_transaction():
            connection.begin()
        self._entries.append(_Entry(commit=commit, rollback=rollback))

    def _commit(self, *_: object) -> None:
        entries, self._entries, self._savepoints = self._entries, [], []
        for entry in entries:
            entry.commit()

    def _rollback(self, *_: object) -> None:
        self._savepoints = []
        self._drop_since(0)

    def _savepoint(self, *_: object) -> None:
        self._savepoints.append(len(self._entries))

    def _release(self, *_: object) -> None:
        if self._savepoints:
            self._savepoints.pop()

    def _rollback_savepoint(self, *_: object) -> None:
        # One that is older than the first entry takes all of them back.
        self._drop_since(self._savepoints.pop() if self._savepoints else 0)

    def _drop_since(self, mark: int) -> None:
        gone, self._entries = self._entries[mark:], self._entries[:mark]
        for entry in gone:
            entry.rollback()


_sessions: weakref.WeakKeyDictionary[Session, _SessionFollower] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[sa.Connection, _ConnectionFollower] = (
    weakref.WeakKeyDictionary()
)


def _of_session(session: Session) -> _SessionFollower:
    follower = _sessions.get(session)
    if follower is None:
        follower = _sessions[session] = _SessionFollower(session)
    return follower


def _of_connection(connection: sa.Connection) -> _ConnectionFollower:
    follower = _connections.get(connection)
    if follower is None:
        follower = _connections[connection] = _ConnectionFollower(connection)
    return follower
