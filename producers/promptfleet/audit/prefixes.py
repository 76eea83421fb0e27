"""Which prompts begin alike, how much a provider's prefix cache saves, and in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

BLOCK = 256
"""Characters by which beginnings are compared, about 64 tokens: the hash of each block includes
those before it."""
MAX_BLOCKS = 128
"""Of a prompt; what is beyond 32,768 characters is not compared."""
DIGEST = 8
MIN_CACHED_TOKENS = 1024
"""A shorter beginning is cached neither by OpenAI (https://platform.openai.com/docs/guides/prompt-caching)
nor by most of Anthropic's models (https://docs.claude.com/en/docs/build-with-claude/prompt-caching)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """A prompt's beginning, as it is compared.

    Attributes:
        signature: A digest a block: two prompts begin alike as far as these are equal.
        tokens: Of the whole prompt.
        chars: Of the whole prompt.
        line: In the file.
    """

    signature: bytes
    tokens: int
    chars: int
    line: int

    def tokens_of(self, blocks: int) -> int:
        """Tokens of so many of its blocks, about."""
        return self.tokens * min(blocks * BLOCK, self.chars) // max(self.chars, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefix:
    """Prompts that begin alike.

    Attributes:
        lines: The first of them, in the file's order.
        prompts: How many there are.
        tokens: Of what they share, about.
    """

    lines: tuple[int, ...]
    prompts: int
    tokens: int

    @property
    def repeated_tokens(self) -> int:
        """What is sent again and again."""
        return self.tokens * (self.prompts - 1)


def signature(text: str) -> bytes:
    """The digests of a text's whole blocks, each of them chained to those before it."""
    found = bytearray()
    last = b""
    for start in range(0, min(len(text) - BLOCK + 1, BLOCK * MAX_BLOCKS), BLOCK):
        block = text[start : start + BLOCK].encode("utf-8", "surrogatepass")
        last = hashlib.blake2b(last + block, digest_size=DIGEST).digest()
        found += last
    return bytes(found)


def common_blocks(one: bytes, other: bytes) -> int:
    """How many blocks two beginnings share."""
    most = min(len(one), len(other)) // DIGEST
    low = 0
    while low < most:  # chained: if a block is equal, so are all before it
        middle = (low + most + 1) // 2
        at = slice((middle - 1) * DIGEST, middle * DIGEST)
        if one[at] == other[at]:
            low = middle
        else:
            most = middle - 1
    return low


def best_order(beginnings: Sequence[Beginning]) -> list[int]:
    """Places in an order that puts next to each other what begins alike.

    Groups come in the order of their first prompts, and prompts in the file's order within them,
    as far as that goes.
    """
    by_signature = sorted(range(len(beginnings)), key=lambda n: beginnings[n].signature)
    groups: list[list[int]] = []
    for place, n in enumerate(by_signature):
        before = by_signature[place - 1]
        if place and common_blocks(beginnings[before].signature, beginnings[n].signature):
            groups[-1].append(n)
        else:
            groups.append([n])
    groups.sort(key=min)
    return [n for group in groups for n in group]


def cached_tokens(beginnings: Sequence[Beginning], order: Sequence[int]) -> int:
    """Input tokens that a prefix cache has when prompts are called one after the other.

    A prompt's beginning counts if the prompt right before it began the same: however short a
    cache's memory is, that is still in it.
    """
    total = 0
    for place in range(1, len(order)):
        one, other = beginnings[order[place - 1]], beginnings[order[place]]
        tokens = other.tokens_of(common_blocks(one.signature, other.signature))
        if tokens >= MIN_CACHED_TOKENS:
            total += tokens
    return total


def shared_prefixes(
    beginnings: Sequence[Beginning], order: Sequence[int], *, most: int = 5
) -> list[SharedPrefix]:
    """The beginnings that are repeated most, by tokens; none of them within another.

    Args:
        beginnings: Of all prompts.
        order: In which what begins alike is next to each other.
        most: So many of them.
    """
    common = [
        common_blocks(beginnings[one].signature, beginnings[other].signature)
        for one, other in itertools.pairwise(order)
    ]
    found = [
        (beginnings[order[start]].tokens_of(blocks) * (end - start), start, end, blocks)
        for start, end, blocks in _intervals(common)
    ]
    found.sort(reverse=True)
    taken: list[tuple[int, int]] = []
    kept: list[SharedPrefix] = []
    for _, start, end, blocks in found:
        if len(kept) == most:
            break
        if any(start <= other_end and other_start <= end for other_start, other_end in taken):
            continue
        taken.append((start, end))
        places = sorted(order[start : end + 1])
        kept.append(
            SharedPrefix(
                lines=tuple(beginnings[n].line for n in places[:3]),
                prompts=len(places),
                tokens=beginnings[places[0]].tokens_of(blocks),
            )
        )
    return kept


def _intervals(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """The longest runs whose neighbours share at least so many blocks: (first, last, blocks)."""
    found: list[tuple[int, int, int]] = []
    open_: list[tuple[int, int]] = []  # where it began, blocks
    for place in range(len(common) + 1):
        blocks = common[place] if place < len(common) else 0
        start = place
        while open_ and open_[-1][1] > blocks:
            start, had = open_.pop()
            found.append((start, place, had))
        if blocks and (not open_ or open_[-1][1] < blocks):
            open_.append((start, blocks))
    return found
