"""How to reach Postgres: engines for synchronous and asynchronous callers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from promptfleet_shared.errors import ConfigurationError, StoreUnavailableError
from promptfleet_shared.store.connections import bound_waits, replace_stale
from promptfleet_shared.store.failures import sqlstate_of, will_pass

CONNECT_TIMEOUT_S = 5
POOL_TIMEOUT_S = 10
TCP_USER_TIMEOUT_MS = 15_000
_DRIVER = "postgresql+psycopg"


def normalise_url(url: str) -> sa.URL:
    """A URL for psycopg 3 from any usual spelling (postgres://, postgresql://, …+psycopg://)."""
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        msg = "database_url is not a URL; expected postgresql://user:password@host:port/name"
        raise ConfigurationError(msg) from None
    if parsed.drivername not in {"postgres", "postgresql", _DRIVER}:
        msg = f"database_url must be a postgresql:// URL, not {parsed.drivername}://"
        raise ConfigurationError(msg)
    return parsed.set(drivername=_DRIVER)


def _options(
    application_name: str, pool_size: int, connect_timeout_s: int, *, autocommit: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if autocommit:
        # Set once a connection, and not for each statement and back.
        options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    return options | {
        "pool_size": pool_size,
        # Beyond the pool, SQLAlchemy would connect anew for a statement and hang up after it.
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT_S,
        "pool_pre_ping": False,  # costs a round trip a checkout; see `replace_stale`
        "pool_recycle": 1800,
        "hide_parameters": True,  # prompts and outputs are among them
        "connect_args": {
            "connect_timeout": connect_timeout_s,
            "application_name": application_name,
            # Dead peers are noticed in half a minute instead of two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # The same while something is under way, which keepalives don't watch.
            "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
        },
    }


class FairPool(sa.QueuePool):
    """A pool in which no thread starves.

    SQLAlchemy's own wakes who waits for a connection, and whoever comes by at that moment may take
    it first: among 16 busy threads one now and then waited until its time-out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `QueuePool`."""
        super().__init__(*args, **kwargs)
        self._turn = threading.Lock()

    def _do_get(self) -> ConnectionPoolEntry:
        if not self._turn.acquire(timeout=self.timeout()):
            msg = "no connection came free in time"
            raise exc.TimeoutError(msg)
        try:
            return super()._do_get()
        finally:
            self._turn.release()


def make_engine(
    url: str,
    *,
    application_name: str,
    pool_size: int = 5,
    connect_timeout_s: int = CONNECT_TIMEOUT_S,
    patience_s: float | None = None,
    autocommit: bool = False,
) -> sa.Engine:
    """An engine for synchronous callers; it connects at first use.

    Args:
        url: In any usual spelling; see `normalise_url`.
        application_name: What `pg_stat_activity` shows.
        pool_size: Connections at most; they are kept.
        connect_timeout_s: Seconds for each address of the server, from 2.
        patience_s: Seconds that a statement may take before its connection is broken off; None
            waits as long as it takes, which suits migrations.
        autocommit: True for one whose statements are transactions of their own, as a rule.
    """
    options = _options(application_name, pool_size, connect_timeout_s, autocommit=autocommit)
    options["poolclass"] = FairPool
    engine = sa.create_engine(normalise_url(url), **options)
    _prepare(engine, patience_s)
    return engine


def make_async_engine(
    url: str,
    *,
    application_name: str,
    pool_size: int = 5,
    connect_timeout_s: int = CONNECT_TIMEOUT_S,
    patience_s: float | None = None,
    autocommit: bool = False,
) -> AsyncEngine:
    """An engine for asynchronous callers; the parameters are those of `make_engine`."""
    options = _options(application_name, pool_size, connect_timeout_s, autocommit=autocommit)
    engine = create_async_engine(normalise_url(url), **options)
    _prepare(engine.sync_engine, patience_s)
    return engine


def _prepare(engine: sa.Engine, patience_s: float | None) -> None:
    replace_stale(engine)
    if patience_s is not None:
        bound_waits(engine, patience_s)


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn an unreachable, lost or overloaded database into `StoreUnavailableError`."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        if will_pass(error):
            # Not SQLAlchemy's own error: on a caller's engine it may show prompts.
            raise unavailable(error) from getattr(error, "orig", None)
        raise


def unavailable(error: BaseException) -> StoreUnavailableError:
    """Our own error for one that will pass, without URL, statement or parameters."""
    sqlstate = sqlstate_of(error)
    if sqlstate is None:
        return StoreUnavailableError()
    cause = type(getattr(error, "orig", error)).__name__
    msg = f"The database can't do this now ({cause}), so nothing was accepted."
    return StoreUnavailableError(msg, sqlstate=sqlstate)
