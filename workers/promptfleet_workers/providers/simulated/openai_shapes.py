"""OpenAI's shapes: chat completions, completions, embeddings, their streams and errors."""

from __future__ import annotations

import base64
import sys
import time
from functools import partial
from typing import Any

import orjson

from .answers import (
    Body,
    Call,
    Prompt,
    Rejected,
    answers_to,
    embedding_of,
    read_count,
    read_messages,
    read_model,
    read_prompt,
    read_texts,
    text_of,
    token_events,
)
from .options import Options

_DEFAULT_DIMENSIONS = 64
_MAX_DIMENSIONS = 16_384
DONE = b"data: [DONE]\n\n"


def error_payload(rejected: Rejected) -> bytes:
    """OpenAI's error body."""
    return orjson.dumps(
        {
            "error": {
                "message": rejected.message,
                "type": rejected.kind,
                "param": rejected.param,
                "code": rejected.code,
            }
        }
    )


def error_event(rejected: Rejected) -> bytes:
    """OpenAI's error in the middle of a stream."""
    return b"data: %b\n\n" % error_payload(rejected)


class ChatCompletions:
    """POST /v1/chat/completions."""

    path = "/v1/chat/completions"
    error_payload = staticmethod(error_payload)

    def read(self, body: Body, options: Options, number: int) -> Call:
        """The request with its answers."""
        messages = read_messages(body)
        text = "\n".join([text_of(message.get("content")) for message in messages])
        prompts = [read_prompt(messages, text, "messages")]
        limit = read_count(body, "max_completion_tokens") or read_count(body, "max_tokens")
        return Call(
            number=number,
            model=read_model(body),
            prompts=prompts,
            answers=answers_to(prompts, body, limit, options),
            stream=body.get("stream") is True,
            include_usage=_wants_usage(body),
        )

    def payload(self, call: Call) -> bytes:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(call.answers)
        ]
        return orjson.dumps(_envelope(call, "chatcmpl", "chat.completion", choices, _usage(call)))

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        before, tokens, after = [], [], []
        for index, answer in enumerate(call.answers):
            before.append(self._event(call, index, {"role": "assistant", "content": ""}, None))
            event_of = partial(self._token, call, index)
            tokens += token_events(answer.text, event_of)
            after.append(self._event(call, index, {}, answer.finish))
        if call.include_usage:
            after.append(
                _sse(_envelope(call, "chatcmpl", "chat.completion.chunk", [], _usage(call)))
            )
        return before, tokens, [*after, DONE]

    def _token(self, call: Call, index: int, piece: str) -> bytes:
        return self._event(call, index, {"content": piece}, None)

    def error_event(self, rejected: Rejected) -> bytes:
        """An error in the middle of a stream."""
        return error_event(rejected)

    def _event(self, call: Call, index: int, delta: dict[str, str], finish: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _sse(_envelope(call, "chatcmpl", "chat.completion.chunk", [choice], None))


class Completions:
    """POST /v1/completions: one prompt, or a list of them in one request."""

    path = "/v1/completions"
    error_payload = staticmethod(error_payload)

    def read(self, body: Body, options: Options, number: int) -> Call:
        """The request with its answers."""
        prompts = [read_prompt(text, text, "prompt") for text in read_texts(body, "prompt")]
        limit = read_count(body, "max_tokens")
        return Call(
            number=number,
            model=read_model(body),
            prompts=prompts,
            answers=answers_to(prompts, body, limit, options),
            stream=body.get("stream") is True,
            include_usage=_wants_usage(body),
        )

    def payload(self, call: Call) -> bytes:
        """The whole answer, a choice for each prompt."""
        choices = [
            _text_choice(index, answer.text, answer.finish)
            for index, answer in enumerate(call.answers)
        ]
        return orjson.dumps(_envelope(call, "cmpl", "text_completion", choices, _usage(call)))

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        tokens, after = [], []
        for index, answer in enumerate(call.answers):
            tokens += token_events(answer.text, partial(self._event, call, index))
            after.append(self._event(call, index, "", answer.finish))
        if call.include_usage:
            after.append(_sse(_envelope(call, "cmpl", "text_completion", [], _usage(call))))
        return [], tokens, [*after, DONE]

    def error_event(self, rejected: Rejected) -> bytes:
        """An error in the middle of a stream."""
        return error_event(rejected)

    def _event(self, call: Call, index: int, text: str, finish: str | None = None) -> bytes:
        choice = _text_choice(index, text, finish)
        return _sse(_envelope(call, "cmpl", "text_completion", [choice], None))


class Embeddings:
    """POST /v1/embeddings: one text, or a list of them in one request."""

    path = "/v1/embeddings"
    error_payload = staticmethod(error_payload)

    def read(self, body: Body, options: Options, number: int) -> Call:  # noqa: ARG002 - as the others
        """The request; an embedding has no answer, only its vector."""
        return Call(
            number=number,
            model=read_model(body),
            prompts=[read_prompt(text, text, "input") for text in read_texts(body, "input")],
            dimensions=read_count(body, "dimensions", most=_MAX_DIMENSIONS) or _DEFAULT_DIMENSIONS,
            base64=body.get("encoding_format") == "base64",
        )

    def payload(self, call: Call) -> bytes:
        """A unit vector for each text."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector(call, prompt)}
            for index, prompt in enumerate(call.prompts)
        ]
        usage = {"prompt_tokens": call.input_tokens, "total_tokens": call.input_tokens}
        return orjson.dumps({"object": "list", "data": data, "model": call.model, "usage": usage})

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Embeddings are never streamed; `read` does not set `stream`."""
        raise NotImplementedError(call)

    def error_event(self, rejected: Rejected) -> bytes:
        """Never asked for."""
        return error_event(rejected)

    def _vector(self, call: Call, prompt: Prompt) -> list[float] | str:
        vector = embedding_of(prompt.text, call.dimensions)
        if not call.base64:
            return vector.tolist()
        if sys.byteorder == "big":  # the format is little-endian
            vector.byteswap()
        return base64.b64encode(vector.tobytes()).decode()


def _wants_usage(body: Body) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _usage(call: Call) -> dict[str, int]:
    prompt, completion = call.input_tokens, call.output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _text_choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _envelope(
    call: Call, prefix: str, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None
) -> dict[str, Any]:
    return {
        "id": f"{prefix}-sim-{call.number:08d}",
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
        "choices": choices,
        "usage": usage,
    }


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)
