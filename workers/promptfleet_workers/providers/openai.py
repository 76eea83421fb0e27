"""OpenAI's API, and everything that speaks it: vLLM, TGI, llama.cpp, Ollama, OpenRouter, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_workers.providers.http import Endpoint, HttpClient
from promptfleet_workers.providers.openai_stream import ChunkAssembly
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.providers.responses import (
    TOKENS_MAX,
    bad_response,
    estimate_tokens,
    failure,
    name,
    read_answer,
    read_json,
    response_json,
    storable,
    tokens,
    truncated,
    write_json,
)
from promptfleet_workers.providers.shares import allocate_usage
from promptfleet_workers.providers.streams import read_streamed

_PATHS = {
    JobKind.CHAT: "/chat/completions",
    JobKind.COMPLETION: "/completions",
    JobKind.EMBEDDING: "/embeddings",
}
_LISTED = {JobKind.COMPLETION: "prompt", JobKind.EMBEDDING: "input"}
_OK = 200
_STREAM = '"stream":true,"stream_options":{"include_usage":true},'
# What vLLM, OpenRouter and others call the end of an answer that came to no end.
_BROKEN_OFF = frozenset({"abort", "aborted", "error"})
_Json = dict[str, Any]


class OpenAIProvider:
    """A deployment that speaks OpenAI's protocol."""

    def __init__(self, deployment: Deployment, client: HttpClient) -> None:
        """Prepare the endpoints of `deployment`; `client` stays its owner's to close."""
        self._client = client
        headers = {key.lower(): value for key, value in deployment.headers.items()}
        secret = (deployment.secret() or "").strip()
        if secret:
            headers.setdefault("authorization", f"Bearer {secret}")
        base, mark, query = deployment.base_url.partition("?")
        self._endpoints = {
            kind: Endpoint(f"{base.rstrip('/')}{path}{mark}{query}", headers)
            for kind, path in _PATHS.items()
        }

    async def call(self, call: Call) -> list[Answer]:
        """Send one request; one answer for each of `call.requests`, in their order.

        Raises:
            ProviderError: The call failed as a whole.
        """
        if call.stream and call.kind is not JobKind.EMBEDDING:
            return await self._streamed(call)
        if len(call.requests) == 1:
            response = await self._client.post(
                self._endpoints[call.kind],
                _body(call),
                call.timeouts,
                on_headers=call.on_headers,
            )
            return [completion_of(call, read_answer(response), response.body)]
        listed, counts = _list_body(call)
        response = await self._client.post(
            self._endpoints[call.kind], listed, call.timeouts, on_headers=call.on_headers
        )
        return _shares(call, read_answer(response), counts)

    async def _streamed(self, call: Call) -> list[Answer]:
        """The same by way of an event stream."""
        counts = None
        if len(call.requests) == 1:
            body = _body(call)
        else:
            body, counts = _list_body(call)
        body = b"{" + _STREAM.encode() + body[1:]
        assembly = ChunkAssembly(
            is_chat=call.kind is JobKind.CHAT,
            on_text=call.on_text if counts is None else None,
            received=call.received,
        )
        data, response = await read_streamed(
            self._client,
            self._endpoints[call.kind],
            body,
            call.timeouts,
            assembly,
            on_headers=call.on_headers,
        )
        if counts is None:
            return [_completion(call, data, response)]
        return _shares(call, data, counts)

    async def aclose(self) -> None:
        """Nothing to give back: the client belongs to whoever made it."""


def _body(call: Call) -> bytes:
    """The stored request lacks nothing but the model: splicing saves reading and writing it."""
    model = orjson.dumps(call.model).decode()
    return f'{{"model":{model},{call.requests[0][1:]}'.encode()


def _completion(call: Call, data: _Json, body: bytes) -> Completion:
    """The answer to a chat or a single prompt."""
    choices = data.get("choices")
    if type(choices) is not list or not choices or type(choices[0]) is not dict:
        raise bad_response("the answer has no choices")
    try:
        text, finish_reason = _read_choice(choices[0])
    except ProviderError as error:
        error.usage = _usage(data.get("usage"))
        raise
    return Completion(
        text=text,
        response=body,
        finish_reason=finish_reason,
        usage=_usage(data.get("usage")) or _estimate(call, 0, text),
        model=name(data.get("model")),
    )


def completion_of(call: Call, data: _Json, body: bytes) -> Completion:
    """What one request's whole answer says, however it came.

    Raises:
        ProviderError: It is no whole answer.
    """
    if call.kind is JobKind.EMBEDDING:
        return _embedding(call, data, body)
    return _completion(call, data, body)


def _read_choice(choice: _Json) -> tuple[str | None, str]:
    """Text and finish reason.

    Raises:
        ProviderError: The choice has no finish reason, or tells of an error.
    """
    if choice.get("error"):
        raise failure(choice, _OK)  # OpenRouter: the failure of what is behind it
    finish_reason = name(choice.get("finish_reason"))
    if finish_reason is None or finish_reason in _BROKEN_OFF:
        raise truncated()
    message = choice.get("message")
    content = message.get("content") if type(message) is dict else choice.get("text")
    if type(content) is list:  # Mistral's reasoning models answer in parts
        parts = [part.get("text") for part in content if type(part) is dict]
        content = "".join(part for part in parts if type(part) is str)
    return storable(content) if type(content) is str else None, finish_reason


