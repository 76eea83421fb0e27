"""Undo gzip and deflate piece by piece, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from promptfleet_shared.errors import ProviderError

_PIECE_BYTES = 256 * 1024
_EITHER = zlib.MAX_WBITS | 32  # gzip's or zlib's header, whichever comes
_RAW = -zlib.MAX_WBITS  # what some servers call deflate, against RFC 9110


class Inflater:
    """Decompresses a body; gives pieces of bounded size, so that its reader can stop at its cap."""

    def __init__(self, *, is_deflate: bool = False) -> None:
        """Expect gzip (of one or more members, RFC 1952), or deflate with or without a header."""
        self._may_be_raw = is_deflate
        self._inflate = zlib.decompressobj(_EITHER)
        self._has_begun = False

    @property
    def is_whole(self) -> bool:
        """True if nothing is missing; so for a body of no bytes at all, too."""
        return self._inflate.eof or not self._has_begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes of the next piece.

        Raises:
            ProviderError: `bad_response`: it is damaged.
        """
        self._has_begun = self._has_begun or bool(data)
        is_full = False
        while data or is_full:
            if self._inflate.eof:
                data = data.lstrip(b"\0")  # padding is allowed between members, and after the last
                if not data:
                    return
                self._inflate = zlib.decompressobj(_EITHER)
            plain = self._decompress(data)
            is_full = len(plain) == _PIECE_BYTES  # then some may wait inside
            if plain:
                yield plain
            data = self._inflate.unused_data or self._inflate.unconsumed_tail

    def _decompress(self, data: bytes) -> bytes:
        try:
            plain = self._inflate.decompress(data, _PIECE_BYTES)
        except zlib.error:
            if not self._may_be_raw:
                raise _damaged() from None
        else:
            self._may_be_raw = False
            return plain
        self._may_be_raw = False
        self._inflate = zlib.decompressobj(_RAW)
        try:
            return self._inflate.decompress(data, _PIECE_BYTES)
        except zlib.error:
            raise _damaged() from None


def _damaged() -> ProviderError:
    message = "the compressed response is damaged"
    return ProviderError(message, code="bad_response", unknown_outcome=True)
