"""Gemini's protocol: OpenAI's words in, Gemini's out, and the answer back.

The official client is the judge of what is sent: what it makes of the same wishes, our translation
must make, too.
"""

from __future__ import annotations

import base64
import json
from array import array
from typing import Any, cast

import httpx2
import pytest
from google import genai
from google.genai import types

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.gemini import GeminiProvider, embed_requests, translate
from promptfleet_workers.providers.gemini_stream import ResponseAssembly
from promptfleet_workers.providers.http import Endpoint, HttpClient, HttpResponse
from promptfleet_workers.providers.protocol import Call, Completion, Received
from promptfleet_workers.providers.sse import Event
from promptfleet_workers.retries import FailureKind, Verdict, classify

HI = [{"role": "user", "content": "Hi"}]
PIXEL = base64.b64encode(b"a picture").decode()
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA},
}
DECLARED = types.Tool(
    function_declarations=[
        types.FunctionDeclaration(
            name="weather", description="Of a city.", parameters_json_schema=SCHEMA
        )
    ]
)


def official(
    contents: Any, config: types.GenerateContentConfigDict | None = None, model: str = "gemini-x"
) -> dict[str, Any]:
    """The body that Google's own client sends."""
    sent: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, json={"candidates": []})

    client = genai.Client(
        api_key="k",
        http_options=types.HttpOptions(
            client_args={"transport": httpx2.MockTransport(answer)},
        ),
    )
    client.models.generate_content(model=model, contents=contents, config=config)
    body: dict[str, Any] = _in_camel_case(json.loads(sent[0].content))
    if not body.get("generationConfig"):
        body.pop("generationConfig", None)
    return body


def _in_camel_case(value: Any) -> Any:
    """The same message: protobuf's JSON has two names for a field, and the client mixes them."""
    if isinstance(value, list):
        return [_in_camel_case(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {_camel(key): _in_camel_case(item) for key, item in value.items()}


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(word.capitalize() for word in rest)


def no_calls(**more: Any) -> types.GenerateContentConfigDict:
    """A configuration in which the client calls no function by itself."""
    off = types.AutomaticFunctionCallingConfig(disable=True)
    return cast("types.GenerateContentConfigDict", {"automatic_function_calling": off, **more})


def test_parameters_are_sent_as_googles_own_client_does() -> None:
    ours = translate(
        {
            "messages": [{"role": "system", "content": "Be brief."}, *HI],
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "stop": ["END"],
            "seed": 7,
            "n": 2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "user": "somebody",
        },
        "gemini-x",
    )
    theirs = official(
        "Hi",
        {
            "system_instruction": "Be brief.",
            "max_output_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "stop_sequences": ["END"],
            "seed": 7,
            "candidate_count": 2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
        },
    )
    assert ours == theirs


def test_a_schema_is_sent_as_googles_own_client_does() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
    ours = translate({"messages": HI, "response_format": form}, "gemini-x")
    config: types.GenerateContentConfigDict = {
        "response_mime_type": "application/json",
        "response_json_schema": SCHEMA,
    }
    assert ours == official("Hi", config)
    plain = translate({"messages": HI, "response_format": {"type": "json_object"}}, "gemini-x")
    assert plain == official("Hi", {"response_mime_type": "application/json"})
    assert translate({"messages": HI, "response_format": {"type": "text"}}, "gemini-x") == official(
        "Hi"
    )


@pytest.mark.parametrize(
    ("choice", "config"),
    [
        ("auto", {"mode": "AUTO"}),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "ANY"}),
        (
            {"type": "function", "function": {"name": "weather"}},
            {"mode": "ANY", "allowed_function_names": ["weather"]},
        ),
    ],
)
def test_tools_are_sent_as_googles_own_client_does(choice: Any, config: dict[str, Any]) -> None:
    ours = translate({"messages": HI, "tools": [TOOL], "tool_choice": choice}, "gemini-x")
    calling = types.FunctionCallingConfig(**config)
    tool_config = types.ToolConfig(function_calling_config=calling)
    assert ours == official("Hi", no_calls(tools=[DECLARED], tool_config=tool_config))