def _embedding(call: Call, data: _Json, body: bytes) -> Completion:
    """The answer to one embedding request, whose input may have been a list."""
    items = data.get("data")
    if type(items) is not list or not items:
        raise bad_response("the answer has no embeddings")
    return Completion(
        text=None,
        response=body,
        finish_reason=None,
        usage=_usage(data.get("usage")) or _estimate(call, 0, None),
        model=name(data.get("model")),
    )


# -- many prompts in one request -------------------------------------------------------------


def _list_body(call: Call) -> tuple[bytes, list[int]]:
    """The body that asks for all of the requests, and how many prompts each of them has."""
    field = _LISTED.get(call.kind)
    if field is None:
        raise ValueError(f"{call.kind} takes one request a call, not {len(call.requests)}")
    requests: list[_Json] = [read_json(request.encode()) for request in call.requests]
    prompts: list[Any] = []
    counts = []
    for request in requests:
        own = _prompts(request[field])
        prompts += own
        counts.append(len(own))
    return write_json({**requests[0], field: prompts, "model": call.model}), counts


def _prompts(value: Any) -> list[Any]:
    """The prompts of one request: a text, a list of token ids, or a list of either."""
    if type(value) is list and value and type(value[0]) in {str, list}:
        return value
    return [value]


def _shares(call: Call, data: _Json, counts: Sequence[int]) -> list[Answer]:
    """Each request's part of the answer to all of them."""
    key = "data" if call.kind is JobKind.EMBEDDING else "choices"
    groups = _grouped(data.get(key), counts)
    head = _head(data, key)
    model = name(data.get("model"))
    read = [_read_group(call, group) for group in groups]
    estimates = [
        Usage(input=_input_estimate(call, n), output=facts[2] if type(facts) is tuple else 0)
        for n, facts in enumerate(read)
    ]
    total = _usage(data.get("usage"))
    usages = allocate_usage(total, estimates) if total else estimates
    answers: list[Answer] = []
    for group, facts, usage in zip(groups, read, usages, strict=True):
        if isinstance(facts, ProviderError):
            answers.append(facts)
            continue
        text, finish_reason, _ = facts
        choices = response_json(group)
        response = b"".join((head, choices, b',"usage":', _usage_json(call, usage), b"}"))
        answers.append(
            Completion(
                text=text,
                response=response,
                finish_reason=finish_reason,
                usage=usage,
                model=model,
            )
        )
    return answers


def _grouped(items: Any, counts: Sequence[int]) -> list[list[_Json]]:
    """The choices (or vectors) of each request, numbered from 0 as if it had come alone.

    Raises:
        ProviderError: They can't be told apart.
    """
    prompts = sum(counts)
    if type(items) is not list or not items or len(items) % prompts:
        raise bad_response("the answer has another number of choices than the request of prompts")
    numbered: dict[int, _Json] = {}
    for place, item in enumerate(items):
        index = item.get("index", place) if type(item) is dict else None
        if type(index) is not int:
            break
        numbered[index] = item
    if numbered.keys() != set(range(len(items))):
        raise bad_response("the answer's choices are not numbered one by one")
    each = len(items) // prompts  # `n` of the request
    groups = []
    start = 0
    for count in counts:
        end = start + count * each
        groups.append([{**numbered[n], "index": n - start} for n in range(start, end)])
        start = end
    return groups


def _read_group(
    call: Call, group: list[_Json]
) -> tuple[str | None, str | None, int] | ProviderError:
    """Text, finish reason and estimated output tokens of one request's choices."""
    if call.kind is JobKind.EMBEDDING:
        return None, None, 0
    try:
        texts = [_read_choice(choice) for choice in group]
    except ProviderError as error:
        return error
    return *texts[0], sum(estimate_tokens(text) for text, _ in texts)


def _head(data: _Json, key: str) -> bytes:
    """The answer's other fields, up to where `key`'s list begins."""
    others = {name: data[name] for name in data if name not in {key, "usage"}}
    others.setdefault("object", "list" if key == "data" else "text_completion")
    return response_json(others)[:-1] + f',"{key}":'.encode()


def _usage_json(call: Call, usage: Usage) -> bytes:
    counts: _Json = {"prompt_tokens": usage.input, "total_tokens": usage.input + usage.output}
    if call.kind is not JobKind.EMBEDDING:
        counts["completion_tokens"] = usage.output
    if usage.cached:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached}
    if usage.reasoning:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return orjson.dumps(counts)


# -- small facts -----------------------------------------------------------------------------


def _usage(counts: Any) -> Usage | None:
    """The provider's own count; None if it gave none."""
    if type(counts) is not dict:
        return None
    prompt = tokens(counts.get("prompt_tokens"))
    output = tokens(counts.get("completion_tokens"))
    if not prompt and not output:
        return None
    cached = reasoning = 0
    if type(details := counts.get("prompt_tokens_details")) is dict:
        cached = tokens(details.get("cached_tokens"))
    if type(details := counts.get("completion_tokens_details")) is dict:
        reasoning = tokens(details.get("reasoning_tokens"))
    if reasoning and counts.get("total_tokens") == prompt + output + reasoning:
        output = min(output + reasoning, TOKENS_MAX)  # xAI counts the reasoning apart
    return Usage(
        input=prompt,
        cached=min(prompt, cached),
        output=output,
        reasoning=min(output, reasoning),
    )


def _estimate(call: Call, n: int, text: str | None) -> Usage:
    return Usage(input=_input_estimate(call, n), output=estimate_tokens(text))


def _input_estimate(call: Call, n: int) -> int:
    return min(max(call.input_tokens[n], 0), TOKENS_MAX)
