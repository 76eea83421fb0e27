"""A small, fast HTTP/1.1 server: one protocol object a connection, replies as timed writes."""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, cast

import httptools

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_WAITING = 64  # pipelined requests of one connection that wait for their turn

_KEPT_HEADERS = frozenset((b"authorization", b"x-api-key", b"x-goog-api-key", b"expect", b"host"))
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS = {int(status): status.phrase.encode() for status in HTTPStatus}


class Ending(enum.Enum):
    """What becomes of the connection after the last write of a reply."""

    KEEP = enum.auto()
    CLOSE = enum.auto()
    ABORT = enum.auto()  # a TCP reset: the client sees a broken connection
    HANG = enum.auto()  # nothing more comes until the client leaves
    REPEAT = enum.auto()  # the last write comes again and again until the client leaves


# Request and Reply are made for every request: not frozen, which would double their cost.
@dataclass(slots=True, kw_only=True)
class Request:
    """One complete request; `headers` has lower-case names and only those the server uses."""

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes | bytearray
    keep_alive: bool
    chunked: bool  # whether the client understands a chunked reply (HTTP/1.1)


@dataclass(slots=True)
class Reply:
    """Bytes to write, each after its delay in seconds, and what to do then.

    `on_end` is called once, with True when every byte was handed to the connection and with
    False when the client left before, or was left hanging.
    """

    steps: list[tuple[float, bytes]]
    ending: Ending
    on_end: Callable[[bool], None] | None = None


class Application(Protocol):
    """What answers requests; it must not block and must not raise."""

    def answer(self, request: Request, /) -> Reply:
        """The reply to `request`."""
        ...


def response(
    status: int,
    payload: bytes,
    *,
    headers: bytes = b"",
    content_type: bytes = b"application/json",
) -> bytes:
    """A whole response; `headers` are lines that end in CRLF."""
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status,
        _REASONS.get(status, b"Unknown"),
        content_type,
        len(payload),
        headers,
        payload,
    )


def _refusal(status: int, message: str) -> bytes:
    payload = b'{"error":{"message":"%b","type":"invalid_request_error"}}' % message.encode()
    return response(status, payload, headers=b"connection: close\r\n")


