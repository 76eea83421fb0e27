"""A database for those who know its statements by name only: run them, or insist on them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import exc

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.store.engines import make_async_engine, make_engine, unavailable
from promptfleet_shared.store.failures import sqlstate_of, will_pass

T = TypeVar("T")
Statement = Callable[[sa.Connection], T]

PATIENCE_S = 15.0
"""Seconds for one statement: below a third of the lease, so that a stuck heartbeat is repeated."""

log = logging.getLogger(__name__)


class Database:
    """Postgres for synchronous callers; each statement is a transaction of its own.

    Attributes:
        last_commit: When the last statement was committed, by `time.monotonic`; 0.0 before.
    """

    def __init__(self, url: str, *, application_name: str, pool_size: int = 1) -> None:
        """Connect at first use."""
        self._engine = make_engine(
            url,
            application_name=application_name,
            pool_size=pool_size,
            patience_s=PATIENCE_S,
            autocommit=True,
        )
        self.last_commit = 0.0

    def run(self, statement: Statement[T]) -> T:
        """Run one statement and commit it.

        Raises:
            StoreUnavailableError: The database can't be reached, was lost on the way, or has no
                room for it now; see `failures.will_pass`.
            StoreRefusedError: It did not take the statement.
        """
        try:
            with self._engine.connect() as connection:
                result = statement(connection)
        except exc.SQLAlchemyError as error:
            raise _plain(error) from None
        self.last_commit = time.monotonic()
        return result

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()


class AsyncDatabase:
    """Postgres for asynchronous callers; each statement is a transaction of its own.

    One statement needs no BEGIN and COMMIT around it: one round trip instead of three.

    Attributes:
        last_commit: As of `Database`.
    """

    def __init__(self, url: str, *, application_name: str, pool_size: int = 5) -> None:
        """Connect at first use, on the loop that runs then."""
        self._engine = make_async_engine(
            url,
            application_name=application_name,
            pool_size=pool_size,
            patience_s=PATIENCE_S,
            autocommit=True,
        )
        self._transactions = self._engine.execution_options(isolation_level="READ COMMITTED")
        self.last_commit = 0.0

    async def run(self, statement: Statement[T]) -> T:
        """Run one statement and commit it; errors as for `Database.run`."""
        try:
            async with self._engine.connect() as connection:
                result = await connection.run_sync(statement)
        except exc.SQLAlchemyError as error:
            raise _plain(error) from None
        self.last_commit = time.monotonic()
        return result

    async def transact(self, statements: Statement[T]) -> T:
        """Run several statements in one transaction and commit it; errors as for `Database.run`.

        Between two of them the server waits for this process: let it not wait for long.
        """
        try:
            async with self._transactions.begin() as connection:
                result = await connection.run_sync(statements)
        except exc.SQLAlchemyError as error:
            raise _plain(error) from None
        self.last_commit = time.monotonic()
        return result

    async def insist(self, statement: Statement[T], *, patience_s: float) -> T:
        """Run a statement again and again while the database is away.

        For statements that may be repeated: a fence or a state makes the second run change nothing.

        Raises:
            StoreUnavailableError: It stayed away for `patience_s` seconds.
            StoreRefusedError: It did not take the statement.
        """
        give_up_at = time.monotonic() + patience_s
        delay_s = 0.05
        while True:
            try:
                return await self.run(statement)
            except StoreUnavailableError:
                if time.monotonic() + delay_s > give_up_at:
                    raise
                log.warning("database_away", extra={"retry_s": delay_s})
            await asyncio.sleep(delay_s * random.uniform(0.5, 1))  # noqa: S311 - jitter, no secret
            delay_s = min(delay_s * 2, 2.0)

    async def close(self) -> None:
        """Give back the connections."""
        await self._engine.dispose()


def _plain(error: exc.SQLAlchemyError) -> StoreUnavailableError | StoreRefusedError:
    """Our own error, without the statement's parameters: prompts and outputs are among them."""
    if will_pass(error):
        return unavailable(error)
    cause = getattr(error, "orig", None) or error
    message = f"the database refused a statement ({type(cause).__name__})"
    return StoreRefusedError(message, sqlstate=sqlstate_of(error))
