"""Server-sent events: how they are written, and a response that knows when its client has left.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's
        """Answer."""
        with self._room:
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            sending = asyncio.create_task(self._send_all(send))
            leaving = asyncio.create_task(_left(receive))
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                sending.cancel()
                leaving.cancel()
                await asyncio.wait({sending, leaving})
        if sending.cancelled() or isinstance(sending.exception(), OSError | TimeoutError):
            if self._on_left is not None:
                self._on_left()
        else:
            sending.result()

    async def _send_all(self, send: Send) -> None:
        frames = aiter(self._frames)
        coming: asyncio.Task[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(_next(frames))
                done, _ = await asyncio.wait({coming}, timeout=self._keep_alive_s)
                if not done:
                    await _send(send, KEEP_ALIVE)
                    continue
                frame = coming.result()
                coming = None
                if not frame:
                    break
                await _send(send, frame)
            await _send(send, b"", more=False)
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            if (close := getattr(frames, "aclose", None)) is not None:
                await close()


async def _next(frames: AsyncIterator[bytes]) -> bytes:
    """The next frame; empty after the last one."""
    return await anext(frames, b"")


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(STALL_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
