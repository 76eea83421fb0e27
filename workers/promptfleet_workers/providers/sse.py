"""Server-sent events, read piece by piece as the WHATWG defines them.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation.
Two differences: data stays bytes (its reader decides what becomes of invalid UTF-8), and an event
has a cap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from promptfleet_shared.errors import ProviderError

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""A longer line, or an event with more data, is refused."""

_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        data: The lines of its data, joined by line feeds.
        name: Its type; empty where it has none, which means "message".
        last_id: The last `id` of the stream so far.
    """

    data: bytes
    name: bytes = b""
    last_id: bytes = b""


class EventStream:
    r"""Turns the pieces of a body, however they are cut, into its events.

    Example:
        >>> stream = EventStream()
        >>> [*stream.feed(b"data: a\r"), *stream.feed(b"\n\ndata: b\n")]
        [Event(data=b'a', name=b'', last_id=b'')]
        >>> stream.pending
        b'b'
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        """Expect the beginning of a stream."""
        self._max = max_event_bytes
        self._start: bytes | None = b""  # None once it is known whether there is a BOM
        self._after_cr = False
        self._line: list[bytes] = []  # the beginning of the line that is not complete yet
        self._line_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._name = b""
        self._last_id = b""
        self.retry_ms: int | None = None

    @property
    def pending(self) -> bytes:
        """The data of the event that was not ended; the standard says to drop it."""
        data = list(self._data)
        line = b"".join(self._line)
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        return b"\n".join(data)

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that this piece completes; to be read to the end.

        Raises:
            ProviderError: `response_too_large`: an event exceeds the cap.
        """
        if self._start is not None:
            piece = self._without_bom(piece)
        for line in self._lines(piece):
            if line:
                self._field(line)
            elif self._data:
                yield Event(b"\n".join(self._data), self._name, self._last_id)
                self._reset()
            else:
                self._name = b""

    def _without_bom(self, piece: bytes) -> bytes:
        """The piece, or nothing as long as it could be the beginning of a BOM."""
        start = (self._start or b"") + piece
        if len(start) < len(_BOM) and _BOM.startswith(start):
            self._start = start
            return b""
        self._start = None
        return start.removeprefix(_BOM)

    def _lines(self, piece: bytes) -> Iterator[bytes]:
        """The lines that this piece completes, whether they end in LF, CR or CRLF."""
        if self._after_cr and piece:
            piece = piece.removeprefix(b"\n")  # the second half of a CRLF
            self._after_cr = False
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *rest = piece.split(b"\n")
        self._line_bytes += len(first)
        self._check(self._line_bytes)
        if first:
            self._line.append(first)
        if not rest:
            return
        yield self._line[0] if len(self._line) == 1 else b"".join(self._line)
        *whole, last = rest
        for line in whole:
            self._check(len(line))
            yield line
        self._line = [last] if last else []
        self._line_bytes = len(last)
        self._check(self._line_bytes)

    def _field(self, line: bytes) -> None:
        """Process one field; a line that begins with a colon is a comment."""
        name, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
            self._check(self._data_bytes - 1)
        elif name == b"event":
            self._name = value
        elif name == b"id" and b"\0" not in value:
            self._last_id = value
        elif name == b"retry" and value.isdigit():
            self.retry_ms = int(value[:18])

    def _reset(self) -> None:
        self._data = []
        self._data_bytes = 0
        self._name = b""

    def _check(self, size: int) -> None:
        if size > self._max:
            message = f"an event of the stream is longer than {self._max} bytes"
            raise ProviderError(message, code="response_too_large", unknown_outcome=True)
