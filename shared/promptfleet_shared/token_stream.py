"""The stream of a job's tokens in Redis: its name, its entries, and where a reader stands in it.

A stream is a live view and never the truth: the result is in Postgres. So it is bounded, expires,
and may be lost at any moment; a reader who knows where he stands gets the rest from the result.

A **take** is one go at the answer: a claim's fence and which of the claim's calls it is. A job that
is tried again begins a new take, whose text has nothing to do with the last one's. Each entry says
of which take it is and after how many characters of its text it begins. Therefore what was written
twice is seen once, what was lost is noticed, and a worker that lost its claim writes in vain.

The key has no tenant in it: who reads must have found the job in Postgres, as its tenant, before.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import uuid
import zlib
from collections.abc import Mapping
from typing import NamedTuple, Self

from promptfleet_shared.jobs import JobState, Result

KEY_PREFIX = "promptfleet:stream:"
LIVE_TTL_S = 900
"""Seconds after its last entry that a stream is kept while its job runs."""
ENDED_TTL_S = 60
"""The same once the job has ended: from then on the result says all."""
MAX_ENTRIES = 20_000
MAX_BYTES = 512 * 1024
"""Of UTF-8 that a stream holds; what is beyond comes with the result."""

_POSITION = re.compile(r"(\d{1,18})-(\d{1,18})-(\d{1,18})-([0-9a-f]{1,8})", re.ASCII)


def stream_key(job_id: uuid.UUID) -> str:
    """The key of a job's stream."""
    return f"{KEY_PREFIX}{job_id}"


class Take(NamedTuple):
    """One go at an answer; later ones are greater."""

    fence: int
    call: int


NO_TAKE = Take(0, 0)
LAST_TAKE = Take(10**17, 0)
"""Greater than all that workers write: the text of the result."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of a stream.

    Attributes:
        at: How many characters of the take's text come before this entry's.
        state: How the job ended; None while it goes on.
    """

    take: Take
    at: int
    text: str = ""
    state: JobState | None = None

    @classmethod
    def of(cls, fields: Mapping[bytes, bytes]) -> Self | None:
        """The entry with these fields; None for one that is not of this release."""
        try:
            state = fields[b"s"].decode()
            return cls(
                take=Take(int(fields[b"f"]), int(fields[b"c"])),
                at=int(fields[b"a"]),
                text=fields[b"t"].decode(),
                state=JobState(state) if state else None,
            )
        except (KeyError, ValueError):
            return None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a reader stands: so many characters of a take, and what they were.

    Its text is the id of an event: with it, any process can go on where another one stopped, even
    when there is nothing left but the result.

    Attributes:
        crc: The CRC-32 of the characters' UTF-8.
    """

    take: Take = NO_TAKE
    at: int = 0
    crc: int = 0

    def __str__(self) -> str:
        return f"{self.take.fence}-{self.take.call}-{self.at}-{self.crc:x}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The position that a text tells; None if it tells none."""
        found = _POSITION.fullmatch(text)
        if found is None:
            return None
        fence, call, at = (int(part) for part in found.groups()[:3])
        return cls(take=Take(fence, call), at=at, crc=int(found[4], 16))

    def after(self, text: str) -> Self:
        """The position once this text was read, too."""
        return dataclasses.replace(self, at=self.at + len(text), crc=checksum(text, self.crc))


def checksum(text: str, before: int = 0) -> int:
    """The CRC-32 of a text, or of one that goes on after another with the CRC `before`."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"), before)


class EventKind(enum.StrEnum):
    """What a reader hears of."""

    TOKEN = "token"  # noqa: S105  # the text goes on
    RESET = "reset"  # it begins anew: drop what came before
    END = "end"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """What a reader hears.

    Attributes:
        id: Where the reader stands after it.
        text: Of a TOKEN: the next characters, one token or more.
        result: Of an END: how the job ended, whatever its state.
    """

    kind: EventKind
    id: str
    text: str = ""
    result: Result | None = None
