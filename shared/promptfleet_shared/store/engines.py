"""How to reach Postgres: engines for synchronous and asynchronous callers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from promptfleet_shared.errors import ConfigurationError, StoreUnavailableError

CONNECT_TIMEOUT_S = 5
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


def _options(application_name: str, pool_size: int) -> dict[str, Any]:
    return {
        "pool_size": pool_size,
        "max_overflow": pool_size,
        "pool_pre_ping": False,  # costs a round trip a checkout; a broken connection is retried
        "pool_recycle": 1800,
        "hide_parameters": True,  # prompts and outputs are among them
        "connect_args": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": application_name,
            # Dead peers are noticed in half a minute instead of two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
        },
    }


def make_engine(url: str, *, application_name: str, pool_size: int = 5) -> sa.Engine:
    """An engine for synchronous callers; it connects at first use."""
    return sa.create_engine(normalise_url(url), **_options(application_name, pool_size))


def make_async_engine(url: str, *, application_name: str, pool_size: int = 5) -> AsyncEngine:
    """An engine for asynchronous callers; it connects at first use."""
    return create_async_engine(normalise_url(url), **_options(application_name, pool_size))


def is_disconnect(error: BaseException) -> bool:
    """True if the database went away, as opposed to having refused the statement."""
    return isinstance(error, exc.TimeoutError) or (
        isinstance(error, exc.DBAPIError)
        and (error.connection_invalidated or isinstance(error, exc.OperationalError))
    )


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn a lost or unreachable database into `StoreUnavailableError`, without its URL."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        if is_disconnect(error):
            raise StoreUnavailableError from error
        raise
