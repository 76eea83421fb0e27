"""Anthropic's protocol: OpenAI's words in, Anthropic's out, and the answer back."""

from __future__ import annotations

import json
from typing import Any, cast

import httpx
import pytest

from promptfleet_shared.errors import ConfigurationError, ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_workers.providers.anthropic import AnthropicProvider, translate
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import Endpoint, HttpClient, HttpResponse
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Call, Completion

HI = [{"role": "user", "content": "Hi"}]


class Replies:
    """Stands in for the HTTP client: keeps what is sent, and answers with a canned response."""

    def __init__(self, body: Any, status: int = 200) -> None:
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.sent: list[httpx.Request] = []

    async def post(
        self, endpoint: Endpoint, body: bytes, timeouts: TimeoutOptions, *, on_headers: object
    ) -> HttpResponse:
        self.sent.append(endpoint.request(body, {}))
        return HttpResponse(self.status, httpx.Headers({"retry-after": "2"}), self.body)


def message(**changes: Any) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 10, "output_tokens": 4},
        **changes,
    }


async def call(
    replies: Replies, request: dict[str, Any], kind: JobKind = JobKind.CHAT, **options: Any
) -> Completion:
    deployment = Deployment(base_url="http://api.test/v1/", provider="anthropic", **options)
    provider = AnthropicProvider(deployment, cast("HttpClient", replies))
    asked = Call(
        kind=kind,
        model="claude",
        requests=[json.dumps(request)],
        input_tokens=[7],
        timeouts=TimeoutOptions(),
    )
    [answer] = await provider.call(asked)
    assert isinstance(answer, Completion)
    return answer


async def failure(body: Any, status: int = 200) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await call(Replies(body, status), {"messages": HI})
    return caught.value


# -- requests


async def test_a_request_and_its_headers() -> None:
    replies = Replies(message())

    await call(replies, {"messages": HI, "temperature": 0.5}, api_key="key")

    [request] = replies.sent
    assert str(request.url) == "http://api.test/v1/messages"
    assert request.headers["x-api-key"] == "key"
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in request.headers
    assert json.loads(request.content) == {
        "model": "claude",
        "messages": HI,
        "max_tokens": 4096,
        "temperature": 0.5,
    }


async def test_another_version_can_be_configured() -> None:
    replies = Replies(message())

    await call(replies, {"messages": HI}, headers={"Anthropic-Version": "2030-01-01"})

    assert replies.sent[0].headers["anthropic-version"] == "2030-01-01"


def test_parameters() -> None:
    request = {
        "messages": HI,
        "max_tokens": 5,
        "stop": "END",
        "top_p": 0.9,
        "top_k": 3,
        "seed": None,
        "metadata": {"a": "b"},
        "user": "u",
        "n": 1,
        "stream": False,
        "response_format": {"type": "text"},
    }

    assert translate(request) == {
        "messages": HI,
        "max_tokens": 5,
        "stop_sequences": ["END"],
        "top_p": 0.9,
        "top_k": 3,
    }
    assert translate({"messages": HI, "stop": ["a", "b"]})["stop_sequences"] == ["a", "b"]
    assert translate({"messages": HI, "max_completion_tokens": 9})["max_tokens"] == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 0),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("n", 2),
        ("stream", True),
        ("logprobs", True),
        ("logit_bias", {}),
        ("presence_penalty", 0.1),
        ("something_new", 1),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ProviderError) as caught:
        translate({"messages": HI, field: value})

    assert caught.value.code == "unsupported"
    assert field in caught.value.message


@pytest.mark.parametrize("kind", [JobKind.COMPLETION, JobKind.EMBEDDING])
async def test_other_kinds_are_refused(kind: JobKind) -> None:
    replies = Replies(message())

    with pytest.raises(ProviderError) as caught:
        await call(replies, {"prompt": "a"}, kind)

    assert caught.value.code == "unsupported"
    assert kind.value in caught.value.message
    assert replies.sent == []


def test_system_messages_become_the_system() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        *HI,
    ]

    body = translate({"messages": messages})

    assert body["system"] == "Be brief.\n\nBe kind."
    assert body["messages"] == HI


def test_marks_for_the_prefix_cache_are_kept() -> None:
    mark = {"type": "ephemeral"}
    part = {"type": "text", "text": "Long.", "cache_control": mark}

    body = translate({"messages": [{"role": "system", "content": [part]}, *HI]})

    assert body["system"] == [part]


def test_pictures() -> None:
    content = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://h.test/a.jpg"}},
    ]

    [turn] = translate({"messages": [{"role": "user", "content": content}]})["messages"]

    assert turn["content"] == [
        {"type": "text", "text": "What is this?"},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
        },
        {"type": "image", "source": {"type": "url", "url": "https://h.test/a.jpg"}},
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:text/plain,SECRET"}},
        {"type": "image_url"},
        {"type": "text"},
        {},
    ],
)
def test_parts_without_a_counterpart_are_refused_by_place(part: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "a"}, part]

    with pytest.raises(ProviderError) as caught:
        translate({"messages": [{"role": "user", "content": content}]})

    assert "messages[0].content[1]" in caught.value.message
    assert "SECRET" not in caught.value.message


