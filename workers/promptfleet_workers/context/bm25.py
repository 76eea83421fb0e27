"""How much texts have to do with a question, by the words they share: Okapi BM25.

Our own thirty lines: the packages that do this bring numpy along, and are made for corpora that are
indexed once and asked often; here each chat is asked once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K1 = 1.5
B = 0.75
_WORD = re.compile(r"\w+")


def scores(question: str, texts: Sequence[str]) -> list[float]:
    """The score of each text, from 0.

    Formula of Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond"
    (2009), with Lucene's idf, which is never negative.

    Example:
        >>> [s > 0 for s in scores("a red car", ["the car is red", "tea"])]
        [True, False]
    """
    wanted = set(_words(question))
    counted = [Counter(_words(text)) for text in texts]
    lengths = [count.total() for count in counted]
    mean = sum(lengths) / len(texts) if texts else 0.0
    known = Counter(word for count in counted for word in count if word in wanted)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in known.items()}
    return [
        sum(
            idf[word] * n * (K1 + 1) / (n + K1 * (1 - B + B * length / mean))
            for word, n in count.items()
            if word in idf
        )
        for count, length in zip(counted, lengths, strict=True)
    ]


def cosines(question: Sequence[float], vectors: Sequence[Sequence[float] | None]) -> list[float]:
    """The cosine of each vector with the question's; 0 for one that is missing or has no length."""
    norm = math.hypot(*question)
    found = []
    for vector in vectors:
        length = 0.0 if vector is None or len(vector) != len(question) else math.hypot(*vector)
        if vector is None or not length or not norm:
            found.append(0.0)
        else:
            product = sum(a * b for a, b in zip(question, vector, strict=True))
            found.append(product / (length * norm))
    return found


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
