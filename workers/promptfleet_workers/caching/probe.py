"""A prompt that others may be alike, as the semantic cache compares it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A prompt's place among those that it may be compared with.

    Attributes:
        bucket: Names all that must be equal: tenant, namespace, model, parameters, system message.
        vector: The prompt's embedding, of length 1: 32-bit floats, little-endian.
        text: The prompt itself.
        key: The key of its answer in the cache.
        ttl_s: Seconds that the answer is kept.
    """

    bucket: str
    vector: bytes
    text: str
    key: str
    ttl_s: int


class Match(NamedTuple):
    """A prompt that is near another one.

    Attributes:
        key: The key of its answer.
        text: The prompt, where texts are kept.
        similarity: The cosine, up to 1.
    """

    key: str
    text: str | None
    similarity: float
