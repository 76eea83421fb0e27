"""Our providers, over real sockets, against the simulated provider as a real process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import httpx
import openai as official
import orjson
import pytest
from tests.waiting import eventually

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Answer, Call, Completion, Provider
from promptfleet_workers.retries import FailureKind, Verdict, classify

KEY = "the-key"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    flags = ["--port", "0", "--api-key", KEY, "--drip-ms", "40"]
    command = [sys.executable, "-m", "promptfleet_workers.providers.simulated", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.aclose()


@pytest.fixture(params=["openai", "anthropic"])
def provider(request: pytest.FixtureRequest, url: str, client: HttpClient) -> Provider:
    return _provider(request.param, url, client)


@pytest.fixture
def openai(url: str, client: HttpClient) -> Provider:
    return _provider("openai", url, client)


def _provider(protocol: str, url: str, client: HttpClient, key: str = KEY) -> Provider:
    options = {"provider": protocol, "base_url": f"{url}/v1", "api_key": key}
    return build_provider(Deployment.model_validate(options), client)


async def chat(provider: Provider, text: str, *, stream: bool = False, **timers: float) -> Answer:
    request: dict[str, object] = {"messages": [{"role": "user", "content": text}]}
    timeouts = TimeoutOptions.model_validate(timers)
    return (await _call(provider, JobKind.CHAT, [request], timeouts, stream=stream))[0]


async def _call(
    provider: Provider,
    kind: JobKind,
    requests: list[dict[str, object]],
    timeouts: TimeoutOptions | None = None,
    *,
    stream: bool = False,
) -> list[Answer]:
    return await provider.call(
        Call(
            kind=kind,
            model="m",
            requests=[
                orjson.dumps(request, option=orjson.OPT_SORT_KEYS).decode() for request in requests
            ],
            input_tokens=[5] * len(requests),
            timeouts=timeouts or TimeoutOptions(),
            stream=stream,
        )
    )


async def failure(
    provider: Provider, text: str, *, stream: bool = False, **timers: float
) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await chat(provider, text, stream=stream, **timers)
    return caught.value


async def test_an_answer(provider: Provider) -> None:
    answer = await chat(provider, "[[sim:text=Grüße, 世界!]]")

    assert isinstance(answer, Completion)
    assert answer.text == "Grüße, 世界!"
    assert answer.finish_reason in {"stop", "end_turn"}
    assert answer.model == "m"
    assert answer.usage.input > 0
    assert answer.usage.output > 0
    assert json.loads(answer.response)["model"] == "m"


streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@pytest.mark.parametrize("text", ["Grüße, 世界!", "", " lines\n\nof text "])
async def test_a_streamed_answer_is_the_whole_one(provider: Provider, text: str) -> None:
    whole, streamed = [
        await chat(provider, f"[[sim:text={text}]]", stream=stream) for stream in (False, True)
    ]

    assert isinstance(whole, Completion)
    assert isinstance(streamed, Completion)
    assert (streamed.text or "", streamed.finish_reason) == (text, whole.finish_reason)
    assert (streamed.usage, streamed.model) == (whole.usage, whole.model)
    assert _shape(json.loads(streamed.response)) == _shape(json.loads(whole.response))


def _shape(response: object) -> object:
    """The response without what differs from call to call, or says nothing."""
    if isinstance(response, dict):
        return {
            key: _shape(value)
            for key, value in response.items()
            if key not in {"id", "created"} and value is not None
        }
    return [_shape(item) for item in response] if isinstance(response, list) else response


@streamed
@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        ("quota", FailureKind.QUOTA),
        ("overload", FailureKind.OVERLOAD),
        ("html,status=200", FailureKind.BAD_OUTPUT),
        ("error-body,status=429", FailureKind.RATE_LIMIT),
        ("bad-utf8", FailureKind.BAD_OUTPUT),
        ("cut", FailureKind.TRUNCATED),
        ("endless", FailureKind.BAD_OUTPUT),
        ("bomb", FailureKind.BAD_OUTPUT),
        ("hang", FailureKind.UNKNOWN_OUTCOME),
        ("stall", FailureKind.UNKNOWN_OUTCOME),
        ("reset", None),
        ("truncate", None),
    ],
)
async def test_what_can_go_wrong(
    provider: Provider, marker: str, kind: FailureKind | None, stream: bool
) -> None:
    prompt = f"[[sim:{marker}]] {'canary ' * 50}"
    timers = {"hang": {"first_byte_timeout_ms": 300}, "stall": {"idle_timeout_ms": 300}}

    error = await failure(provider, prompt, stream=stream, **timers.get(marker, {}))

    cut = FailureKind.TRUNCATED if stream else FailureKind.UNKNOWN_OUTCOME
    assert classify(error).kind is (kind or cut), error.message
    assert classify(error).stops_key is (kind is FailureKind.QUOTA)
    assert "canary" not in error.message


async def test_an_error_in_the_middle_of_a_stream(provider: Provider) -> None:
    error = await failure(provider, "[[sim:error-event,status=500]]", stream=True)

    assert (error.unknown_outcome, classify(error).verdict) == (True, Verdict.RETRY)


@streamed
@pytest.mark.parametrize("marker", ["nul", "surrogate"])
async def test_an_answer_that_is_hard_to_store(
    provider: Provider, marker: str, stream: bool
) -> None:
    answer = await chat(provider, f"[[sim:{marker}]]", stream=stream)

    assert isinstance(answer, Completion)
    assert ("\0" if marker == "nul" else "\ufffd") in (answer.text or "")
    escape = rb"\u0000" if marker == "nul" else rb"\ud83d"
    assert escape in answer.response
    (answer.text or "").encode()


@streamed
async def test_a_byte_at_a_time_ends_at_the_total_limit(provider: Provider, stream: bool) -> None:
    call = asyncio.create_task(chat(provider, "[[sim:drip]]", stream=stream))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.5)


async def test_a_cancelled_stream_is_closed_at_the_provider(provider: Provider, url: str) -> None:
    def count(name: str) -> int:
        return int(httpx.get(f"{url}/stats").json()[name])

    before, in_flight = count("stream_disconnects"), count("in_flight")
    call = asyncio.create_task(chat(provider, "[[sim:stall]]", stream=True))
    await asyncio.to_thread(eventually, lambda: count("in_flight") > in_flight, "it streams")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await asyncio.to_thread(
        eventually, lambda: count("stream_disconnects") == before + 1, "the provider sees it"
    )


async def test_openais_own_client_reads_the_simulated_streams(url: str) -> None:
    client = official.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    text = "Grüße, 世界! And more."

    async with client.chat.completions.stream(
        model="m",
        messages=[{"role": "user", "content": f"[[sim:text={text}]]"}],
        stream_options={"include_usage": True},
    ) as stream:
        chat = await stream.get_final_completion()
    chunks = await client.completions.create(
        model="m",
        prompt=f"[[sim:text={text}]]",
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = [choice.text async for chunk in chunks for choice in chunk.choices]
    with pytest.raises(official.APIError):
        _ = [
            chunk
            async for chunk in await client.completions.create(
                model="m", prompt="[[sim:error-event,status=500]]", stream=True
            )
        ]
    await client.close()

    assert chat.choices[0].message.content == text
    assert (chat.choices[0].finish_reason, chat.usage is not None) == ("stop", True)
    assert "".join(pieces) == text


async def test_our_assembly_of_a_stream_is_what_openais_own_client_makes_of_it(
    url: str, openai: Provider
) -> None:
    prompt = "Say it twice [[sim:output-tokens=40]]"
    client = official.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    ours = await chat(openai, prompt, stream=True)
    async with client.chat.completions.stream(
        model="m",
        messages=[{"role": "user", "content": prompt}],
        stream_options={"include_usage": True},
    ) as stream:
        theirs = await stream.get_final_completion()
    await client.close()

    assert isinstance(ours, Completion)
    assert _shape(json.loads(ours.response)) == _shape(
        json.loads(
            theirs.model_dump_json(
                exclude_none=True, exclude={"choices": {"__all__": {"message": {"parsed"}}}}
            )
        )
    )


@pytest.mark.parametrize(
    ("marker", "verdict", "is_unknown"),
    [
        ("status=429", Verdict.DEFER, False),
        ("status=500", Verdict.RETRY, False),
        ("status=503", Verdict.DEFER, False),
        ("status=529", Verdict.DEFER, False),
        ("status=400", Verdict.FINAL, False),
        ("status=504", Verdict.RETRY, True),
        ("html", Verdict.RETRY, True),
        ("html,status=200", Verdict.RETRY, True),
        ("truncate", Verdict.RETRY, True),
        ("disconnect", Verdict.RETRY, True),
    ],
)
async def test_failures(
    provider: Provider, marker: str, verdict: Verdict, is_unknown: bool
) -> None:
    error = await failure(provider, f"[[sim:{marker}]]")

    assert (classify(error).verdict, error.unknown_outcome) == (verdict, is_unknown)


async def test_the_wait_that_a_refusal_asks_for(provider: Provider) -> None:
    error = await failure(provider, "[[sim:status=429,retry-after-ms=1500]]")

    assert error.retry_after_s == 1.5


async def test_no_answer_in_time(provider: Provider) -> None:
    error = await failure(provider, "[[sim:hang]]", first_byte_timeout_ms=100)

    assert (error.code, error.unknown_outcome) == ("timeout", True)


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
async def test_a_wrong_key(protocol: str, url: str, client: HttpClient) -> None:
    error = await failure(_provider(protocol, url, client, key="wrong"), "a")

    assert error.status == 401
    assert classify(error).verdict is Verdict.NEXT


async def test_a_list_of_prompts(openai: Provider) -> None:
    texts = [f"[[sim:text={n}]]" for n in range(5)]

    answers = await _call(openai, JobKind.COMPLETION, [{"prompt": text} for text in texts])

    completions = [answer for answer in answers if isinstance(answer, Completion)]
    assert [completion.text for completion in completions] == ["0", "1", "2", "3", "4"]
    for completion in completions:
        response = json.loads(completion.response)
        assert [choice["text"] for choice in response["choices"]] == [completion.text]
        assert response["usage"]["prompt_tokens"] == completion.usage.input > 0


async def test_embeddings_together_are_those_of_each_alone(openai: Provider) -> None:
    requests: list[dict[str, object]] = [{"input": text} for text in ("one", "two", "three")]

    together = await _call(openai, JobKind.EMBEDDING, requests)

    alone = [(await _call(openai, JobKind.EMBEDDING, [request]))[0] for request in requests]
    assert [_vector(answer) for answer in together] == [_vector(answer) for answer in alone]


def _vector(answer: Answer) -> list[float]:
    assert isinstance(answer, Completion)
    [item] = json.loads(answer.response)["data"]
    assert item["index"] == 0
    vector = item["embedding"]
    assert isinstance(vector, list)
    return vector
