"""What a line of an input file means: our own forms, OpenAI's batch files and MT-Bench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from promptfleet_shared.errors import InvalidRequestError

MAX_LINE_BYTES = 16 * 1024 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ID_FIELDS = ("custom_id", "id", "question_id")

# https://platform.openai.com/docs/guides/batch: what is asked for, and under which name.
_OPENAI_INPUTS: Mapping[str, tuple[str, str]] = {
    "/v1/chat/completions": ("chat", "messages"),
    "/v1/completions": ("completion", "prompt"),
    "/v1/embeddings": ("embedding", "input"),
}
_OPENAI_NAMES: Mapping[str, str] = {"max_completion_tokens": "max_tokens"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RawLine:
    """A line as it stands in the file; `content` is None where it is too long to be read."""

    number: int
    content: bytes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLine:
    """A line that asks for something.

    Attributes:
        number: Counted from 1, blank lines included.
        item: `prompt` or `messages`, and options, as `enqueue_prompts` takes them.
        custom_id: The line's own name for itself, given back with the result.
        openai: True for a line of an OpenAI batch file, which is answered in its form.
    """

    number: int
    item: dict[str, Any]
    custom_id: str | int | None = None
    openai: bool = False


def read_lines(file: BinaryIO) -> Iterator[RawLine]:
    """The lines that are not blank, however long the file is."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        content: bytes | None = line
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            content = None
        elif number == 1:
            content = line.removeprefix(_BYTE_ORDER_MARK)
        if content is None or content.strip():
            yield RawLine(number=number, content=content)


def parse_line(line: RawLine, *, keep_model: bool) -> PromptLine:
    """What the line asks for; the options' values are checked when it is enqueued.

    Args:
        line: From `read_lines`.
        keep_model: False to leave out an OpenAI batch line's model, so that a tier chooses.

    Raises:
        InvalidRequestError: It is none of the known forms; says why, without its content.
    """
    if line.content is None:
        raise InvalidRequestError(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        value = orjson.loads(line.content)
    except orjson.JSONDecodeError as error:
        place = f"{error.msg} at column {error.colno}"
        raise InvalidRequestError(f"not JSON: {place}") from None
    if isinstance(value, str):
        return PromptLine(number=line.number, item={"prompt": value})
    if not isinstance(value, dict):
        raise InvalidRequestError("must be a JSON string or object")
    custom_id = _take_id(value)
    if "body" in value:
        item = _openai_item(value, keep_model=keep_model)
        return PromptLine(number=line.number, item=item, custom_id=custom_id, openai=True)
    if "turns" in value:
        return PromptLine(number=line.number, item=_mt_bench_item(value), custom_id=custom_id)
    return PromptLine(number=line.number, item=value, custom_id=custom_id)


def _take_id(value: dict[str, Any]) -> str | int | None:
    """Take the first of the id fields that there is out of the object."""
    for field in _ID_FIELDS:
        if field in value:
            taken = value.pop(field)
            if taken is not None and (not isinstance(taken, str | int) or taken is True):
                raise InvalidRequestError(f"{field}: must be a string or a whole number")
            return taken
    return None


def _openai_item(value: Mapping[str, Any], *, keep_model: bool) -> dict[str, Any]:
    body, url = value["body"], value.get("url", "/v1/chat/completions")
    if not isinstance(body, dict):
        raise InvalidRequestError("body: must be an object")
    if not isinstance(url, str) or url not in _OPENAI_INPUTS:
        raise InvalidRequestError(f"url: must be one of {', '.join(_OPENAI_INPUTS)}")
    if value.get("method", "POST") != "POST":
        raise InvalidRequestError("method: must be POST")
    kind, name = _OPENAI_INPUTS[url]
    if name not in body:
        raise InvalidRequestError(f"body.{name}: is missing")
    item: dict[str, Any] = {}
    for key, part in body.items():
        if key != name:
            item[_OPENAI_NAMES.get(key, key)] = part
    if not keep_model:
        item.pop("model", None)
    if item.pop("stream", None):
        raise InvalidRequestError("body.stream: a batch does not stream")
    return {"messages" if kind == "chat" else "prompt": body[name], "kind": kind, **item}


def _mt_bench_item(value: Mapping[str, Any]) -> dict[str, Any]:
    """The first turn: the second one needs the first one's answer."""
    turns = value["turns"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise InvalidRequestError("turns: must be a list of strings with at least one")
    item: dict[str, Any] = {"prompt": turns[0]}
    if isinstance(value.get("category"), str):
        item["metadata"] = {"category": value["category"]}
    return item
