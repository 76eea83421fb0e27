"""Cut an endless body into JSON texts, one a job, without ever holding more than one of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Protocol

from promptfleet.api.bodies import MAX_DEPTH
from promptfleet.api.errors import ApiError, invalid, too_large

_SPACE = b" \t\r\n"
_STRUCTURE = re.compile(rb'["\[\]{},]')
# As far as a string goes without its closing quote or a backslash that something follows.
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One of many: its text, or why there is none.

    Attributes:
        index: Its place, from 0.
        text: JSON, or what claims to be.
    """

    index: int
    text: bytes = b""
    error: ApiError | None = None


class Splitter(Protocol):
    """Cuts a body into items."""

    def feed(self, piece: bytes) -> Iterator[Item]:
        """The items that end in this piece.

        Raises:
            ApiError: The rest can't be read: what is no list has no items.
        """
        ...

    def end(self) -> Iterator[Item]:
        """The item that ends with the body.

        Raises:
            ApiError: The body ended too early.
        """
        ...


class LineSplitter:
    """NDJSON: a line is an item; empty ones are none. A bad line costs only itself."""

    def __init__(self, *, max_bytes: int) -> None:
        """At the beginning.

        Args:
            max_bytes: Bytes of one line at most; more is skipped and told.
        """
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._skipping = False
        self._count = 0

    def feed(self, piece: bytes) -> Iterator[Item]:
        """See `Splitter`."""
        start = 0
        while (stop := piece.find(b"\n", start)) >= 0:
            self._add(piece[start:stop])
            yield from self._finish()
            start = stop + 1
        self._add(piece[start:])

    def end(self) -> Iterator[Item]:
        """See `Splitter`; the last line needs no line feed."""
        yield from self._finish()

    def _add(self, part: bytes) -> None:
        if self._skipping:
            return
        if len(self._line) + len(part) > self._max_bytes:
            self._skipping = True
            self._line.clear()
        else:
            self._line += part

    def _finish(self) -> Iterator[Item]:
        text, skipped = bytes(self._line.strip(_SPACE)), self._skipping
        self._line.clear()
        self._skipping = False
        if skipped:
            error = too_large(f"The line is longer than {self._max_bytes} bytes, the limit.")
            yield Item(index=self._next(), error=error)
        elif text:
            yield Item(index=self._next(), text=text)

    def _next(self) -> int:
        self._count += 1
        return self._count - 1


class ArraySplitter:
    """A JSON array: each of its elements is an item.

    It finds where elements end by quotes and brackets alone; whether an element is JSON is for
    `parse_json` to say. After an error between elements nothing that follows can be trusted, and
    nothing is worth its time after an element that is too deep.
    """

    def __init__(self, *, max_bytes: int) -> None:
        """At the beginning.

        Args:
            max_bytes: Bytes of one element at most; more is skipped and told.
        """
        self._max_bytes = max_bytes
        self._item = bytearray()
        self._error: ApiError | None = None
        self._rest = b""  # a backslash whose other half has not come yet
        self._in_string = False
        self._depth = 0  # 1 within the array, more within an element
        self._closed = False
        self._count = 0

    def feed(self, piece: bytes) -> Iterator[Item]:
        """See `Splitter`."""
        piece, self._rest = self._rest + piece, b""
        at = kept = 0
        while at < len(piece):
            if self._in_string:
                at = self._skip_string(piece, at)
                if self._rest:
                    break
                continue
            found = _STRUCTURE.search(piece, at) if self._depth else _NOT_SPACE.search(piece, at)
            if found is None:
                break
            at, mark = found.end(), found[0]
            if self._depth == 0:
                self._begin(mark)
                kept = at
            elif self._depth == 1 and mark in {b",", b"]"}:
                self._keep(piece[kept : at - 1])
                yield from self._finish(last=mark == b"]")
                kept = at
            else:
                self._step(mark)
        if self._depth:
            self._keep(piece[kept : len(piece) - len(self._rest)])

    def end(self) -> Iterator[Item]:
        """See `Splitter`."""
        if not self._closed:
            raise invalid("The array is not closed: the body ended too early.", code="invalid_json")
        yield from ()

    def _skip_string(self, piece: bytes, at: int) -> int:
        match = _IN_STRING.match(piece, at)
        at = match.end() if match else at
        if at == len(piece):
            return at
        if piece[at : at + 1] == b"\\":  # the last byte of the piece
            self._rest = b"\\"
            return len(piece)
        self._in_string = False
        return at + 1

    def _begin(self, mark: bytes) -> None:
        if self._closed or mark != b"[":
            where = "after the array" if self._closed else "where an array should begin"
            raise invalid(f"There is something {where}.", code="invalid_json")
        self._depth = 1

    def _step(self, mark: bytes) -> None:
        if mark == b'"':
            self._in_string = True
        elif mark in {b"[", b"{"}:
            self._depth += 1
            if self._depth - 1 > MAX_DEPTH:
                msg = f"An element is nested deeper than {MAX_DEPTH} levels; that is the limit"
                raise invalid(msg, code="too_deep")
        elif mark != b",":
            self._depth -= 1
            if self._depth == 0:  # a } that closes the array
                raise invalid("The array is closed by a brace.", code="invalid_json")

    def _keep(self, part: bytes) -> None:
        if self._error is not None:
            return
        if len(self._item) + len(part) > self._max_bytes:
            msg = f"The element is larger than {self._max_bytes} bytes, the limit."
            self._refuse(too_large(msg))
        else:
            self._item += part

    def _refuse(self, error: ApiError) -> None:
        self._error = self._error or error
        self._item.clear()

    def _finish(self, *, last: bool) -> Iterator[Item]:
        text, error = bytes(self._item.strip(_SPACE)), self._error
        self._item.clear()
        self._error = None
        if last:
            self._closed, self._depth = True, 0
        if not text and error is None:
            if last and self._count == 0:
                return
            raise invalid("There is a comma with nothing beside it.", code="invalid_json")
        yield Item(index=self._count, text=text, error=error)
        self._count += 1