def test_a_conversation_with_tools() -> None:
    request = {
        "messages": [
            {"role": "user", "content": "Weather in Oslo and Rome?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    _tool_call("c1", '{"city":"Oslo"}'),
                    _tool_call("c2", '{"city":"Rome"}'),
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "3 degrees"},
            {"role": "tool", "tool_call_id": "c2", "content": ""},
            {"role": "user", "content": "So?"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Of a city",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                    "strict": True,
                },
            },
            {"type": "function", "function": {"name": "now"}},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
    }

    body = translate(request)

    assert body["messages"] == [
        {"role": "user", "content": "Weather in Oslo and Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "3 degrees"},
                {"type": "tool_result", "tool_use_id": "c2"},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    assert body["tools"] == [
        {
            "name": "weather",
            "description": "Of a city",
            "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
        {"name": "now", "input_schema": {"type": "object", "properties": {}}},
    ]
    assert body["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


def _tool_call(identity: str, arguments: str) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }


@pytest.mark.parametrize(
    ("choice", "translated"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
        (None, None),
    ],
)
def test_tool_choices(choice: Any, translated: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]

    body = translate({"messages": HI, "tools": tools, "tool_choice": choice})

    assert body.get("tool_choice") == translated


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "function", "content": "a"}]},
        {"messages": [{"role": "assistant", "tool_calls": [_tool_call("c", "no JSON SECRET")]}]},
        {"messages": [{"role": "assistant", "tool_calls": [_tool_call("c", "[]")]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
        {"messages": HI, "tools": [{"type": "web_search"}]},
        {
            "messages": HI,
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "allowed_tools"},
        },
    ],
)
def test_tools_without_a_counterpart_are_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(ProviderError) as caught:
        translate(request_)

    assert caught.value.code == "unsupported"
    assert "SECRET" not in caught.value.message


def test_empty_texts_are_left_out() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": ""}]},
    ]

    assert translate({"messages": messages})["messages"] == HI


# -- answers


async def test_an_answer() -> None:
    completion = await call(Replies(message()), {"messages": HI})

    assert completion == Completion(
        text="Hello there",
        response=json.dumps(message()).encode(),
        finish_reason="end_turn",
        usage=Usage(input=10, output=4),
        model="claude-x",
    )


async def test_cached_tokens_are_part_of_the_input() -> None:
    usage = {
        "input_tokens": 10,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 1000,
        "output_tokens": 4,
    }

    completion = await call(Replies(message(usage=usage)), {"messages": HI})

    assert completion.usage == Usage(input=1110, cached=100, output=4)


async def test_a_tool_call_alone_has_no_text() -> None:
    body = message(content=[{"type": "tool_use", "id": "t", "input": {}}], stop_reason="tool_use")

    completion = await call(Replies(body), {"messages": HI})

    assert (completion.text, completion.finish_reason) == (None, "tool_use")


async def test_without_a_usage_our_own_estimate_stands() -> None:
    completion = await call(Replies(message(usage=None)), {"messages": HI})

    assert completion.usage == Usage(input=7, output=3)


async def test_without_a_stop_reason_the_answer_is_truncated() -> None:
    error = await failure(message(stop_reason=None))

    assert (error.code, error.unknown_outcome) == ("truncated", True)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", message(content="text")])
async def test_a_body_without_an_answer_never_succeeds(body: Any) -> None:
    error = await failure(body)

    assert (error.code, error.unknown_outcome) == ("bad_response", True)


@pytest.mark.parametrize(
    ("status", "kind", "text", "code"),
    [
        (529, "overloaded_error", "Overloaded", "overloaded_error"),
        (200, "overloaded_error", "Overloaded", "overloaded_error"),
        (429, "rate_limit_error", "Too many", "rate_limit_error"),
        (
            400,
            "invalid_request_error",
            "prompt is too long: 2 > 1 tokens",
            "context_length_exceeded",
        ),
    ],
)
async def test_errors(status: int, kind: str, text: str, code: str) -> None:
    error = await failure({"type": "error", "error": {"type": kind, "message": text}}, status)

    assert (error.code, error.status, error.retry_after_s) == (code, status, 2)


# -- which provider


def test_a_deployment_names_its_protocol() -> None:
    client = cast("HttpClient", Replies({}))

    openai = build_provider(Deployment(base_url="http://a"), client)
    anthropic = build_provider(Deployment(base_url="http://a", provider="anthropic"), client)

    assert isinstance(openai, OpenAIProvider)
    assert isinstance(anthropic, AnthropicProvider)
    with pytest.raises(ConfigurationError, match="'gopher'"):
        build_provider(Deployment(base_url="http://a", provider="gopher"), client)
