"""Our providers, over real sockets, against the simulated provider as a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import orjson
import pytest

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Answer, Call, Completion, Provider
from promptfleet_workers.retries import Verdict, classify

KEY = "the-key"


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


async def chat(provider: Provider, text: str, **timers: float) -> Answer:
    request: dict[str, object] = {"messages": [{"role": "user", "content": text}]}
    timeouts = TimeoutOptions.model_validate(timers)
    return (await _call(provider, JobKind.CHAT, [request], timeouts))[0]


async def _call(
    provider: Provider,
    kind: JobKind,
    requests: list[dict[str, object]],
    timeouts: TimeoutOptions | None = None,
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
        )
    )


async def failure(provider: Provider, text: str, **timers: float) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await chat(provider, text, **timers)
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
