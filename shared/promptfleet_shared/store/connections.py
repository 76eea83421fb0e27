"""Connections that wait for no answer for ever, and are not used when they went stale."""

from __future__ import annotations

import selectors
import time
import traceback
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from sqlalchemy import event, exc
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry

from promptfleet_shared.store.failures import READ_ONLY

T = TypeVar("T")


class BoundedConnection(psycopg.Connection[Any]):
    """Breaks off where an answer takes longer than `patience_s` seconds.

    TCP's own timers find a dead host and a cut cable. A server that is stopped, or a middlebox
    that swallows what it acknowledged, is found by nobody else.
    """

    patience_s: float

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """See psycopg."""
        return super().wait(_bounded(gen, self.pgconn, self.patience_s), *args, **kwargs)


class AsyncBoundedConnection(psycopg.AsyncConnection[Any]):
    """The same for asynchronous callers."""

    patience_s: float

    async def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """See psycopg."""
        return await super().wait(_bounded(gen, self.pgconn, self.patience_s), *args, **kwargs)


def _bounded(gen: PQGen[T], pgconn: psycopg.pq.abc.PGconn, patience_s: float) -> PQGen[T]:
    """The same generator; psycopg resumes it every 0.1 s while nothing comes."""
    give_up_at = time.monotonic() + patience_s
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > give_up_at:
                pgconn.finish()
                msg = f"the server did not answer within {patience_s:g} s"
                raise psycopg.OperationalError(msg)
            wanted = gen.send(ready)
    except StopIteration as end:
        value: T = end.value
        return value


def bound_waits(engine: sa.Engine, patience_s: float) -> None:
    """Let the engine's new connections break off after `patience_s` seconds without an answer."""

    async def connect_async(*args: Any, **kwargs: Any) -> AsyncBoundedConnection:
        try:
            connection = await AsyncBoundedConnection.connect(*args, **kwargs)
        except BaseException as error:
            # Who was cancelled half-way is kept with all its frames by the error, and with them a
            # socket on which the server waits for a password.
            traceback.clear_frames(error.__traceback__)
            raise
        connection.patience_s = patience_s
        return connection

    def connect(
        dialect: Dialect,
        record: ConnectionPoolEntry,  # noqa: ARG001  # the event's signature
        cargs: list[Any],
        cparams: dict[str, Any],
    ) -> DBAPIConnection | None:
        if dialect.is_async:
            cparams["async_creator_fn"] = connect_async
            return None  # SQLAlchemy connects, by this function
        connection = BoundedConnection.connect(*cargs, **cparams)
        connection.patience_s = patience_s
        return connection  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    event.listen(engine, "do_connect", connect)


def replace_stale(engine: sa.Engine) -> None:
    """Let the engine give out no connection that the server has closed, or made read-only.

    Costs a look at the socket and no round trip; an idle one has something to read only where
    the server said goodbye. So whoever meets a stale one knows that nothing was sent on it.
    """
    event.listen(engine, "checkout", _refuse_stale)
    event.listen(engine, "handle_error", _leave_read_only)


def _refuse_stale(
    connection: DBAPIConnection,  # noqa: ARG001  # the event's signature
    record: ConnectionPoolEntry,
    proxy: object,  # noqa: ARG001
) -> None:
    driver = record.driver_connection
    if driver is None or driver.closed or _is_readable(driver.fileno()):
        raise exc.DisconnectionError


def _is_readable(fileno: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fileno, selectors.EVENT_READ)
        return bool(selector.select(0))


def _leave_read_only(context: ExceptionContext) -> None:
    """After a failover the same connection would stay read-only; a new one finds the primary."""
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True
