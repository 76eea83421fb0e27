"""How those connect to Redis who can go on without it: a fault is told at once, not waited for."""

from __future__ import annotations

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff


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
    return client
