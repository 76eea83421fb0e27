"""[compact]: leave out of prompts what changes nothing, so that it is not paid for.

Lossless has one meaning here: what is left says the same to whoever reads the text as CommonMark,
and every JSON value in it is the same value, down to the spelling of its numbers and strings.

- Spaces at the end of a line go; of two or more, which are a line break, two stay.
- Of several blank lines between paragraphs one stays.
- A text, or a block between blank lines, that is a JSON object or array loses the white space
  outside of its strings.

Left as they are: everything in and around code fences, indented code, HTML that keeps its spaces,
and diffs; the beginning and the end of each text, for there the model goes on; the text of
embeddings, for whom every character counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from promptfleet_shared.policies.section import Section

OPTION = "compact"
_MIN_BYTES = 64
"""A shorter text has nothing to give."""
_FENCE = re.compile(r"([ \t>*+\-.)0-9]*)(`{3,}|~{3,})([^\n]*)")
_TRAILING = re.compile(r"(?<=[^\s\\]) +$")
_FRAGILE = re.compile(r"<|\]\(|\]:")
"""Where white space at a line's end may be a part of something: tags, titles of links."""
_KEEPS_SPACES = re.compile(
    r"<(?:pre|script|style|textarea|!--|\?|!\[CDATA\[)|^(?:@@ |diff --git |--- |\+\+\+ )",
    re.IGNORECASE | re.MULTILINE,
)
_LONE_RETURN = re.compile(r"\r(?!\n)")
_BLANK = " \t\r"
_CONTAINER = re.compile(r"[ \t]*(?:[-+*>|#]|\d{1,9}[.)])")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s"]+', re.DOTALL)


class CompactSection(Section):
    """Whether prompts are compacted before they are sent.

    Attributes:
        enabled: True to do so for every job that does not say otherwise.
    """

    enabled: bool = False


def compact_request(request: str) -> str:
    """The stored request with its texts compacted; itself where nothing can be left out.

    Args:
        request: A JSON object with `messages` or `prompt`.
    """
    if len(request) < _MIN_BYTES:
        return request
    try:
        body: dict[str, Any] = orjson.loads(request)
        changed = _compact_body(body)
        if not changed:
            return request
        compacted = orjson.dumps(body).decode()
    except (orjson.JSONDecodeError, TypeError, ValueError):
        return request  # a request that can't be read and written alike is sent as it is
    return compacted if len(compacted) < len(request) else request


def _compact_body(body: dict[str, Any]) -> bool:
    changed = False
    for holder, field in _texts(body):
        text = holder[field]
        shorter = compact_text(text)
        if shorter != text:
            holder[field] = shorter
            changed = True
    return changed


def _texts(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the texts of a request are."""
    if isinstance(body.get("prompt"), str):
        yield body, "prompt"
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        if isinstance(content, str):
            yield message, "content"
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part, "text"


def compact_text(text: str) -> str:
    r"""The text without what changes nothing.

    Example:
        >>> compact_text("One.   \n\n\n\nTwo \nthree.")
        'One.\n\nTwo\nthree.'
        >>> compact_text('{ "a": [1.0,\n  2] }')
        '{"a":[1.0,2]}'
    """
    start = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    if start >= end:
        return text
    core = text[start:end]
    shorter = _minified(core)
    if shorter is None:
        if _KEEPS_SPACES.search(text) or _LONE_RETURN.search(text):
            return text
        # Its first line is judged with what stands before it: it may be indented.
        first = text[text.rfind("\n", 0, start) + 1 : start]
        shorter = _compact_lines(first + core)[len(first) :]
    return text[:start] + shorter + text[end:]


def _minified(text: str) -> str | None:
    """A JSON object or array without white space outside of its strings; None if it is none."""
    if text[:1] not in {"{", "["} or text[-1:] not in {"}", "]"}:
        return None
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    shorter = "".join(_JSON_TOKEN.findall(text))
    return shorter if _same(json.loads(shorter), value) else None


def _same(one: object, other: object) -> bool:
    """True for equal values; `repr` tells 1 from 1.0 and True."""
    return repr(one) == repr(other)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _compact_lines(text: str) -> str:
    """What is outside of code fences, line by line."""
    lines = text.split("\n")
    kept: list[str] = []
    block: list[str] = []
    opened: re.Match[str] | None = None
    for line in lines:
        mark = _FENCE.match(line)
        if opened is not None:
            kept.append(line)
            if mark is not None and _closes(mark, opened):
                opened = None
        elif mark is not None:
            kept += _compact_blocks(block)
            block = []
            kept.append(line)
            opened = mark
        else:
            block.append(line)
    return "\n".join(kept + _compact_blocks(block))


def _closes(mark: re.Match[str], opened: re.Match[str]) -> bool:
    """True if a line surely ends a code fence; one that is overlooked does no harm."""
    if not mark[2].startswith(opened[2]) or mark[3].strip():
        return False
    before, at_begin = mark[1], opened[1]
    if not at_begin.strip(" "):
        return not before.strip(" ") and len(before) <= 3 and len(at_begin) <= 3  # noqa: PLR2004 - CommonMark's
    return before == re.sub(r"[^ >]", " ", at_begin)


def _compact_blocks(lines: list[str]) -> list[str]:
    """Lines without a code fence among them."""
    kept: list[str] = []
    number = 0
    while number < len(lines):
        end = number
        while end < len(lines) and lines[end].strip(_BLANK):
            end += 1
        kept += _compact_block(lines[number:end])
        number = end
        while end < len(lines) and not lines[end].strip(_BLANK):
            end += 1
        kept += _blank_lines(lines, number, end)
        number = end
    return kept


def _compact_block(block: list[str]) -> list[str]:
    """Lines between blank ones."""
    if len(block) > 1:
        minified = _minified("\n".join(block).rstrip(_BLANK))
        if minified is not None:
            return [minified]
    whole = "\n".join(block)
    if " \n" not in f"{whole}\n" or _FRAGILE.search(whole) or "`" in whole:
        return block
    last = len(block) - 1
    return [_without_trailing(line, is_last=n == last) for n, line in enumerate(block)]


def _without_trailing(line: str, *, is_last: bool) -> str:
    if not line.endswith(" ") or _is_indented(line):
        return line
    return _TRAILING.sub(lambda found: "  " if len(found[0]) > 1 and not is_last else "", line)


def _blank_lines(lines: list[str], start: int, end: int) -> list[str]:
    """One of several, where no indented code can be near and this is no edge of the text."""
    blank = lines[start:end]
    # At an edge, what is beyond it is not known: a code fence, or the end of the text.
    is_inside = start > 0 and end < len(lines)
    if len(blank) < 2 or not is_inside:  # noqa: PLR2004
        return blank
    if _is_indented(lines[start - 1]) or _is_indented(lines[end]):
        return blank
    return [""]


def _is_indented(line: str) -> bool:
    """True for what may be indented code, also within a list or a quotation."""
    body = _CONTAINER.sub("", line, count=1) if _CONTAINER.match(line) else line
    return body.startswith((" " * 4, "\t", "  \t")) or line.startswith((" " * 4, "\t"))
