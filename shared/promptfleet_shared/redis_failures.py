"""What redis-py's asynchronous client raises where its server is away, slow or gone."""

from __future__ import annotations

from redis.exceptions import RedisError

# uvloop answers a write to a connection that was reset a moment before with a RuntimeError, and
# redis-py lets it through.
REDIS_FAILURES = (RedisError, OSError, TimeoutError, RuntimeError)
