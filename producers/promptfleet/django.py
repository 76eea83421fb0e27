"""Enqueue in Django's own transaction: `enqueue_prompt(..., session=django_session())`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import sqlalchemy as sa
from django.db import connections, router
from sqlalchemy.orm import Session

from promptfleet.backends import substitute
from promptfleet.transactions import ON_COMMIT
from promptfleet_shared.errors import ConfigurationError


def django_session(using: str | None = None) -> sa.Connection | Session | None:
    """The transaction that Django has open, for `session=`.

    The job joins it: it is committed by Django with your rows, goes with a rollback or with that
    of a savepoint, and workers hear of it after the commit, by Django's own `on_commit`. Outside of
    `transaction.atomic` there is nothing to join, and the job is committed at once.

    Ask for it anew in each `atomic` block. Django's database must be the one of
    `PROMPTFLEET_DATABASE_URL`, and its driver psycopg 3.

    Args:
        using: The name of Django's database; by default where it writes to.

    Returns:
        None where no transaction is open.

    Raises:
        ConfigurationError: The database is not reached through psycopg 3.
        TransactionManagementError: Django's, since transactions are managed by hand.
    """
    connection = connections[using or router.db_for_write(None)]
    if not connection.in_atomic_block and connection.get_autocommit():
        return None
    if substitute() is not None:  # in tests, where the database may be any
        session = Session()
        connection.on_commit(session.commit)
        return session
    connection.ensure_connection()
    return _borrow(connection.connection, connection.on_commit)


def _borrow(driver: Any, on_commit: Callable[[Callable[[], None]], None]) -> sa.Connection:
    """SQLAlchemy's view of a connection whose transactions are Django's."""
    if type(driver).__module__.partition(".")[0] not in {"psycopg", "psycopg_pool"}:
        msg = f"Django's database must be reached through psycopg 3, not {type(driver).__module__}"
        raise ConfigurationError(msg)
    lent = _lent.set(driver)
    try:
        connection = _engine().connect()
    finally:
        _lent.reset(lent)
    connection.info[ON_COMMIT] = on_commit
    return connection


_lent: ContextVar[Any] = ContextVar("promptfleet_django_connection")


@functools.cache
def _engine() -> sa.Engine:
    """One for all, since a new one would ask each connection for the server's version and so on."""
    return sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: _Borrowed(_lent.get()),
        poolclass=sa.NullPool,
        hide_parameters=True,  # prompts are among them
        use_native_hstore=False,
    )


class _Borrowed:
    """Django's connection to the database, less what only Django may do with it."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def commit(self) -> None:
        """Nothing: Django commits."""

    def rollback(self) -> None:
        """Nothing: Django rolls back."""

    def close(self) -> None:
        """Nothing: Django keeps it."""

    def add_notice_handler(self, handler: object) -> None:
        """Nothing: it would stay there."""