def test_a_conversation_with_tools_is_sent_as_googles_own_client_does() -> None:
    ours = translate(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
                            "extra_content": {"google": {"thought_signature": "c2ln"}},
                        },
                        {
                            "id": "call_2",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"Oslo"}'},
                        },
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": '{"sky":"blue"}'},
                {"role": "tool", "tool_call_id": "call_2", "content": "grey"},
            ],
            "tools": [TOOL],
        },
        "gemini-x",
    )

    def called(call_id: str, city: str, **more: Any) -> types.Part:
        call = types.FunctionCall(id=call_id, name="weather", args={"city": city})
        return types.Part(function_call=call, **more)

    def said(call_id: str, response: dict[str, Any]) -> types.Part:
        return types.Part(
            function_response=types.FunctionResponse(id=call_id, name="weather", response=response)
        )

    theirs = official(
        [
            types.Content(role="user", parts=[types.Part(text="Weather?")]),
            types.Content(
                role="model",
                parts=[
                    called("call_1", "Rome", thought_signature=b"sig"),
                    called("call_2", "Oslo"),
                ],
            ),
            types.Content(
                role="user",
                parts=[said("call_1", {"sky": "blue"}), said("call_2", {"output": "grey"})],
            ),
        ],
        no_calls(tools=[DECLARED]),
    )
    assert ours == theirs


def test_pictures_and_sounds_are_sent_as_googles_own_client_does() -> None:
    ours = translate(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is it?"},
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{PIXEL}"},
                        },
                        {"type": "input_audio", "input_audio": {"data": PIXEL, "format": "wav"}},
                    ],
                }
            ]
        },
        "gemini-x",
    )
    theirs = official(
        [
            "What is it?",
            types.Part.from_bytes(data=b"a picture", mime_type="image/png"),
            types.Part.from_bytes(data=b"a picture", mime_type="audio/wav"),
        ]
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("gemini-2.5-flash", {"thinking_budget": 1024}),
        ("gemini-3-flash", {"thinking_level": "low"}),
    ],
)
def test_reasoning_effort_is_a_budget_or_a_level(model: str, config: dict[str, Any]) -> None:
    ours = translate({"messages": HI, "reasoning_effort": "low"}, model)
    theirs = official("Hi", no_calls(thinking_config=types.ThinkingConfig(**config)), model=model)
    assert ours == theirs


@pytest.mark.parametrize(
    "request_",
    [
        {"logit_bias": {"5": 1}},
        {"logprobs": True},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "grammar"}},
        {"reasoning_effort": "extreme"},
        {"tools": [{"type": "retrieval"}]},
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"messages": [{"role": "critic", "content": "x"}]},
        {"messages": [{"role": "tool", "tool_call_id": "unknown", "content": "x"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}],
                }
            ]
        },
    ],
)
def test_what_has_no_counterpart_is_named_and_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(ProviderError) as caught:
        translate({"messages": HI, **request_}, "gemini-x")
    assert caught.value.code == "unsupported"
    assert classify(caught.value).verdict is Verdict.NEXT


# -- answers ---------------------------------------------------------------------------------


class Replies:
    """Stands in for the HTTP client: keeps what is sent, and answers with a canned response."""

    def __init__(self, body: Any, status: int = 200) -> None:
        self.body = json.dumps(body).encode()
        self.status = status
        self.sent: list[Any] = []

    async def post(
        self, endpoint: Endpoint, body: bytes, timeouts: TimeoutOptions, **_: Any
    ) -> HttpResponse:
        request = endpoint.request(body, {})
        self.sent.append(request)
        return HttpResponse(self.status, cast("Any", {}), self.body)


def answered(*parts: dict[str, Any], reason: str | None = "STOP", **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}, "index": 0}
    if reason is not None:
        candidate["finishReason"] = reason
    response = {
        "candidates": [candidate],
        "usageMetadata": {
            "promptTokenCount": 100,
            "cachedContentTokenCount": 60,
            "candidatesTokenCount": 20,
            "thoughtsTokenCount": 30,
            "totalTokenCount": 150,
        },
        "modelVersion": "gemini-x-001",
        "responseId": "r1",
        **more,
    }
    types.GenerateContentResponse.model_validate(response)  # such answers exist
    return response


