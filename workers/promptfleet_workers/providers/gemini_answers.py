"""Gemini's answers in OpenAI's shapes, so that whoever reads results knows one shape only."""

from __future__ import annotations

import base64
import sys
import uuid
from array import array
from collections.abc import Sequence
from typing import Any

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import Usage
from promptfleet_workers.providers.protocol import Call, Completion
from promptfleet_workers.providers.responses import (
    TOKENS_MAX,
    bad_response,
    estimate_tokens,
    name,
    response_json,
    storable,
    tokens,
    truncated,
    write_json,
)
from promptfleet_workers.providers.shares import allocate

_Json = dict[str, Any]
_FINISH_REASONS = {"STOP": "stop", "MAX_TOKENS": "length"} | dict.fromkeys(
    (
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT",
        "IMAGE_RECITATION",
    ),
    "content_filter",
)
# The model stumbled over a tool or its own format: another try may do.
_BROKEN = frozenset(
    {
        "MALFORMED_FUNCTION_CALL",
        "MALFORMED_RESPONSE",
        "UNEXPECTED_TOOL_CALL",
        "TOO_MANY_TOOL_CALLS",
    }
)


def chat_completion(call: Call, data: _Json, *, now: float) -> Completion:
    """The answer to a chat, as OpenAI's API would have given it.

    Args:
        call: What was asked.
        data: Gemini's `GenerateContentResponse`.
        now: Seconds since 1970.

    Raises:
        ProviderError: `content_filter`: the prompt was blocked; `truncated` or `bad_response`.
    """
    candidates = data.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise _nothing(data)
    counted = _usage(data.get("usageMetadata"))
    choices = [_choice(n, candidate, counted) for n, candidate in enumerate(candidates)]
    first = choices[0]
    text = first["message"]["content"]
    usage = counted or Usage(input=max(call.input_tokens[0], 0), output=estimate_tokens(text))
    model = name(data.get("modelVersion")) or call.model.rpartition("/")[2]
    answer = {
        "id": name(data.get("responseId")) or f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(now),
        "model": model,
        "choices": choices,
        "usage": _usage_json(usage),
    }
    return Completion(
        text=text if text is None else storable(text),
        response=response_json(answer),
        finish_reason=first["finish_reason"],
        usage=usage,
        model=model,
    )


def embeddings(
    call: Call, data: _Json, counts: Sequence[int], as_base64: Sequence[bool]
) -> list[Completion]:
    """Each request's embeddings, as OpenAI's API would have given them.

    Args:
        call: What was asked.
        data: Gemini's `BatchEmbedContentsResponse`.
        counts: Texts of each request.
        as_base64: Which of the requests asked for vectors in Base64.

    Raises:
        ProviderError: `bad_response`: there are not as many as were asked for.
    """
    items = data.get("embeddings")
    if not isinstance(items, list) or len(items) != sum(counts):
        raise bad_response("the answer has another number of embeddings than was asked for")
    sizes = [max(size, 0) for size in call.input_tokens]
    told = data.get("usageMetadata")
    total = tokens(told.get("promptTokenCount")) if isinstance(told, dict) else 0
    shares = allocate(total, sizes) if total else sizes
    model = call.model.rpartition("/")[2]
    answers = []
    start = 0
    for count, size, encoded in zip(counts, shares, as_base64, strict=True):
        vectors = [_vector(item, encoded=encoded) for item in items[start : start + count]]
        start += count
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": n, "embedding": vector}
                for n, vector in enumerate(vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": size, "total_tokens": size},
        }
        answers.append(
            Completion(
                text=None,
                response=response_json(answer),
                finish_reason=None,
                usage=Usage(input=min(size, TOKENS_MAX)),
                model=model,
            )
        )
    return answers


def _nothing(data: _Json) -> ProviderError:
    """An answer without candidates: the prompt was blocked, or it is none."""
    feedback = data.get("promptFeedback")
    if isinstance(feedback, dict) and feedback.get("blockReason"):
        return ProviderError("the provider blocked the prompt", code="content_filter")
    return bad_response("the answer has no candidates")


def _choice(index: int, candidate: Any, counted: Usage | None) -> _Json:
    """One candidate.

    Raises:
        ProviderError: It has no finish reason, or came to no end that is of use.
    """
    if not isinstance(candidate, dict):
        raise bad_response("a candidate of the answer is no object")
    reason = name(candidate.get("finishReason"))
    if reason is None:
        raise truncated(usage=counted)
    if reason in _BROKEN:
        raise bad_response("the model's answer is malformed")
    content = candidate.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    texts: list[str] = []
    calls: list[_Json] = []
    for part in parts if isinstance(parts, list) else ():
        if not isinstance(part, dict) or part.get("thought") is True:
            continue  # a summary of what it thought is no part of the answer
        if isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part.get("functionCall"), dict):
            calls.append(_tool_call(part))
    finish = _FINISH_REASONS.get(reason, reason.lower())
    message: _Json = {"role": "assistant", "content": "".join(texts) if texts else None}
    if calls:
        message["tool_calls"] = calls
        finish = "tool_calls" if finish == "stop" else finish
    message["refusal"] = None
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}


def _tool_call(part: _Json) -> _Json:
    """A function call; where the thought's signature goes is Google's own choice for this shape.

    Source: https://ai.google.dev/gemini-api/docs/thought-signatures#openai.
    """
    function = part["functionCall"]
    call: _Json = {
        "id": name(function.get("id")) or f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {
            "name": name(function.get("name")) or "",
            "arguments": write_json(function.get("args") or {}).decode(),
        },
    }
    signature = part.get("thoughtSignature")
    if isinstance(signature, str):
        call["extra_content"] = {"google": {"thought_signature": signature}}
    return call


def _usage(counts: Any) -> Usage | None:
    """The provider's own count, whose output leaves the thoughts out; None if it gave none."""
    if not isinstance(counts, dict):
        return None
    prompt = tokens(counts.get("promptTokenCount")) + tokens(counts.get("toolUsePromptTokenCount"))
    thoughts = tokens(counts.get("thoughtsTokenCount"))
    output = tokens(counts.get("candidatesTokenCount")) + thoughts
    if not prompt and not output:
        return None
    return Usage(
        input=min(prompt, TOKENS_MAX),
        cached=min(prompt, tokens(counts.get("cachedContentTokenCount"))),
        output=min(output, TOKENS_MAX),
        reasoning=thoughts,
    )


def _usage_json(usage: Usage) -> _Json:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def _vector(item: Any, *, encoded: bool) -> list[float] | str:
    values = item.get("values") if isinstance(item, dict) else None
    if not isinstance(values, list):
        raise bad_response("an embedding of the answer has no values")
    if not encoded:
        return values
    vector = array("f", values)
    if sys.byteorder == "big":  # the format is little-endian
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()
