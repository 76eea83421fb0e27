"""Streams of chats and completions: chunks in OpenAI's shapes, made of a job's tokens."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import orjson
from starlette.responses import Response

from promptfleet.api.errors import api_error
from promptfleet.api.openai.answering import (
    Accepted,
    Asked,
    accept,
    job_of,
    response_headers,
    told_of,
)
from promptfleet.api.openai.answers import openai_answer, usage_of
from promptfleet.api.openai.failures import failure
from promptfleet.api.openai.following import HOLD_S, Begun, News, follow, may_be_replaced
from promptfleet.api.openai.options import cancels_on_disconnect
from promptfleet.api.sse import EventStreamResponse, sse_event
from promptfleet.options import refuse
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.jobs import JobKind, JobSpec, Result

DONE = b"data: [DONE]\n\n"
Frames = Callable[[Asked, Accepted, Begun], AsyncIterator[bytes]]
Json = dict[str, Any]


async def stream_answer(asked: Asked) -> Response:
    """Accept the request's job and stream its answer as chunks.

    Raises:
        As `answering.answer`: of what goes wrong before the first token, but not for long.
    """
    options = asked.body.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        refuse("stream_options", "an object", options)
    return await stream_frames(asked, job_of(asked, stream=True), _frames)


async def stream_frames(asked: Asked, spec: JobSpec, frames: Frames) -> Response:
    """Accept a job and stream what `frames` makes of its news.

    Raises:
        As `stream_answer`.
    """
    with contextlib.ExitStack() as room:
        room.enter_context(asked.services.limits.waiting.taken(asked.tenant))
        accepted = await accept(asked, spec)
        whole = may_be_replaced(spec, asked.services.fleet)
        news = Begun(follow(asked, accepted, whole=whole))
        try:
            with told_of(accepted):
                first = await news.first(HOLD_S)
                _check(first)
        except BaseException:
            await news.aclose()
            raise
        leave = functools.partial(asked.services.streams.cancel_soon, asked.tenant, accepted.id)
        return EventStreamResponse(
            frames(asked, accepted, news),
            keep_alive_s=asked.services.settings.api_keep_alive_s,
            room=_held(room.pop_all()),
            on_left=leave if cancels_on_disconnect(asked.request) else None,
            headers={**accepted.headers, **response_headers(asked)},
        )


def _check(news: News | None) -> None:
    if isinstance(news, Result) and not news.succeeded:
        raise failure(news)


@contextlib.contextmanager
def _held(room: contextlib.ExitStack) -> Iterator[None]:
    with room:
        yield


def error_frame(error: PromptFleetError) -> bytes:
    """An error where it is too late for a status: OpenAI's client raises it."""
    return sse_event({"error": api_error(error).body})


async def _frames(asked: Asked, accepted: Accepted, news: Begun) -> AsyncIterator[bytes]:
    chunks = _Chunks(asked, accepted)
    try:
        async with contextlib.aclosing(news):
            if asked.kind is JobKind.CHAT:
                yield chunks.opening()
            async for item in news:
                if isinstance(item, str):
                    yield chunks.text(item)
                elif not item.succeeded:
                    raise failure(item)
                else:
                    yield b"".join(chunks.closing(item)) + DONE
    except PromptFleetError as error:
        yield error_frame(error)


class _Chunks:
    """Makes chunks that are alike but for their choice."""

    def __init__(self, asked: Asked, accepted: Accepted) -> None:
        self._asked = asked
        self._is_chat = asked.kind is JobKind.CHAT
        options = asked.body.get("stream_options") or {}
        self._with_usage = options.get("include_usage") is True
        prefix, kind = ("cmpl", "text_completion")
        if self._is_chat:
            prefix, kind = "chatcmpl", "chat.completion.chunk"
        self._head = {
            "id": f"{prefix}-{accepted.id.hex}",
            "object": kind,
            "created": int(time.time()),
            "model": asked.model,
        }
        before, after = _around(self._chunk([self._text_choice(_BLANK)]))
        self._before, self._after = before, after

    def opening(self) -> bytes:
        return self._delta({"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        return self._before + orjson.dumps(text) + self._after

    def closing(self, result: Result) -> list[bytes]:
        """What comes after the text: the rest of the message, why it ended, what it took."""
        answer = openai_answer(result, self._asked.kind, self._asked.model)
        choice = _first_choice(answer)
        frames = []
        if self._is_chat:
            if rest := _rest_of(choice.get("message")):
                frames.append(self._delta(rest))
            last: Json = {"index": 0, "delta": {}}
        else:
            last = {"index": 0, "text": ""}
        last["logprobs"] = choice.get("logprobs")
        last["finish_reason"] = choice.get("finish_reason") or "stop"
        frames.append(self._chunk([last]))
        if self._with_usage:
            frames.append(sse_event({**self._head, "choices": [], "usage": usage_of(result)}))
        return frames

    def _text_choice(self, text: str) -> Json:
        rest: Json = {"logprobs": None, "finish_reason": None}
        if self._is_chat:
            return {"index": 0, "delta": {"content": text}, **rest}
        return {"index": 0, "text": text, **rest}

    def _delta(self, delta: Json) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([choice])

    def _chunk(self, choices: list[Json]) -> bytes:
        usage = {"usage": None} if self._with_usage else {}
        return sse_event({**self._head, "choices": choices, **usage})


_BLANK = "\0"


def _around(frame: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the text of a chunk: encoded once for all of them."""
    before, _, after = frame.rpartition(orjson.dumps(_BLANK))
    return before, after


def _first_choice(answer: Json) -> Json:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _rest_of(message: Any) -> Json:
    """What a message has besides its text: tool calls, numbered as deltas are, and the like."""
    if not isinstance(message, Mapping):
        return {}
    rest = {
        name: value
        for name, value in message.items()
        if name not in {"role", "content"} and value is not None and value != []
    }
    calls = rest.get("tool_calls")
    if isinstance(calls, list):
        rest["tool_calls"] = [
            {"index": n, **call} if isinstance(call, dict) else call for n, call in enumerate(calls)
        ]
    return rest