async def call(
    replies: Replies, *requests: dict[str, Any], kind: JobKind = JobKind.CHAT, **options: Any
) -> list[Completion]:
    deployment = Deployment(base_url="http://api.test/v1beta/", provider="gemini", **options)
    provider = build_provider(deployment, cast("HttpClient", replies))
    assert isinstance(provider, GeminiProvider)
    asked = Call(
        kind=kind,
        model="gemini-x",
        requests=[json.dumps(request) for request in requests],
        input_tokens=[7] * len(requests),
        timeouts=TimeoutOptions(),
    )
    answers = await provider.call(asked)
    assert all(isinstance(answer, Completion) for answer in answers)
    return cast("list[Completion]", answers)


async def test_an_answer_comes_in_openais_shape() -> None:
    replies = Replies(answered({"text": "hmm", "thought": True}, {"text": "Hel"}, {"text": "lo"}))
    (answer,) = await call(replies, {"messages": HI}, api_key="the-key")

    assert (answer.text, answer.finish_reason, answer.model) == ("Hello", "stop", "gemini-x-001")
    assert answer.usage == Usage(input=100, cached=60, output=50, reasoning=30)
    told = json.loads(answer.response)
    assert told["object"] == "chat.completion"
    assert told["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
    }
    assert told["usage"]["completion_tokens_details"] == {"reasoning_tokens": 30}
    (sent,) = replies.sent
    assert str(sent.url) == "http://api.test/v1beta/models/gemini-x:generateContent"
    assert sent.headers["x-goog-api-key"] == "the-key"


async def test_function_calls_come_back_as_they_can_be_sent_again() -> None:
    part = {
        "functionCall": {"name": "weather", "args": {"city": "Rome"}, "id": "f1"},
        "thoughtSignature": "c2ln",
    }
    (answer,) = await call(Replies(answered(part)), {"messages": HI, "tools": [TOOL]})

    assert (answer.text, answer.finish_reason) == (None, "tool_calls")
    message = json.loads(answer.response)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city":"Rome"}',
    }
    again = translate({"messages": [*HI, message]}, "gemini-x")
    assert again["contents"][1] == {"role": "model", "parts": [part]}


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("MAX_TOKENS", "length"), ("SAFETY", "content_filter"), ("RECITATION", "content_filter"),
     ("SPII", "content_filter"), ("OTHER", "other")],
)  # fmt: skip
async def test_finish_reasons_are_openais(reason: str, finish: str) -> None:
    (answer,) = await call(Replies(answered({"text": "x"}, reason=reason)), {"messages": HI})
    assert answer.finish_reason == finish


async def test_a_filtered_answer_without_content_is_an_answer() -> None:
    body = answered(reason="SAFETY")
    del body["candidates"][0]["content"]
    (answer,) = await call(Replies(body), {"messages": HI})
    assert (answer.text, answer.finish_reason) == (None, "content_filter")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "content_filter"),
        ({"candidates": []}, "bad_response"),
        (answered({"text": "x"}, reason=None), "truncated"),
        (answered({"text": "x"}, reason="MALFORMED_FUNCTION_CALL"), "bad_response"),
        ({"candidates": ["x"]}, "bad_response"),
    ],
)
async def test_what_is_no_answer_fails(body: Any, code: str) -> None:
    with pytest.raises(ProviderError) as caught:
        await call(Replies(body), {"messages": HI})
    assert caught.value.code == code


async def test_googles_errors_are_understood() -> None:
    exhausted = {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota, please check your plan.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [
                {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": []},
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.07s"},
            ],
        }
    }
    with pytest.raises(ProviderError) as caught:
        await call(Replies(exhausted, 429), {"messages": HI})
    judgement = classify(caught.value)
    assert (judgement.kind, judgement.retry_after_s) == (FailureKind.RATE_LIMIT, 34.07)


