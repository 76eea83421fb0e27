"""What is answered: a pure function of the request, the same in every API's shape."""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from .markers import Directive, read_markers, without_markers
from .options import Options

_PREAMBLE = ["Simulated", "answer", "to:"]
_ECHOED_CHARS = 4000
_MAX_CHOICES = 128
_BLANK = "\x00"
_BLANK_JSON = orjson.dumps(_BLANK)
_PIECES = re.compile(r"\s*\S+(?:\s+$)?")

Body = Mapping[str, Any]


class Rejected(Exception):  # noqa: N818 - a reply, not a programming error
    """The request gets an error reply: its HTTP status and the fields of OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_ms: int | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_ms = retry_after_ms
        self.limit = limit


# These three are made for every request: not frozen, which would double their cost.
@dataclass(slots=True)
class Prompt:
    """One prompt of a request; `digest` is the SHA-256 that `prompt_hash` shows in hex."""

    text: str
    digest: bytes
    directive: Directive | None

    @property
    def tokens(self) -> int:
        """Prompt tokens: a quarter of its characters, rounded up."""
        return (len(self.text) + 3) // 4


@dataclass(slots=True)
class Answer:
    """One choice; its tokens are its words."""

    text: str
    tokens: int
    finish: str | None  # OpenAI's word: stop, length, ...; None for an answer that is cut


@dataclass(slots=True, kw_only=True)
class Call:
    """A valid request with its answers, ready to be put in an API's shape."""

    number: int
    model: str
    prompts: list[Prompt]
    answers: list[Answer] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    dimensions: int = 0
    base64: bool = False
    input_tokens: int = field(init=False, default=0)  # of all prompts
    output_tokens: int = field(init=False, default=0)  # of all answers

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            self.input_tokens += prompt.tokens
        for answer in self.answers:
            self.output_tokens += answer.tokens


def prompt_hash(prompt: object) -> str:
    """The key of a prompt in /stats: SHA-256 hex of its JSON, keys sorted, no spaces.

    `prompt` is a request's `messages`, or one entry of its `prompt` or `input`.
    """
    return _digest(prompt).hex()


def read_prompt(value: object, text: str, param: str) -> Prompt:
    """A prompt and what its markers ask for; Rejected for a marker that means nothing."""
    try:
        return Prompt(text, _digest(value), read_markers(text))
    except (ValueError, orjson.JSONEncodeError) as error:
        raise Rejected(400, str(error), param=param) from None


def read_messages(body: Body) -> list[Any]:
    """The `messages` of a chat request; Rejected unless a non-empty list of objects."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Rejected(400, "'messages' must be a non-empty list.", param="messages")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise Rejected(400, "A message must be an object with a role.", param="messages")
    return messages


def text_of(content: object) -> str:
    """The text of a message's content: itself, or of its text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def read_texts(body: Body, param: str) -> list[str]:
    """`param` as a list of texts, whether the request has one or many."""
    value = body.get(param)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in texts):
        raise Rejected(400, f"'{param}' must be a text or a list of texts.", param=param)
    return texts


def read_count(body: Body, param: str, *, most: int | None = None) -> int | None:
    """A whole number of at least 1, or None when it is absent or null."""
    value = body.get(param)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Rejected(400, f"'{param}' must be a whole number of at least 1.", param=param)
    if most is not None and value > most:
        raise Rejected(400, f"'{param}' must be at most {most}.", param=param)
    return value


def read_model(body: Body) -> str:
    """The name of the model; Rejected when it is missing."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise Rejected(400, "you must provide a model parameter", param="model")
    return model


def answers_to(
    prompts: list[Prompt], body: Body, limit: int | None, options: Options
) -> list[Answer]:
    """`n` answers to each prompt, none longer than `limit` tokens."""
    choices = read_count(body, "n", most=_MAX_CHOICES) or 1
    form = body.get("response_format")
    as_json = isinstance(form, dict) and form.get("type") in ("json_object", "json_schema")
    answers: list[Answer] = []
    for prompt in prompts:
        answers += [_answer(prompt, limit, options, as_json=as_json)] * choices
    return answers


def pieces_of(text: str) -> list[str]:
    """`text` cut for streaming, a piece a word; joined they are the text."""
    return _PIECES.findall(text) or ([text] if text else [])


def token_events(text: str, event_of: Callable[[str], bytes]) -> list[bytes]:
    """`event_of` for each piece of `text`, encoded once and filled in for the others."""
    head, _, tail = event_of(_BLANK).rpartition(_BLANK_JSON)
    return [head + orjson.dumps(piece) + tail for piece in pieces_of(text)]


def embedding_of(text: str, dimensions: int) -> array[float]:
    """A unit vector of 32-bit floats that only `text` decides."""
    raw = array("h")
    raw.frombytes(hashlib.shake_256(text.encode()).digest(dimensions * raw.itemsize))
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return array("f", (value / norm for value in raw))


def _digest(value: object) -> bytes:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).digest()


def _answer(prompt: Prompt, limit: int | None, options: Options, *, as_json: bool) -> Answer:
    directive = prompt.directive
    if directive is not None and directive.text is not None:
        text = directive.text
    else:
        length = options.output_tokens
        if directive is not None and directive.output_tokens is not None:
            length = directive.output_tokens
        text = _echo(without_markers(prompt.text), length)
        if as_json:
            text = orjson.dumps({"answer": text}).decode()
    words = text.split()
    finish = "stop"
    if limit is not None and len(words) > limit:
        words = words[:limit]
        text = " ".join(words)
        finish = "length"
    if directive is not None and directive.finish is not None:
        finish = directive.finish
    return Answer(text, len(words), finish)


def _echo(text: str, length: int) -> str:
    words = _PREAMBLE + text[:_ECHOED_CHARS].split()
    if len(words) < length:
        words *= -(-length // len(words))
    return " ".join(words[:length])
