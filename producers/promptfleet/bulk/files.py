"""The files that a run writes: rows that survive Ctrl-C, and what an earlier run left there."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from promptfleet_shared.errors import ConfigurationError, PromptFleetError

_BLOCK_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16


class LineNumbers:
    """A set of line numbers at a bit each: a file of a hundred million lines fits in memory."""

    def __init__(self) -> None:
        """Empty."""
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        place, bit = divmod(number, 8)
        return place < len(self._bits) and bool(self._bits[place] >> bit & 1)

    def add(self, number: int) -> None:
        """Add a number from 0."""
        place, bit = divmod(number, 8)
        if place >= len(self._bits):
            self._bits.extend(bytes(max(place + 1 - len(self._bits), len(self._bits))))
        if not self._bits[place] >> bit & 1:
            self._bits[place] |= 1 << bit
            self._count += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What makes a file the same file, wherever it lies: its bytes; and how many lines it has."""

    digest: str
    lines: int


def fingerprint(file: BinaryIO, salt: bytes) -> Fingerprint:
    """Read the file once, in blocks; `salt` is what else makes a run the same run."""
    digest = hashlib.sha256(salt)
    lines, last = 0, b"\n"
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        lines += block.count(b"\n")
        last = block[-1:]
    return Fingerprint(digest=digest.hexdigest(), lines=lines + (last != b"\n"))


class RowFile:
    """A file of JSON lines that one process at a time appends to, whole rows at once."""

    def __init__(self, path: Path) -> None:
        """Open it, and cut off a row that was not written to its end.

        Raises:
            ConfigurationError: It can't be written.
            PromptFleetError: Another process is writing to it.
        """
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigurationError(f"{path}: can't be written: {error.strerror}") from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise PromptFleetError(f"{path} is being written by another process") from None
        self._cut_partial_row()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are there.

        Raises:
            ConfigurationError: A line is no row of ours.
        """
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError:
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("line"), int):
                    raise ConfigurationError(
                        f"{self.path}:{number}: is no row of promptfleet submit; choose another"
                        " file"
                    )
                yield row

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows with one call, so that Ctrl-C finds none of them half written."""
        options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
        data = b"".join(orjson.dumps(row, default=str, option=options) for row in rows)
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]

    def clear(self) -> None:
        """Remove all rows."""
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)

    def close(self, *, remove_if_empty: bool = False) -> None:
        """Close it; an empty one may go."""
        if self._handle < 0:
            return
        if remove_if_empty and os.fstat(self._handle).st_size == 0:
            with suppress(FileNotFoundError):
                self.path.unlink()
        os.close(self._handle)
        self._handle = -1

    def _cut_partial_row(self) -> None:
        """Leave the position at the end of the last whole row."""
        end = os.fstat(self._handle).st_size
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            newline = os.pread(self._handle, end - start, start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        os.ftruncate(self._handle, end)
        os.lseek(self._handle, end, os.SEEK_SET)
