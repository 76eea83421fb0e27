"""Anthropic's shapes: messages, their streams and errors."""

from __future__ import annotations

from typing import Any

import orjson

from .answers import (
    Body,
    Call,
    Rejected,
    answers_to,
    read_count,
    read_messages,
    read_model,
    read_prompt,
    text_of,
    token_events,
)
from .options import Options

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class Messages:
    """POST /v1/messages."""

    path = "/v1/messages"

    def read(self, body: Body, options: Options, number: int) -> Call:
        """The request with its answer; as there, `max_tokens` is required."""
        messages = read_messages(body)
        texts = [text_of(body.get("system"))] if body.get("system") else []
        texts += [text_of(message.get("content")) for message in messages]
        prompts = [read_prompt(messages, "\n".join(texts), "messages")]
        limit = read_count(body, "max_tokens")
        if limit is None:
            raise Rejected(400, "max_tokens: Field required", param="max_tokens")
        return Call(
            number=number,
            model=read_model(body),
            prompts=prompts,
            answers=answers_to(prompts, {}, limit, options),
            stream=body.get("stream") is True,
        )

    def payload(self, call: Call) -> bytes:
        """The whole answer."""
        answer = call.answers[0]
        usage = {"input_tokens": call.input_tokens, "output_tokens": answer.tokens}
        content = [{"type": "text", "text": answer.text}]
        return orjson.dumps(_message(call, content, _stop_reason(answer.finish), usage))

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        answer = call.answers[0]
        usage = {"input_tokens": call.input_tokens, "output_tokens": 0}
        block = {"type": "text", "text": ""}
        before = [
            _sse("message_start", message=_message(call, [], None, usage)),
            _sse("content_block_start", index=0, content_block=block),
        ]
        tokens = token_events(answer.text, _delta)
        delta = {"stop_reason": _stop_reason(answer.finish), "stop_sequence": None}
        after = [
            _sse("content_block_stop", index=0),
            _sse("message_delta", delta=delta, usage={"output_tokens": answer.tokens}),
            _sse("message_stop"),
        ]
        return before, tokens, after

    def error_payload(self, rejected: Rejected) -> bytes:
        """Anthropic's error body."""
        kind = _ERROR_TYPES.get(rejected.status, "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": rejected.message}})

    def error_event(self, rejected: Rejected) -> bytes:
        """An error in the middle of a stream."""
        return b"event: error\ndata: %b\n\n" % self.error_payload(rejected)


def _stop_reason(finish: str | None) -> str | None:
    return None if finish is None else _STOP_REASONS.get(finish, finish)


def _message(
    call: Call, content: list[dict[str, str]], stop_reason: str | None, usage: dict[str, int]
) -> dict[str, Any]:
    return {
        "id": f"msg_sim_{call.number:08d}",
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _delta(piece: str) -> bytes:
    return _sse("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})


def _sse(kind: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
