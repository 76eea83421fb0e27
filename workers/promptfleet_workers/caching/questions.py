"""Which prompts may be compared by meaning, and which of them with each other."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

import orjson

from promptfleet_shared.jobs import CacheMode, JobKind
from promptfleet_workers.caching.keys import canonical_body
from promptfleet_workers.work import Work

BUCKET_PREFIX = "promptfleet:cache:semantic:"
MAX_CHARS = 8_000
"""A longer prompt is more than a question; and embedding models cut their input."""
_SYSTEM_ROLES = frozenset({"system", "developer"})
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_QUOTED = re.compile(r'"([^"\n]{1,200})"|“([^”\n]{1,200})”|`([^`\n]{1,200})`')
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")
_SENTENCE = re.compile(r"[.!?:\n]+\s*")
_NEGATIONS = frozenset(
    {"not", "no", "never", "none", "neither", "nor", "without", "except", "unless", "cannot"}
    | {"nicht", "kein", "keine", "keinen", "keiner", "nie", "ohne", "außer"}
    | {"non", "pas", "jamais", "sans", "aucun", "ni", "sin", "nunca", "ningún", "senza", "mai"}
)


class Question(NamedTuple):
    """A prompt that others may mean the same with.

    Attributes:
        bucket: Names all that must be equal.
        text: What is compared by meaning.
    """

    bucket: str
    text: str


def question_of(work: Work, *, namespace: str, embedding_model: str) -> Question | None:
    """The question of a work that may be answered by meaning; None for all others.

    That is: a chat that may use the cache, without stream and tools, of one user message that is
    text, after system messages. The latter must be equal, and so must all parameters.
    """
    job = work.job
    if job.kind is not JobKind.CHAT or job.stream or job.cache.mode is not CacheMode.USE:
        return None
    body = orjson.loads(work.request)
    if "tools" in body or work.key_model is None:
        return None
    *system, last = body.pop("messages")
    text = last.get("content")
    if last.get("role") != "user" or not isinstance(text, str) or not text.strip():
        return None
    if len(last) > 2 or len(text) > MAX_CHARS:  # noqa: PLR2004 - its role and its content
        return None
    if any(message.get("role") not in _SYSTEM_ROLES for message in system):
        return None
    facts = [namespace, job.tenant, work.key_model, embedding_model, must_agree(text), system]
    return Question(_bucket(facts, body), text)


def must_agree(text: str) -> list[Any]:
    """What two prompts must have in common, however alike they are: what embeddings blur.

    Numbers, quoted text, names (words with a capital within a sentence), and how often something
    is negated. "Is it legal?" and "Is it not legal?" are neighbours for any embedding.

    Example:
        >>> must_agree('Why did Ada Lovelace not finish "Note G" in 1843?')
        [['1843'], ['note g'], ['ada', 'g', 'lovelace', 'note'], 1]
    """
    numbers = sorted(_NUMBER.findall(text))
    quoted = sorted("".join(groups).casefold() for groups in _QUOTED.findall(text))
    names: set[str] = set()
    negations = 0
    for sentence in _SENTENCE.split(text):
        for n, word in enumerate(_WORD.findall(sentence)):
            lower = word.casefold()
            negations += lower in _NEGATIONS or lower.endswith(("n't", "n\u2019t"))
            if _is_name(word, first=n == 0):
                names.add(lower)
    return [numbers, quoted, sorted(names), negations]


def _is_name(word: str, *, first: bool) -> bool:
    if any(char.isupper() for char in word[1:]):
        return True  # NASA, iPhone
    return not first and word[:1].isupper() and word.partition("'")[0] != "I"


def _bucket(facts: list[Any], parameters: dict[str, Any]) -> str:
    body = orjson.dumps(canonical_body(parameters), option=orjson.OPT_SORT_KEYS)
    digest = hashlib.sha256(orjson.dumps(facts) + b"\0" + body)
    return BUCKET_PREFIX + digest.hexdigest()
