"""Gemini's protocol over real sockets: our provider and Google's own client, one simulated server.

The client is the judge of the server: what it can read is what Gemini sends. And the server judges
our provider, which has to find there what the client finds.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import orjson
import pytest
from google import genai
from google.genai import errors, types

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Answer, Call, Completion, Provider
from promptfleet_workers.providers.simulated.http import HttpServer
from promptfleet_workers.providers.simulated.options import Options
from promptfleet_workers.providers.simulated.server import SimulatedProvider
from promptfleet_workers.rate_limits.learning import limits_told
from promptfleet_workers.retries import FailureKind, Verdict, classify

KEY = "the-key"
MODEL = "gemini-2.5-flash"
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    flags = ["--port", "0", "--api-key", KEY]
    command = [sys.executable, "-m", "promptfleet_workers.providers.simulated", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


@pytest.fixture
def official(url: str) -> Iterator[genai.Client]:
    with genai.Client(api_key=KEY, http_options=types.HttpOptions(base_url=url)) as client:
        yield client


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.aclose()


@pytest.fixture
def provider(url: str, client: HttpClient) -> Provider:
    return _provider(url, client)


def _provider(url: str, client: HttpClient, key: str = KEY) -> Provider:
    options = {"provider": "gemini", "base_url": f"{url}/v1beta", "api_key": key}
    return build_provider(Deployment.model_validate(options), client)


async def ask(
    provider: Provider,
    *requests: dict[str, Any],
    kind: JobKind = JobKind.CHAT,
    stream: bool = False,
    heard: list[str] | None = None,
    on_headers: Callable[[Mapping[str, str]], None] | None = None,
    **timers: float,
) -> list[Answer]:
    return await provider.call(
        Call(
            kind=kind,
            model=MODEL,
            requests=[orjson.dumps(r, option=orjson.OPT_SORT_KEYS).decode() for r in requests],
            input_tokens=[5] * len(requests),
            timeouts=TimeoutOptions.model_validate(timers),
            stream=stream,
            on_text=None if heard is None else heard.append,
            on_headers=on_headers,
        )
    )


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


async def failure(provider: Provider, text: str, **options: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await ask(provider, chat(text), **options)
    return caught.value


@streamed
async def test_both_read_the_same_answer(
    provider: Provider, official: genai.Client, stream: bool
) -> None:
    text = "Grüße, 世界! How are you?"
    theirs = await asyncio.to_thread(official.models.generate_content, model=MODEL, contents=text)
    heard: list[str] = []
    (ours,) = await ask(provider, chat(text), stream=stream, heard=heard)

    assert isinstance(ours, Completion)
    assert ours.text == theirs.text
    assert ours.finish_reason == "stop"
    assert theirs.candidates is not None
    assert theirs.candidates[0].finish_reason == types.FinishReason.STOP
    assert theirs.usage_metadata is not None
    assert ours.usage.input == theirs.usage_metadata.prompt_token_count
    assert ours.usage.output == theirs.usage_metadata.candidates_token_count
    assert "".join(heard) == (ours.text if stream else "")
    assert ours.model == theirs.model_version == MODEL


async def test_a_streamed_answer_is_the_whole_one(
    provider: Provider, official: genai.Client
) -> None:
    def pieces() -> list[str | None]:
        asked = official.models.generate_content_stream(model=MODEL, contents="one two three")
        return [piece.text for piece in asked]

    theirs = await asyncio.to_thread(pieces)
    whole, streamed = [
        (await ask(provider, chat("one two three"), stream=stream))[0] for stream in (False, True)
    ]
    assert isinstance(whole, Completion)
    assert isinstance(streamed, Completion)
    assert whole.text == streamed.text == "".join(piece or "" for piece in theirs)
    assert whole.usage == streamed.usage
    told, again = json.loads(whole.response), json.loads(streamed.response)
    assert told["choices"] == again["choices"]


async def test_limits_and_filters_end_an_answer(provider: Provider) -> None:
    (short,) = await ask(provider, chat("a long story", max_tokens=3))
    (filtered,) = await ask(provider, chat("[[sim:finish=content_filter]]"), stream=True)
    assert isinstance(short, Completion)
    assert isinstance(filtered, Completion)
    assert (short.finish_reason, short.usage.output) == ("length", 3)
    assert filtered.finish_reason == "content_filter"


@streamed
async def test_both_are_told_to_call_a_function(
    provider: Provider, official: genai.Client, stream: bool
) -> None:
    config = types.GenerateContentConfig(
        tools=[types.Tool(function_declarations=[types.FunctionDeclaration(name="look")])],
        tool_config=types.ToolConfig(
            function_calling_config=types.FunctionCallingConfig(
                mode=types.FunctionCallingConfigMode.ANY
            )
        ),
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )
    theirs = await asyncio.to_thread(
        official.models.generate_content, model=MODEL, contents="x", config=config
    )
    tools = [{"type": "function", "function": {"name": "look"}}]
    (ours,) = await ask(provider, chat("x", tools=tools, tool_choice="required"), stream=stream)

    assert theirs.function_calls is not None
    assert isinstance(ours, Completion)
    assert ours.finish_reason == "tool_calls"
    (called,) = json.loads(ours.response)["choices"][0]["message"]["tool_calls"]
    assert called["function"] == {"name": theirs.function_calls[0].name, "arguments": "{}"}


async def test_both_get_the_same_embeddings(provider: Provider, official: genai.Client) -> None:
    theirs = await asyncio.to_thread(
        official.models.embed_content,
        model="text-embedding-004",
        contents=["one", "two"],
        config=types.EmbedContentConfig(output_dimensionality=8),
    )
    ours = await ask(
        provider,
        {"input": "one", "dimensions": 8},
        {"input": "two", "dimensions": 8},
        kind=JobKind.EMBEDDING,
    )
    assert theirs.embeddings is not None
    vectors = []
    for answer in ours:
        assert isinstance(answer, Completion)
        vectors.append(json.loads(answer.response)["data"][0]["embedding"])
    assert vectors == [embedding.values for embedding in theirs.embeddings]
    assert len(vectors[0]) == 8


async def test_both_are_refused_alike(provider: Provider, official: genai.Client) -> None:
    text = "[[sim:status=429,retry-after-ms=1500]]"
    with pytest.raises(errors.ClientError) as caught:
        await asyncio.to_thread(official.models.generate_content, model=MODEL, contents=text)
    assert caught.value.status == "RESOURCE_EXHAUSTED"

    error = await failure(provider, text)
    judgement = classify(error)
    assert (judgement.kind, judgement.verdict) == (FailureKind.RATE_LIMIT, Verdict.DEFER)
    assert error.retry_after_s == 1.5  # by RetryInfo: no header says so


async def test_both_are_told_which_quota_was_exceeded(client: HttpClient) -> None:
    server = HttpServer(SimulatedProvider(Options(rpm=1)))
    url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
    heard: list[Mapping[str, str]] = []
    provider = _provider(url, client)
    await ask(provider, chat("one"), on_headers=heard.append)
    error = await failure(provider, "two", on_headers=heard.append)
    refused = await failure(provider, "two", stream=True)
    with (
        genai.Client(api_key=KEY, http_options=types.HttpOptions(base_url=url)) as official,
        pytest.raises(errors.ClientError) as caught,
    ):
        await asyncio.to_thread(official.models.generate_content, model=MODEL, contents="two")
    await server.drain(1)

    theirs = json.dumps(caught.value.details)
    assert '"quotaId": "GenerateRequestsPerMinutePerProjectPerModel", "quotaValue": "1"' in theirs
    assert error.limits == refused.limits == {"requests": 1}
    assert error.retry_after_s is not None
    assert 50 < error.retry_after_s < 61
    assert classify(error).kind is FailureKind.RATE_LIMIT
    assert [list(limits_told(headers)) for headers in heard] == [[], []]  # it has no such headers


async def test_a_day_that_is_used_up_is_not_waited_for_like_a_minute(provider: Provider) -> None:
    error = await failure(provider, "[[sim:quota]]")
    judgement = classify(error)

    assert (error.code, error.limits, error.retry_after_s) == ("daily_quota_exceeded", None, 22)
    assert (judgement.verdict, judgement.otherwise) == (Verdict.NEXT, Verdict.DEFER)
    assert (judgement.stops_key, judgement.alone) == (True, True)


async def test_a_wrong_key(url: str, client: HttpClient) -> None:
    error = await failure(_provider(url, client, key="wrong"), "hello")
    assert (error.code, classify(error).verdict) == ("unauthenticated", Verdict.NEXT)


@pytest.mark.parametrize(
    ("marker", "code"),
    [
        ("error-event,status=503", "unavailable"),
        ("cut", "truncated"),
        ("truncate", "truncated"),
        ("stall", "timeout"),
    ],
)
async def test_streams_that_break(provider: Provider, marker: str, code: str) -> None:
    error = await failure(
        provider, f"[[sim:{marker},output-tokens=50]]", stream=True, idle_timeout_ms=500.0
    )
    assert (error.code, error.unknown_outcome) == (code, True)
