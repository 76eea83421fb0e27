"""Prompts that are asked twice, or nearly so, and paragraphs that are sent again and again."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zlib
from collections.abc import Iterator

MIN_PARAGRAPH = 80
"""Characters of a paragraph that is worth looking at."""
MAX_PARAGRAPHS = 200_000
"""Different paragraphs that are remembered; then those go that came once."""
MIN_BOILERPLATE = 10
"""Prompts that a paragraph has to be in to count as boilerplate."""
BINS = 16
ROWS = 4
ALIKE_BINS = 13
"""Of 16: texts that share about nine in ten of their word triples."""
MAX_WORDS = 400
MIN_WORDS = 8
_BREAK = re.compile(r"\n[ \t\r]*\n")
_WORD = re.compile(r"\w+")
_DIGITS = re.compile(r"\d+")
_EMPTY = 2**32 - 1


@dataclasses.dataclass(slots=True)
class Paragraph:
    """A paragraph of several prompts.

    Attributes:
        line: Where it came first.
        offsets: The first and the last place, in characters, where prompts had it.
    """

    line: int
    chars: int
    prompts: int = 1
    offsets: tuple[int, int] = (0, 0)

    @property
    def moves(self) -> bool:
        """True if it is not always at the same place: then no prefix cache can know it."""
        return self.offsets[0] != self.offsets[1]


class Paragraphs:
    """Counts paragraphs, over all prompts and within each."""

    def __init__(self) -> None:
        """Know none."""
        self._known: dict[bytes, Paragraph] = {}
        self.repeated_chars = 0
        self.prompts_with_repeats = 0

    def add(self, text: str, line: int) -> int:
        """Look at a prompt's text; returns the characters of paragraphs that it has twice."""
        seen: set[bytes] = set()
        repeated = 0
        for offset, paragraph in _paragraphs(text):
            digest = hashlib.blake2b(
                paragraph.encode("utf-8", "surrogatepass"), digest_size=12
            ).digest()
            if digest in seen:
                repeated += len(paragraph)
                continue
            seen.add(digest)
            self._count(digest, len(paragraph), line, offset)
        self.repeated_chars += repeated
        self.prompts_with_repeats += repeated > 0
        return repeated

    def boilerplate(self) -> list[Paragraph]:
        """What is in many prompts, the most characters first."""
        found = [p for p in self._known.values() if p.prompts >= MIN_BOILERPLATE]
        return sorted(found, key=lambda p: p.prompts * p.chars, reverse=True)

    def _count(self, digest: bytes, chars: int, line: int, offset: int) -> None:
        known = self._known.get(digest)
        if known is not None:
            known.prompts += 1
            first, last = known.offsets
            known.offsets = (min(first, offset), max(last, offset))
            return
        if len(self._known) >= MAX_PARAGRAPHS:
            self._known = {d: p for d, p in self._known.items() if p.prompts > 1}
        self._known[digest] = Paragraph(line=line, chars=chars, offsets=(offset, offset))


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for found in _BREAK.finditer(text):
        if found.start() - start >= MIN_PARAGRAPH:
            yield start, text[start : found.start()]
        start = found.end()
    if len(text) - start >= MIN_PARAGRAPH:
        yield start, text[start:]


class Duplicates:
    """Finds equal requests, and texts that are nearly equal."""

    def __init__(self) -> None:
        """Know none."""
        self._exact: dict[bytes, int] = {}
        self._same_words: dict[bytes, int] = {}
        self._bands: list[dict[tuple[int, ...], int]] = [{} for _ in range(0, BINS, ROWS)]
        self._sketches: dict[int, tuple[int, ...]] = {}
        self.exact = 0
        self.near: list[tuple[int, int]] = []
        self.near_count = 0

    def is_repeated(self, facts: bytes, line: int) -> bool:
        """True for a request that came before; `facts` is all that makes it that request."""
        digest = hashlib.blake2b(facts, digest_size=16).digest()
        if digest in self._exact:
            self.exact += 1
            return True
        self._exact[digest] = line
        return False

    def is_alike(self, text: str, line: int) -> bool:
        """True for a text that is nearly one before it; to be asked for no exact repetition."""
        words = _WORD.findall(_DIGITS.sub("0", text[: MAX_WORDS * 16].casefold()))[:MAX_WORDS]
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        if len(text) <= MAX_WORDS * 16 and len(words) < MAX_WORDS:
            same = self._same_words.setdefault(digest, line)
            if same != line and words:
                return self._note(same, line)
        if len(words) < MIN_WORDS:
            return False
        sketch = _sketch(words)
        keys = [sketch[start : start + ROWS] for start in range(0, BINS, ROWS)]
        for band, key in zip(self._bands, keys, strict=True):
            other = band.get(key)
            if other is not None and _alike(self._sketches[other], sketch):
                return self._note(other, line)
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, line)
        self._sketches[line] = sketch
        return False

    def _note(self, one: int, other: int) -> bool:
        self.near_count += 1
        if len(self.near) < 5:  # noqa: PLR2004 - examples
            self.near.append((one, other))
        return True


def _sketch(words: list[str]) -> tuple[int, ...]:
    """One-permutation MinHash of word triples: the smallest hash in each of the bins.

    Li, Owen and Zhang, "One Permutation Hashing", NIPS 2012, https://arxiv.org/abs/1208.1259.
    """
    least = [_EMPTY] * BINS
    for triple in zip(words, words[1:], words[2:], strict=False):
        value = zlib.crc32(" ".join(triple).encode())
        place = value % BINS
        least[place] = min(least[place], value)
    return tuple(least)


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    filled = [(a, b) for a, b in zip(one, other, strict=True) if not a == b == _EMPTY]
    equal = sum(a == b for a, b in filled)
    return equal * BINS >= ALIKE_BINS * len(filled)
