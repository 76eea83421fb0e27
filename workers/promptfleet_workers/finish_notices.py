"""Tell whoever waits that jobs have ended: one message for all that was committed together.

Nobody reads the server's replies: that, and the client's way around its connection, would be nine
tenths of what a message costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from promptfleet_shared.finish_notices import CHANNEL, encode_notice
from promptfleet_shared.redis_failures import REDIS_FAILURES

log = logging.getLogger(__name__)

TIMEOUT_S = 0.5
COOL_DOWN_S = 1.0
"""Seconds without another try after a failure: who waits looks for itself meanwhile."""


class FinishNotices:
    """Publishes ids in the background; lives on the worker's event loop and raises nothing.

    What is told while a message is on its way goes into the next one.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect with the first notice.

        Args:
            url: The cache's server, as in redis://user:password@host:6379/0.
            timeout_s: Seconds that one message may take.
            cool_down_s: Seconds without another try after a failure.
            clock: Gives steady seconds.
        """
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")
        self._is_away = False
        self._ids: list[uuid.UUID] = []
        self._sending: asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None
        self._reads_replies = False
        self._pool = redis.asyncio.ConnectionPool.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # a notice that comes late is worth nothing
            socket_timeout=None,  # each message is bounded as a whole
            socket_connect_timeout=timeout_s,
        )

    def tell(self, ids: Iterable[uuid.UUID]) -> None:
        """These jobs have ended, and it is committed."""
        if self._clock() < self._cold_until:
            return
        self._ids += ids
        if self._sending is None and self._ids:
            self._sending = asyncio.create_task(self._send())

    async def aclose(self) -> None:
        """Send what is left and close the connection."""
        if self._sending is not None:
            await asyncio.wait({self._sending})
        await self._hang_up()

    async def _send(self) -> None:
        try:
            while self._ids:
                ids, self._ids = self._ids, []
                async with asyncio.timeout(self._timeout_s):
                    await self._publish(encode_notice(ids))
                self._is_away = False
        except REDIS_FAILURES as error:
            self._cold_until = self._clock() + self._cool_down_s
            self._ids = []
            if not self._is_away:
                log.warning("notices_unavailable", extra={"error": type(error).__name__})
            self._is_away = True
            await self._hang_up()
        finally:
            self._sending = None

    async def _publish(self, message: bytes) -> None:
        if self._connection is None:
            self._connection = await self._connected()
        await self._connection.send_command("PUBLISH", CHANNEL, message, check_health=False)
        if self._reads_replies:
            await self._connection.read_response()

    async def _connected(self) -> AbstractConnection:
        connection: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        self._connection = connection
        await connection.send_command("CLIENT", "REPLY", "OFF")
        await connection.send_command("CLIENT", "REPLY", "ON")
        try:
            await connection.read_response()
        except ResponseError:  # it may not be asked to be silent
            self._reads_replies = True
            with contextlib.suppress(ResponseError):
                await connection.read_response()
        else:
            self._reads_replies = False
            await connection.send_command("CLIENT", "REPLY", "OFF")
        return connection

    async def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
        await self._pool.disconnect()
