"""How hard a prompt is, from 1 to 10, by what it looks like: pure, and quick for any length.

It reads the length, the structure, words that ask for reasoning, code, mathematics and the scripts
of several languages. It is a guess about how much model a prompt needs, no measure of truth: see
docs/howto/choose-tiers-automatically.md for what it can't see.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from promptfleet_shared.policies.complexity_words import CODE, CREATIVITY, REASONING, SIMPLE

LOWEST, HIGHEST = 1.0, 10.0
HEAD_CHARS, TAIL_CHARS = 4_000, 2_000
"""What is read of a long text: instructions stand at its begin or its end."""
_SHORT_CHARS = 240
_MANY_TURNS = 2
_MAX_PARTS = 64
_USUAL_TOKENS = 24


class _Markers(NamedTuple):
    all: tuple[str, ...]
    ascii: tuple[str, ...]


def _markers(words: Iterable[str]) -> _Markers:
    unique = tuple(dict.fromkeys(words))
    return _Markers(all=unique, ascii=tuple(word for word in unique if word.isascii()))


_REASONING, _CREATIVITY = _markers(REASONING), _markers(CREATIVITY)
_CODE, _SIMPLE = _markers(CODE), _markers(SIMPLE)

_NOT_WORDS = re.compile(r"[\W_]+")
_ITEMS = re.compile(r"^[ \t]{0,16}(?:[-*•]|\d{1,2}[.)]|\(?[a-h]\))[ \t]", re.MULTILINE)
_QUESTIONS = re.compile("[?？؟;՞]+")  # noqa: RUF001 - the question marks of several scripts
_CODE_FORMS = re.compile(
    r"```|^[ \t]{0,16}"
    r"(?:def |class |import |from \w+ import|#include|function |public |SELECT |<\w+ )"
    r"|[{};]$|\w\(\w{0,32}\)|=>|==|!=",
    re.MULTILINE,
)
_MATH_FORMS = re.compile(
    r"\\(?:frac|sum|int|sqrt|begin)|[∑∫√≤≥≠∈∀∃∂π±]|\d\s*[-+*/^=×÷]\s*[\dxyzn(]|[xyzn]\s*[=^]|\bf\(x"  # noqa: RUF001 - mathematics
)
_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_SCRIPTS = {
    "latin": re.compile("[A-Za-z\u00c0-\u024f]{2}"),
    "cyrillic": re.compile("[\u0400-\u04ff]{2}"),
    "greek": re.compile("[\u0370-\u03ff]{2}"),
    "arabic": re.compile("[\u0600-\u06ff]{2}"),
    "hebrew": re.compile("[\u0590-\u05ff]{2}"),
    "indic": re.compile("[\u0900-\u0dff]{2}"),
    "thai": re.compile("[\u0e00-\u0e7f]{2}"),
    "kana": re.compile("[\u3040-\u30ff]"),
    "han": re.compile("[\u3400-\u9fff]"),
    "hangul": re.compile("[\uac00-\ud7af]"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptFacts:
    """What a scorer is given of a request.

    Attributes:
        text: The last user message (a completion's prompt, an embedding's input).
        chars: Characters of all messages together.
        turns: Messages of users.
        has_tools: True if the model may call functions.
        has_schema: True if the answer must follow a JSON schema.
        has_media: True if there is an image, a sound or a file.
        attributes: What the caller said of the prompt, e.g. `{"needs_reasoning": True}`.
    """

    text: str
    chars: int
    turns: int = 1
    has_tools: bool = False
    has_schema: bool = False
    has_media: bool = False
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How hard a prompt looks.

    Attributes:
        score: From 1 to 10, to one decimal.
        reasons: What added (or took) how many points, in the order in which it was looked for.
        needs_reasoning: True if it asks for thought: reasons, proofs, numbers, comparisons, code.
        needs_creativity: True if it asks for something to be made up.
        is_simple_query: True if it is short and asks for something to be looked up or rewritten.
    """

    score: float
    reasons: Mapping[str, float]
    needs_reasoning: bool
    needs_creativity: bool
    is_simple_query: bool


def prompt_facts(request: Mapping[str, Any], attributes: Mapping[str, Any]) -> PromptFacts:
    """What there is to know of a request.

    Args:
        request: The job's part of the provider's body: `messages`, `prompt` or `input`.
        attributes: What the caller said of it.
    """
    messages = request.get("messages")
    chars, turns, last, has_media = 0, 0, "", False
    if isinstance(messages, list):
        for message in messages:
            text, media = _content(message)
            chars += len(text)
            has_media |= media
            if isinstance(message, Mapping) and message.get("role") == "user":
                turns += 1
                last = text or last
    else:
        last = _text_of(request.get("prompt", request.get("input")))
        chars, turns = len(last), 1
    shape = request.get("response_format")
    return PromptFacts(
        text=last,
        chars=chars,
        turns=turns,
        has_tools=bool(request.get("tools")),
        has_schema=isinstance(shape, Mapping) and shape.get("type") == "json_schema",
        has_media=has_media,
        attributes=attributes,
    )


