"""What a cache keeps: a completion as bytes, whole, checked, compressed, and sealed if wished."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import orjson

from promptfleet_shared.jobs import Usage
from promptfleet_workers.providers.protocol import Completion

# A value is this head, the facts as JSON, and the response's bytes; the two latter may be
# compressed. The checksum is that of all that follows the head, begun with what stands before it.
_HEAD = struct.Struct(">BBII")  # version, flags, length of the facts, CRC-32
_VERSION = 1
_COMPRESSED = 1
# zlib takes 40 µs for its start and 8 ns a byte: for usual answers that costs more than it saves.
# Vectors (without text) shrink to a half only, and would hold up the loop.
_COMPRESS_FROM = 16 * 1024
_PLAIN_MAX = 64 * 1024 * 1024


class Kept(NamedTuple):
    """An answer from the cache.

    Attributes:
        stored_at: Seconds since 1970; None where the value does not tell.
    """

    completion: Completion
    stored_at: int | None


class Cipher(Protocol):
    """Seals bytes so that they are of use under their own name only."""

    def seal(self, name: str, plain: bytes) -> bytes:
        """The bytes, sealed."""
        ...

    def open(self, name: str, sealed: bytes) -> bytes | None:
        """The bytes as they were; None for a key or a name that is not theirs, or any damage."""
        ...


class Codec:
    """Writes and reads values as [cache] wishes."""

    def __init__(
        self,
        *,
        compress: bool = True,
        cipher: Cipher | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Compress long values, and seal all of them with `cipher`, if there is one."""
        self._compress = compress
        self._cipher = cipher
        self._clock = clock

    def encode(self, key: str, completion: Completion) -> bytes:
        """The value of this key."""
        value = encode_completion(completion, compress=self._compress, stored_at=int(self._clock()))
        return self.seal(key, value)

    def decode(self, key: str, value: bytes) -> Kept | None:
        """What the value of this key holds; None if it is damaged, or not for us to read."""
        plain = self.open(key, value)
        return None if plain is None else decode_completion(plain)

    def seal(self, name: str, plain: bytes) -> bytes:
        """The bytes, sealed where values are."""
        return plain if self._cipher is None else self._cipher.seal(name, plain)

    def open(self, name: str, value: bytes) -> bytes | None:
        """The bytes as they were before `seal`."""
        return value if self._cipher is None else self._cipher.open(name, value)

    def age_s(self, kept: Kept) -> int | None:
        """Seconds since the answer was stored."""
        return None if kept.stored_at is None else max(0, int(self._clock()) - kept.stored_at)


def encode_completion(
    completion: Completion, *, compress: bool = True, stored_at: int | None = None
) -> bytes:
    """The completion as a cache's value; the response keeps its bytes."""
    usage = completion.usage
    facts = orjson.dumps(
        (
            completion.text,
            completion.finish_reason,
            completion.model,
            usage.input,
            usage.cached,
            usage.output,
            usage.reasoning,
            stored_at,
        )
    )
    body = facts + completion.response
    flags = 0
    if compress and completion.text is not None and len(body) >= _COMPRESS_FROM:
        body = zlib.compress(body, 1)
        flags = _COMPRESSED
    return _HEAD.pack(_VERSION, flags, len(facts), _checksum(body, flags, len(facts))) + body


def decode_completion(value: bytes) -> Kept | None:
    """The completion that a value holds; None if it is damaged or of another version."""
    if len(value) < _HEAD.size:
        return None
    version, flags, facts_length, checksum = _HEAD.unpack_from(value)
    body = value[_HEAD.size :]
    if version != _VERSION or _checksum(body, flags, facts_length) != checksum:
        return None
    try:
        if flags == _COMPRESSED:
            body = zlib.decompressobj().decompress(body, _PLAIN_MAX)
        text, finish_reason, model, *numbers = orjson.loads(body[:facts_length])
        size, cached, output, reasoning, *more = numbers  # earlier releases did not tell when
    except (zlib.error, ValueError, TypeError):
        return None
    completion = Completion(
        text=text,
        response=body[facts_length:],
        finish_reason=finish_reason,
        usage=Usage(input=size, cached=cached, output=output, reasoning=reasoning),
        model=model,
    )
    return Kept(completion, more[0] if more else None)


def _checksum(body: bytes, flags: int, facts_length: int) -> int:
    return zlib.crc32(body, (flags << 24) ^ facts_length)
