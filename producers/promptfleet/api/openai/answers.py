"""What a provider answered, in OpenAI's shape, whoever the provider is."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping
from typing import Any

import orjson

from promptfleet_shared.jobs import JobKind, Result

_OBJECTS = {
    JobKind.CHAT: "chat.completion",
    JobKind.COMPLETION: "text_completion",
    JobKind.EMBEDDING: "list",
}
_PREFIXES = {JobKind.CHAT: "chatcmpl", JobKind.COMPLETION: "cmpl", JobKind.EMBEDDING: "embd"}
_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
"""Anthropic's stop reasons in OpenAI's words."""

Json = dict[str, Any]


def openai_answer(result: Result, kind: JobKind, model: str) -> Json:
    """The answer of a job that succeeded.

    Args:
        result: Of the job.
        kind: Of the job.
        model: The name that the client asked for, where the provider tells none.
    """
    response = result.response if isinstance(result.response, Mapping) else {}
    if result.provider == "anthropic":
        return _chat_of_anthropic(response, result, model)
    answer = {
        "id": answer_id(result, kind),
        "object": _OBJECTS[kind],
        "created": created_at(result),
        "model": result.model or model,
        **response,
    }
    if kind is JobKind.EMBEDDING:
        for name in ("id", "created"):
            if name not in response:
                del answer[name]
    if kind is not JobKind.CHAT:
        return answer
    for choice in answer.get("choices") or ():
        if isinstance(choice, dict):
            choice.setdefault("index", 0)
            choice.setdefault("logprobs", None)
            if isinstance(choice.get("message"), dict):
                choice["message"].setdefault("role", "assistant")
                choice["message"].setdefault("content", None)
    return answer


def answer_id(result: Result, kind: JobKind) -> str:
    """An id for an answer whose provider gave none."""
    return f"{_PREFIXES[kind]}-{result.job_id.hex}"


def created_at(result: Result) -> int:
    """When the answer was made, in Unix' seconds."""
    return int(result.finished_at.timestamp())


def with_base64(answer: Json) -> Json:
    """The embeddings as little-endian 32-bit floats in Base64, where they are lists yet."""
    for item in answer.get("data") or ():
        if isinstance(item, dict) and isinstance(item.get("embedding"), list):
            vector = array("f", item["embedding"])
            if sys.byteorder == "big":
                vector.byteswap()
            item["embedding"] = base64.b64encode(vector.tobytes()).decode()
    return answer


def usage_of(result: Result) -> Json:
    """Tokens as OpenAI counts them: the provider's own words, else ours."""
    response = result.response if isinstance(result.response, Mapping) else {}
    told = response.get("usage")
    if result.provider != "anthropic" and isinstance(told, dict) and "prompt_tokens" in told:
        return told
    prompt, output = result.usage.input, result.usage.output
    cached, reasoning = result.usage.cached, result.usage.reasoning
    if isinstance(told, Mapping) and "input_tokens" in told and not prompt and not output:
        # From the cache: the row says what was paid, and the answer what it once was.
        cached = int(told.get("cache_read_input_tokens") or 0)
        written = int(told.get("cache_creation_input_tokens") or 0)
        prompt = int(told["input_tokens"]) + cached + written
        output = int(told.get("output_tokens") or 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _chat_of_anthropic(response: Mapping[str, Any], result: Result, model: str) -> Json:
    content = response.get("content")
    blocks = content if isinstance(content, list) else []
    message: Json = {"role": "assistant", "content": result.text, "refusal": None}
    calls = [
        {
            "id": block.get("id"),
            "type": "function",
            "function": {
                "name": block.get("name"),
                "arguments": orjson.dumps(block.get("input") or {}).decode(),
            },
        }
        for block in blocks
        if isinstance(block, dict) and block.get("type") == "tool_use"
    ]
    if calls:
        message["tool_calls"] = calls
    reason = result.finish_reason or "stop"
    return {
        "id": response.get("id") or answer_id(result, JobKind.CHAT),
        "object": "chat.completion",
        "created": created_at(result),
        "model": result.model or model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": None,
                "finish_reason": _FINISH_REASONS.get(reason, reason),
            }
        ],
        "usage": usage_of(result),
    }
