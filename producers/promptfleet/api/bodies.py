"""Reading what clients send: bounded, and looked at before it is parsed."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from promptfleet.api.errors import ApiError, invalid, overloaded, too_large
from promptfleet_shared.errors import InvalidRequestError

MAX_DEPTH = 128
"""How deep lists and objects of one JSON text may be in each other."""
MAX_VALUES = 1_000_000
"""Values of one JSON text: each costs some 60 bytes of memory once it is parsed."""
IDLE_S = 60.0
"""Seconds that a client may pause in the middle of its body."""

JSON_TYPE = "application/json"
LINES_TYPES = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})

# A string that the text ends in is one, too: else each of its quotes would begin another search.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_ALL_BYTES = bytes(range(256))
_NO_STRUCTURE = bytes(set(_ALL_BYTES) - set(b"[]{},"))
_OPENING = frozenset(b"[{")
_SPACE = b" \t\r\n"
_DIGITS = 18


class BodyMemory:
    """Bytes that the bodies of all requests of a process may hold at once, until they are parsed.

    Without it, a hundred bodies that are each within their limit would still be too many.
    """

    def __init__(self, most: int) -> None:
        """Nothing is held.

        Args:
            most: Bytes.
        """
        self._most = most
        self._held = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[MemoryShare]:
        """One request's part, given back at the end."""
        share = MemoryShare(self)
        try:
            yield share
        finally:
            self._held -= share.held

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            ApiError: 503, there is no room for them.
        """
        if self._held + size > self._most:
            raise overloaded("The API has no memory for this body now; send it again soon.")
        self._held += size


class MemoryShare:
    """What one request holds of a `BodyMemory`."""

    def __init__(self, memory: BodyMemory) -> None:
        """Nothing yet."""
        self._memory = memory
        self.held = 0

    def grow(self, size: int) -> None:
        """Hold so many bytes more; see `BodyMemory.take`."""
        self._memory.take(size)
        self.held += size


class BodyReader:
    """A request's body piece by piece; who does not read slows the client down."""

    def __init__(self, receive: Receive, *, idle_s: float = IDLE_S) -> None:
        """Read nothing yet.

        Args:
            receive: Of the request.
            idle_s: Seconds that a piece may take.
        """
        self._receive = receive
        self._idle_s = idle_s
        self._next: asyncio.Future[Any] | None = None
        self._peeked = b""
        self._ended = False

    async def begins_with(self, mark: bytes) -> bool:
        """True if this is the first byte that is no white space; nothing else is lost.

        Raises:
            As `read`.
        """
        while not self._peeked:
            piece = await self.read()
            if not piece:
                return False
            self._peeked = piece.lstrip(_SPACE)
        return self._peeked[:1] == mark

    async def read_all(self, *, most: int, memory: BodyMemory) -> bytearray:
        """All that is left.

        Args:
            most: Bytes that it may be.
            memory: Of all bodies.

        Raises:
            ApiError: 413, it has more. 503, there is no memory for it. 408, it paused for too long.
            ClientDisconnect: The client left.
        """
        body = bytearray()
        try:
            with memory.share() as share:
                while piece := await self.read():
                    if len(body) + len(piece) > most:
                        raise _body_too_large(most)
                    share.grow(len(piece))
                    body += piece
        finally:
            await self.close()
        return body

    async def read(self, within_s: float | None = None) -> bytes | None:
        """The next piece; b"" at the end of the body, None if nothing came within `within_s`.

        Raises:
            ClientDisconnect: The client left.
            ApiError: 408, it paused for too long.
        """
        if self._peeked:
            piece, self._peeked = self._peeked, b""
            return piece
        if self._ended:
            return b""
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        patience_s = self._idle_s if within_s is None else within_s
        await asyncio.wait({self._next}, timeout=patience_s)
        if not self._next.done():
            if within_s is not None:
                return None
            msg = f"The body paused for more than {self._idle_s:g} s."
            raise ApiError(408, msg, code="body_timeout", headers={"connection": "close"})
        message, self._next = self._next.result(), None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._ended = not message.get("more_body", False)
        came: bytes = message.get("body", b"")
        return came or (b"" if self._ended else await self.read(within_s))

    async def close(self) -> None:
        """Wait for nothing any more."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait({self._next})
            self._next = None


def check_length(request: Request, most: int) -> None:
    """Do nothing unless the client announces a larger body than this.

    Raises:
        ApiError: 413, before anything is read.
    """
    text = request.headers.get("content-length", "")
    if text.isascii() and text.isdigit() and (len(text) > _DIGITS or int(text) > most):
        raise _body_too_large(most)


def media_type(request: Request) -> str:
    """The content type without its parameters, in lower case; "" if there is none.

    Raises:
        ApiError: 415, the body is compressed.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise ApiError(
            415, "content-encoding: send the body as it is.", code="unsupported_encoding"
        )
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_json(request: Request) -> None:
    """Do nothing if the client says that it sends JSON.

    Raises:
        ApiError: 415. A web page could send other types to a keyless API without asking.
    """
    given = media_type(request)
    if given != JSON_TYPE and not (given.startswith("application/") and given.endswith("+json")):
        msg = f"content-type: must be {JSON_TYPE}"
        raise ApiError(415, msg, code="unsupported_media_type", param="content-type")


def parse_json(text: bytes | bytearray, *, what: str = "The body") -> Any:
    """The value that the text stands for.

    Raises:
        InvalidRequestError: It is no JSON; says where, and shows nothing of it.
        ApiError: 422, it is deeper than `MAX_DEPTH` or has more values than `MAX_VALUES`.
    """
    check_structure(text, what=what)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        msg = f"{what} is not valid JSON: {error.msg} (byte {error.pos})"
        raise InvalidRequestError(msg) from None


def check_structure(text: bytes | bytearray, *, what: str = "The body") -> None:
    """Do nothing if parsing the text takes little stack and memory beyond its own size.

    Raises:
        ApiError: 422; names the limit.
    """
    opened = text.count(b"[") + text.count(b"{")
    if opened <= MAX_DEPTH and len(text) <= MAX_VALUES:  # whatever is in its strings
        return
    structure = _STRING.sub(b"", text).translate(None, _NO_STRUCTURE)
    values = len(structure)
    if values > MAX_VALUES:
        msg = f"{what} has more than {MAX_VALUES} values; that is the limit"
        raise invalid(msg, code="too_many_values")
    depth = 0
    for char in structure.replace(b",", b""):
        depth += 1 if char in _OPENING else -1
        if depth > MAX_DEPTH:
            msg = f"{what} is nested deeper than {MAX_DEPTH} levels; that is the limit"
            raise invalid(msg, code="too_deep")


def _body_too_large(most: int) -> ApiError:
    # The rest of it is read and dropped by the server: who still writes would see a cut
    # connection instead of this.
    return too_large(f"The body is larger than {most} bytes, the limit of one request.")
