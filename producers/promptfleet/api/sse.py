"""Server-sent events: how they are written, and a response that knows when its client has left.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE = b": keep-alive\n\n"
STALL_S = 60.0
"""Seconds that a client may leave unread what fills all buffers; then it is hung up on."""
# A proxy must neither keep an answer that grows, nor hold back its pieces.
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def sse_event(data: Any, *, event: str | None = None, id: str | None = None) -> bytes:  # noqa: A002
    """One event; `data` becomes JSON, which has no line breaks."""
    lines = [b"data: " + orjson.dumps(data)]
    if event is not None:
        lines.insert(0, b"event: " + event.encode())
    if id is not None:
        lines.insert(0, b"id: " + id.encode())
    return b"\n".join(lines) + b"\n\n"


class EventStreamResponse(Response):
    """Sends frames as they come, and comments while none do."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        keep_alive_s: float,
        room: AbstractContextManager[None] | None = None,
        on_left: Callable[[], object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send nothing yet.

        Args:
            frames: What `sse_event` makes; closed when the client leaves.
            keep_alive_s: Seconds without a frame after which a comment is sent.
            room: Entered while it runs.
            on_left: Called if the client leaves before the last frame; not at a shutdown.
            headers: Further ones.
        """
        super().__init__(headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._frames = frames
        self._keep_alive_s = keep_alive_s
        self._room = room or nullcontext()
        self._on_left = on_left
        self._sent = 0
        self._is_gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's
        """Answer."""
        with self._room:
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            sending = asyncio.create_task(self._send_all(send))
            others = {asyncio.create_task(_left(receive)), asyncio.create_task(self._keep(send))}
            try:
                await asyncio.wait({sending, *others}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, *others):
                    task.cancel()
                await asyncio.wait({sending, *others})
        if not (sending.cancelled() or self._is_gone):
            sending.result()
        elif self._on_left is not None:
            self._on_left()

    async def _send_all(self, send: Send) -> None:
        try:
            async for frame in self._frames:
                await self._send(send, frame)
            await self._send(send, b"", more=False)
        finally:
            if (close := getattr(self._frames, "aclose", None)) is not None:
                await close()

    async def _keep(self, send: Send) -> None:
        """Send comments while nothing else is sent; ends if the client does not read them."""
        with contextlib.suppress(OSError, TimeoutError):
            while True:
                sent = self._sent
                await asyncio.sleep(self._keep_alive_s)
                if self._sent == sent:
                    await self._send(send, KEEP_ALIVE)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._sent += 1  # at once: what waits to be sent needs no comment beside it
        try:
            async with asyncio.timeout(STALL_S):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except (OSError, TimeoutError):
            self._is_gone = True
            raise


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
