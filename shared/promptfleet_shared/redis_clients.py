"""How those connect to Redis who can go on without it: a fault is told at once, not waited for."""

from __future__ import annotations

from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer


def impatient_client(url: str, *, connect_s: float) -> redis.asyncio.Redis:
    """A client that tries nothing twice: whoever uses it has a next time of its own.

    Args:
        url: As in redis://user:password@host:6379/0.
        connect_s: Seconds until a connection stands. What is done on it is bounded by the caller,
            as a whole.
    """
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=None,
        socket_connect_timeout=connect_s,
    )
    pool = client.connection_pool
    pool.connection_class = _PACKING[pool.connection_class]
    return client


class _PacksInC:
    """What redis-py's synchronous connections do where hiredis is installed, for asynchronous ones.

    A filled cache has thousands of arguments: packed in Python they cost more than all else of it.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        """A command in Redis' protocol."""
        packed: list[bytes] = HiredisRespSerializer().pack(*args)
        return packed


class _Connection(_PacksInC, redis.asyncio.Connection):
    pass


class _SSLConnection(_PacksInC, redis.asyncio.SSLConnection):
    pass


class _UnixConnection(_PacksInC, redis.asyncio.UnixDomainSocketConnection):
    pass


_PACKING = {
    redis.asyncio.Connection: _Connection,
    redis.asyncio.SSLConnection: _SSLConnection,
    redis.asyncio.UnixDomainSocketConnection: _UnixConnection,
}