@pytest.mark.parametrize(
    ("status", "name", "message", "kind"),
    [
        (400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", "permanent"),
        (403, "PERMISSION_DENIED", "no", "permanent"),
        (404, "NOT_FOUND", "models/x is not found", "permanent"),
        (500, "INTERNAL", "An internal error has occurred.", "server_error"),
        (503, "UNAVAILABLE", "The model is overloaded.", "overload"),
        (504, "DEADLINE_EXCEEDED", "too slow", "unknown_outcome"),
    ],
)
async def test_other_errors_of_googles(status: int, name: str, message: str, kind: str) -> None:
    body = {"error": {"code": status, "message": message, "status": name}}
    with pytest.raises(ProviderError) as caught:
        await call(Replies(body, status), {"messages": HI})
    assert classify(caught.value).kind == kind


# -- streams ---------------------------------------------------------------------------------


def test_a_stream_is_the_whole_answer_in_pieces() -> None:
    heard: list[str] = []
    received = Received()
    assembly = ResponseAssembly(on_text=heard.append, received=received)
    pieces = [
        answered({"text": "let me see", "thought": True}, reason=None),
        answered({"text": "Hel"}, reason=None),
        answered({"text": "lo"}, reason=None),
        answered({"functionCall": {"name": "f", "args": {}}}, {"text": ""}),
    ]
    assert not any(assembly.add(Event(json.dumps(piece).encode())) for piece in pieces)

    whole = assembly.end(b"")
    assert heard == ["Hel", "lo"]
    assert whole["candidates"][0]["finishReason"] == "STOP"
    assert whole["candidates"][0]["content"]["parts"][:3] == [
        {"text": "let me see", "thought": True},
        {"text": "Hello"},
        {"functionCall": {"name": "f", "args": {}}},
    ]
    assert (received.input, received.cached) == (100, 60)
    assert received.size == len("let me seeHello") + len('{"name":"f","args":{}}')


def test_an_empty_stream_is_a_truncated_one() -> None:
    with pytest.raises(ProviderError, match="finish reason"):
        ResponseAssembly().end(b"")


# -- embeddings and prices -------------------------------------------------------------------


async def test_embeddings_of_many_requests_share_a_call() -> None:
    replies = Replies({"embeddings": [{"values": [1.0, 0.5]}, {"values": [0.5, 1.0]}] * 2})
    plain, encoded, both = await call(
        replies,
        {"input": "a", "dimensions": 2},
        {"input": "b", "encoding_format": "base64"},
        {"input": ["c", "d"]},
        kind=JobKind.EMBEDDING,
    )

    (sent,) = replies.sent
    assert str(sent.url).endswith("/models/gemini-x:batchEmbedContents")
    first = json.loads(sent.content)["requests"][0]
    assert first == {
        "model": "models/gemini-x",
        "content": {"parts": [{"text": "a"}]},
        "outputDimensionality": 2,
    }
    assert json.loads(plain.response)["data"][0]["embedding"] == [1.0, 0.5]
    vector = array("f")
    vector.frombytes(base64.b64decode(json.loads(encoded.response)["data"][0]["embedding"]))
    assert vector.tolist() == [0.5, 1.0]
    assert [item["index"] for item in json.loads(both.response)["data"]] == [0, 1]
    assert both.usage == Usage(input=7)


async def test_a_wrong_number_of_embeddings_is_no_answer() -> None:
    with pytest.raises(ProviderError, match="another number"):
        await call(Replies({"embeddings": []}), {"input": "a"}, kind=JobKind.EMBEDDING)
    with pytest.raises(ProviderError, match="no text"):
        embed_requests({"input": [1, 2]}, "models/x")


def test_googles_prices_apply() -> None:
    usage = Usage(input=1_000_000)
    gemini = Pricer().cost("gemini", "gemini-2.5-flash", usage)
    assert gemini is not None
    assert gemini == Pricer().cost("google", "gemini-2.5-flash", usage)
