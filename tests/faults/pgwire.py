"""Reads which statements a client sends, from the bytes of Postgres' protocol."""

from __future__ import annotations

import struct

_UNTYPED = struct.Struct("!II")
_REQUESTS = frozenset({80877102, 80877103, 80877104})  # cancel, SSL, GSSAPI: before the start
_STARTED = 196608  # protocol 3.0; later minor versions begin alike

READY = (b"Z\0\0\0\x05I", b"Z\0\0\0\x05T")
"""How a reply ends once the statement is all done, outside of a transaction or in one."""


class Statements:
    """The statements of one connection, prepared ones by their text.

    Format: https://www.postgresql.org/docs/current/protocol-message-formats.html
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._started = False
        self._prepared: dict[bytes, str] = {}

    def feed(self, data: bytes) -> list[str]:
        """The statements that these bytes begin to carry out."""
        self._buffer += data
        found: list[str] = []
        while True:
            if not self._started:
                if not self._skip_start():
                    return found
                continue
            if len(self._buffer) < 5:
                return found
            size = 1 + int.from_bytes(self._buffer[1:5])
            if len(self._buffer) < size:
                return found
            kind, body = self._buffer[0], bytes(self._buffer[5:size])
            del self._buffer[:size]
            found += self._read(kind, body)

    def _skip_start(self) -> bool:
        """Pass over what comes before the first message with a type; false to wait for more."""
        if len(self._buffer) < _UNTYPED.size:
            return False
        size, code = _UNTYPED.unpack_from(self._buffer)
        if len(self._buffer) < size:
            return False
        del self._buffer[:size]
        self._started = code not in _REQUESTS and code >= _STARTED
        return True

    def _read(self, kind: int, body: bytes) -> list[str]:
        if kind == ord("Q"):
            return [_text(body.split(b"\0", 1)[0])]
        if kind == ord("P"):
            name, query, _ = body.split(b"\0", 2)
            self._prepared[name] = _text(query)
        elif kind == ord("B"):
            _, name, _ = body.split(b"\0", 2)
            return [self._prepared.get(name, "")]
        return []


def _text(query: bytes) -> str:
    return query.decode("utf-8", "replace")
