"""Cursors of listings: opaque to whoever holds one, fit for a URL, and versioned."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

from promptfleet_shared.errors import InvalidRequestError

MAX_UNDER_WAY = 256
"""Open transactions that a cursor remembers; what comes after so many is not read before they end.
"""
_JOBS, _RESULTS = b"\x01", b"\x02"  # the kind and the version of a cursor
_MAX_CURSOR = 4_096
_MAX_NUMBER = 2**63
_FIRST = uuid.UUID(int=0)
_LAST = uuid.UUID(int=2**128 - 1)


def encode_job(job_id: uuid.UUID) -> str:
    """The cursor that stands before the jobs that are older than this one."""
    return _encode(_JOBS + job_id.bytes)


def decode_job(cursor: str | None) -> uuid.UUID:
    """The id that the next page's are smaller than.

    Raises:
        InvalidRequestError: The cursor is none of ours.
    """
    if cursor is None:
        return _LAST
    data = _decode(cursor, _JOBS)
    try:
        return uuid.UUID(bytes=data)
    except ValueError:
        raise _bad_cursor() from None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What could be seen at one moment.

    Attributes:
        below: All transactions with lower numbers were over,
        under_way: except for these, in order.
    """

    below: int = 0
    under_way: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """From `xmin:xmax:xip,xip`, as Postgres writes it."""
        _, below, under_way = text.split(":")
        numbers = tuple(int(number) for number in under_way.split(",") if number)
        if len(numbers) > MAX_UNDER_WAY:  # as good, though it sees less
            return cls(below=numbers[MAX_UNDER_WAY], under_way=numbers[:MAX_UNDER_WAY])
        return cls(below=int(below), under_way=numbers)

    def __str__(self) -> str:
        lowest = self.under_way[0] if self.under_way else self.below
        return f"{lowest}:{self.below}:{','.join(str(number) for number in self.under_way)}"

    def numbers(self) -> Iterator[int]:
        """Small ones, for the most part: how many are under way, and each one's distance."""
        yield len(self.under_way)
        previous = 0
        for number in (*self.under_way, self.below):
            yield number - previous
            previous = number

    @classmethod
    def read(cls, numbers: Iterator[int]) -> Snapshot:
        """The other way round.

        Raises:
            ValueError: There is no such snapshot.
        """
        count = next(numbers)
        if count > MAX_UNDER_WAY:
            raise ValueError
        total, sums = 0, list[int]()
        for _ in range(count + 1):
            distance = next(numbers)
            if (sums and distance < 1) or total + distance >= _MAX_NUMBER:
                raise ValueError
            total += distance
            sums.append(total)
        if count and sums[0] < 1:
            raise ValueError
        return cls(below=sums[-1], under_way=tuple(sums[:-1]))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a reader of results is.

    Attributes:
        seen: All that this snapshot could see was read.
        seal: In the midst of several pages: the snapshot that they read up to,
        last: and the last row that was read, its transaction's number and its job.
    """

    seen: Snapshot = Snapshot()
    seal: Snapshot | None = None
    last: tuple[int, uuid.UUID] = (0, _FIRST)

    def parameters(self) -> dict[str, Any]:
        """What the statement asks for."""
        # Rows of `below` itself come after the first of all ids.
        start = max(self.last, (self.seen.below, _FIRST))
        return {
            "under_way": [str(number) for number in self.seen.under_way],
            "after": str(self.last[0]),
            "after_id": self.last[1],
            "from": str(start[0]),
            "from_id": start[1],
            "seal": None if self.seal is None else str(self.seal),
        }

    def encode(self) -> str:
        """As a cursor."""
        numbers = [*self.seen.numbers()]
        tail = b""
        if self.seal is not None:
            numbers += [*self.seal.numbers(), self.last[0]]
            tail = self.last[1].bytes
        return _encode(_RESULTS + b"".join(_varint(number) for number in numbers) + tail)

    @classmethod
    def decode(cls, cursor: str | None) -> Place:
        """From a cursor; without one, where nothing was read yet.

        Raises:
            InvalidRequestError: It is none of ours.
        """
        if cursor is None:
            return cls()
        data = _Bytes(_decode(cursor, _RESULTS))
        try:
            seen = Snapshot.read(data)
            if not data.left:
                return cls(seen=seen)
            seal = Snapshot.read(data)
            last = (next(data), uuid.UUID(bytes=data.left))
        except (ValueError, StopIteration):
            raise _bad_cursor() from None
        if seal.below < 1 or last[0] >= _MAX_NUMBER:
            raise _bad_cursor()
        return cls(seen=seen, seal=seal, last=last)


class _Bytes(Iterator[int]):
    """Reads one number after the other.

    Attributes:
        left: What was not read yet.
    """

    def __init__(self, data: bytes) -> None:
        self.left = data

    def __next__(self) -> int:
        value = shift = 0
        for position, byte in enumerate(self.left):
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:  # noqa: PLR2004  # the last one of a number
                self.left = self.left[position + 1 :]
                return value
        raise StopIteration


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    written = bytearray()
    while number > 0x7F:  # noqa: PLR2004
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(cursor: str, kind: bytes) -> bytes:
    if len(cursor) > _MAX_CURSOR:
        raise _bad_cursor()
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        data = base64.b64decode(padded, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _bad_cursor() from None
    if data[:1] != kind:
        raise _bad_cursor()
    return data[1:]


def _bad_cursor() -> InvalidRequestError:
    msg = "cursor: must be one that an earlier page of the same listing gave"
    return InvalidRequestError(msg, field="cursor")