class HttpServer:
    """Listens, and knows every open connection so that it can drain them."""

    def __init__(self, application: Application, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.application = application
        self.max_body_bytes = max_body_bytes
        self.draining = False
        self.connections: set[Connection] = set()
        self.loop: asyncio.AbstractEventLoop
        self._listener: asyncio.Server
        self._empty = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen on `host`; returns the port, chosen by the system when `port` is 0."""
        self.loop = asyncio.get_running_loop()
        self._listener = await self.loop.create_server(
            lambda: Connection(self), host, port, backlog=4096
        )
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    async def drain(self, grace_s: float) -> None:
        """Accept nothing new, finish what runs, and cut what still runs after `grace_s`."""
        self.draining = True
        self._listener.close()
        for connection in list(self.connections):
            connection.close_when_idle()
        try:
            async with asyncio.timeout(grace_s):
                while self.connections:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            for connection in list(self.connections):
                connection.abort()

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()


class Connection(asyncio.Protocol):
    """Parses requests and plays one reply after the other, in the order of the requests."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._waiting: deque[Request] = deque()
        self._reply: Reply | None = None
        self._step = 0
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._write_paused = False
        self._last_words: bytes | None = None  # written before closing; no request counts after it
        self._continue_owed = False
        self._head_size = 0
        self._head_ended = False
        self._start_request()

    def _start_request(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._body_size = 0
        self._in_head = True

    # -- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The client has left, or the reply asked for it."""
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
        self._end_reply(completed=False)
        self._server.forget(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came and answer the requests that are complete."""
        if self._last_words is not None:
            return
        self._head_ended = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No upgrade is spoken here: the request is answered, what follows it is not HTTP.
            self._last_words = b""
        except httptools.HttpParserError:
            self._last_words = _refusal(400, "malformed HTTP request")
        if self._body_size > self._server.max_body_bytes:
            self._last_words = _refusal(413, "request body too large")
        elif self._in_head and not self._head_ended:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD_BYTES:
                self._last_words = _refusal(431, "request head too large")
        self._serve()
        if len(self._waiting) > MAX_WAITING and not self._transport.is_closing():
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """The client reads too slowly: answer no further requests of it."""
        self._write_paused = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._write_paused = False
        if self._reply is not None and self._reply.ending is Ending.REPEAT:
            self._repeat(self._reply)
        self._serve()

    # -- httptools' callbacks

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        name = name.lower()
        if name in _KEPT_HEADERS:
            self._headers[name] = value

    def on_headers_complete(self) -> None:
        """The head is complete; the body comes next."""
        self._in_head = False
        self._head_ended = True
        self._head_size = 0
        if self._headers.get(b"expect", b"").lower() == b"100-continue":
            if self._reply is None and not self._waiting:
                self._transport.write(_CONTINUE)
            else:
                self._continue_owed = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body; past the limit it is not kept."""
        self._body_size += len(body)
        if self._body_size > self._server.max_body_bytes:
            return
        if not self._body:
            self._body = body
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += body

    def on_message_complete(self) -> None:
        """A whole request is here; it is answered after the parser returns."""
        self._head_ended = True  # this piece was the body's, not the next head's
        if self._body_size > self._server.max_body_bytes:
            return
        path, _, query = self._url.decode("latin-1").partition("?")
        self._continue_owed = False
        self._waiting.append(
            Request(
                method=self._parser.get_method().decode("latin-1"),
                path=path,
                query=query,
                headers=self._headers,
                body=self._body,
                keep_alive=self._parser.should_keep_alive(),
                chunked=self._parser.get_http_version() != "1.0",
            )
        )
        self._start_request()

    # -- replies

    def _serve(self) -> None:
        while self._waiting and self._reply is None and not self._write_paused:
            if self._transport.is_closing():
                return
            request = self._waiting.popleft()
            if self._server.draining:
                request.keep_alive = False
            self._reply = self._server.application.answer(request)
            self._step = 0
            self._due_at = 0.0
            self._play()
        if self._reply is None and not self._waiting and not self._transport.is_closing():
            self._idle()

    def _idle(self) -> None:
        """Every request so far is answered."""
        if self._last_words is not None:
            self._transport.write(self._last_words)
            self._transport.close()
            return
        if self._continue_owed:
            self._continue_owed = False
            self._transport.write(_CONTINUE)
        if not self._transport.is_reading():
            self._transport.resume_reading()

    def _play(self) -> None:
        """Write the steps that are due; come back for the next one by a timer."""
        reply = self._reply
        assert reply is not None  # noqa: S101 - for the type checkers
        while self._step < len(reply.steps):
            delay_s, data = reply.steps[self._step]
            if delay_s > 0 and self._timer is None:
                now = self._server.loop.time()
                # Counted from when the last step was due, so that a token rate does not drift.
                self._due_at = (self._due_at or now) + delay_s
                if self._due_at > now:
                    self._timer = self._server.loop.call_at(self._due_at, self._timer_fired)
                    return
            self._timer = None
            self._transport.write(data)
            self._step += 1
        self._end(reply)

    def _timer_fired(self) -> None:
        self._play()
        if self._reply is None:
            self._serve()

    def _end(self, reply: Reply) -> None:
        if reply.ending is Ending.HANG:
            return
        if reply.ending is Ending.REPEAT:
            self._repeat(reply)
            return
        if reply.ending is Ending.ABORT:
            self._transport.abort()
        elif reply.ending is Ending.CLOSE:
            self._transport.close()
        self._end_reply(completed=True)

    def _repeat(self, reply: Reply) -> None:
        """Fill what the connection takes; it asks for more when the client has read."""
        while not self._write_paused and not self._transport.is_closing():
            self._transport.write(reply.steps[-1][1])

    def _end_reply(self, *, completed: bool) -> None:
        reply, self._reply = self._reply, None
        if reply is not None and reply.on_end is not None:
            reply.on_end(completed)

    def close_when_idle(self) -> None:
        """Close now, or after the reply under way."""
        if self._reply is None and not self._waiting:
            self._transport.close()
        elif self._reply is not None and self._reply.ending is Ending.KEEP:
            self._reply.ending = Ending.CLOSE

    def abort(self) -> None:
        """Cut the connection."""
        self._transport.abort()