def estimate_complexity(facts: PromptFacts) -> Estimate:
    """The rules' guess; the same for the same facts, and under a millisecond for usual prompts.

    Example:
        >>> facts = PromptFacts(text="What is the capital of France?", chars=30)
        >>> estimate = estimate_complexity(facts)
        >>> estimate.score, estimate.is_simple_query
        (1.0, True)
    """
    text = _read_part(facts.text)
    words = f" {_NOT_WORDS.sub(' ', text.lower())} "
    reasoning = _count(words, _REASONING)
    creativity = _count(words, _CREATIVITY)
    code = _count(words, _CODE) + 2 * len(_some(_CODE_FORMS, text))
    maths = len(_some(_MATH_FORMS, text))
    numbers = len(_some(_NUMBERS, text))
    is_short = facts.chars <= _SHORT_CHARS
    is_simple = is_short and _count(words, _SIMPLE) > 0 and not (reasoning or maths or code > 1)
    points = {
        "length": _length_points(facts.chars, text),
        "reasoning": min(4.0, 2.0 + 0.75 * (reasoning - 1)) if reasoning else 0.0,
        "code": min(3.0, 0.75 + 0.75 * code) if code else 0.0,
        "mathematics": min(3.0, 1.5 + 0.5 * maths) if maths else 0.0,
        "numbers": min(1.5, 0.5 * (numbers - 1)) if numbers > 1 else 0.0,
        "creativity": 1.5 if creativity else 0.0,
        "structure": _structure_points(text),
        "languages": 0.75 if _scripts(text) > 1 else 0.0,
        "conversation": min(1.0, 0.25 * (facts.turns - _MANY_TURNS + 1))
        if facts.turns > 1
        else 0.0,
        "output_form": 0.5 if facts.has_schema else 0.0,
        "tools": 1.0 if facts.has_tools else 0.0,
        "media": 1.0 if facts.has_media else 0.0,
        "simple_query": -1.0 if is_simple else 0.0,
    }
    score = min(HIGHEST, max(LOWEST, LOWEST + sum(points.values())))
    return Estimate(
        score=round(score, 1),
        reasons={name: round(value, 2) for name, value in points.items() if value},
        needs_reasoning=bool(reasoning or maths or code > 1),
        needs_creativity=bool(creativity),
        is_simple_query=is_simple,
    )


def _read_part(text: str) -> str:
    if len(text) <= HEAD_CHARS + TAIL_CHARS:
        return text
    return f"{text[:HEAD_CHARS]}\n{text[-TAIL_CHARS:]}"


def _count(words: str, markers: _Markers) -> int:
    """How many of the markers there are; text in ASCII needs no look for the others."""
    looked_for = markers.ascii if words.isascii() else markers.all
    return sum([marker in words for marker in looked_for])  # a list: twice as fast


def _some(pattern: re.Pattern[str], text: str) -> Sequence[None]:
    """A place holder for each match, up to a bound."""
    found: list[None] = []
    for _ in pattern.finditer(text):
        found.append(None)
        if len(found) == _MAX_PARTS:
            break
    return found


def _length_points(chars: int, text: str) -> float:
    """Half a point for each doubling beyond a usual question."""
    wide = len(_WIDE.findall(text)) / len(text) if text else 0.0
    tokens = chars * (wide + (1 - wide) / 4)  # about one a Chinese character, one for 4 others
    if tokens <= _USUAL_TOKENS:
        return 0.0
    return min(3.0, 0.5 * math.log2(tokens / _USUAL_TOKENS))


def _structure_points(text: str) -> float:
    """Several things to do are harder than one."""
    items = len(_some(_ITEMS, text))
    questions = len(_some(_QUESTIONS, text))
    return min(1.5, 0.25 * items) + min(1.0, 0.5 * max(0, questions - 1))


def _scripts(text: str) -> int:
    found = {name for name, pattern in _SCRIPTS.items() if pattern.search(text)}
    if "kana" in found:  # Japanese is written in both
        found.discard("han")
    return len(found)


def _content(message: object) -> tuple[str, bool]:
    """A message's text, and whether there is more to it."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return _text_of(content), False
    texts = [_text_of(part.get("text")) for part in content if isinstance(part, Mapping)]
    has_media = any(isinstance(part, Mapping) and "text" not in part for part in content)
    return "\n".join(text for text in texts if text), has_media


def _text_of(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(item for item in value if isinstance(item, str))
    return ""
