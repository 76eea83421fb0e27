"""The official `openai` package, unchanged, against a real API, a real worker and a provider."""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import sqlalchemy as sa
from openai.types.chat import ChatCompletionChunk
from tests.api_server import ApiServer, Tenant, api_server, new_tenant
from tests.docs.pages import ROOT, blocks
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.rows import job_row
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.store.tables import jobs

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[retry]
retry_attempts = 1
retry_delay_ms = 20
[breaker]
min_calls = 10000
retries_per_s = 1000
[tiers.basic]
models = ["small"]
[tiers.other]
models = ["large"]
[models.small]
price_as = "openai/gpt-4o-mini"
deployments = [{{ base_url = "{url}/v1", model = "sim-small" }}]
[models.large]
deployments = [{{ base_url = "{url}/v1", model = "sim-large", stream = true }}]
[models.claude]
deployments = [{{ base_url = "{url}/v1", provider = "anthropic" }}]
[models.many]
deployments = [{{ base_url = "{url}/v1", prompts_per_request = 8 }}]
[models.real]
deployments = [{{ base_url = "{real}/v1", model = "smollm2-135m" }}]
"""
TIERS = ("basic", "other")
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openai-sdk")


@pytest.fixture(scope="module")
def simulated(directory: Path) -> Iterator[Provider]:
    with provider(directory, "--latency-ms", "5", "--tokens-per-s", "500") as running:
        yield running


@pytest.fixture(scope="module")
def real_model(directory: Path) -> Iterator[str]:
    """A small language model behind llama.cpp's server."""
    flags = ["--port", "0", "--slots", "1", "--ctx", "1024"]
    argv = [sys.executable, "-m", "promptfleet.local_model", *flags]
    with Process(argv, log=directory / "model.log", ready="listening on ") as process:
        found = re.search(r"listening on (http://\S+)", process.output)
        assert found
        yield found[1]


@pytest.fixture(scope="module")
def env(
    engine: sa.Engine,
    valkey: EmbeddedValkey,
    simulated: Provider,
    real_model: str,
    directory: Path,
) -> dict[str, str]:
    config = directory / "fleet.toml"
    config.write_text(FLEET.format(url=simulated.url, real=real_model))
    return worker_environment(
        database_url=engine.url.render_as_string(hide_password=False),
        broker_url=valkey.url,
        config=config,
    )


@pytest.fixture(scope="module")
def server(env: dict[str, str], directory: Path) -> Iterator[ApiServer]:
    with (
        start_worker(TIERS, name="sdk", env=env, log=directory / "worker.log"),
        api_server(directory, env) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def tenant(engine: sa.Engine) -> Tenant:
    return new_tenant(engine)


@pytest.fixture(scope="module")
def client(server: ApiServer, tenant: Tenant) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=tenant.key) as made:
        yield made


def ask(text: str) -> Any:
    """Messages that no other test sends."""
    return [{"role": "user", "content": f"{text} {uuid.uuid4().hex}"}]


def jobs_of(engine: sa.Engine, tenant: str) -> int:
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.tenant == tenant)
        return int(connection.execute(query).scalar_one())


# -- chat ------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="small", messages=ask("Say hello"), max_tokens=7, temperature=0.1, user="somebody"
    )
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.model == "sim-small"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    headers = raw.headers
    assert uuid.UUID(headers["x-promptfleet-job"])
    assert headers["x-promptfleet-tier"] == "basic"
    assert headers["x-promptfleet-model"] == "sim-small"
    assert headers["x-promptfleet-cache"] == "miss"
    assert int(headers["openai-processing-ms"]) >= int(headers["x-promptfleet-provider-ms"]) >= 5
    assert answer._request_id == headers["x-request-id"]
    assert int(headers["x-ratelimit-remaining-requests"]) > 0


def test_a_tier_is_a_model(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tier/other", messages=ask("Hi"))
    assert raw.headers["x-promptfleet-tier"] == "other"
    assert raw.parse().model == "sim-large"


def test_what_the_fleet_does_not_know_goes_to_the_provider(
    client: openai.OpenAI, engine: sa.Engine
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="small",
        messages=ask("Hi"),
        frequency_penalty=0.5,
        metadata={"run": "7"},
        stop=None,
        n=1,
        extra_body={"top_k": 3, "nested": {"z": 1, "a": [None]}},
        tools=TOOLS,
    )
    job = job_row(engine, uuid.UUID(raw.headers["x-promptfleet-job"]))
    request = job["request"]
    assert request["top_k"] == 3
    assert request["frequency_penalty"] == 0.5
    assert list(request["nested"]) == ["z", "a"]
    assert request["tools"] == TOOLS
    assert request.keys() == {"messages", "frequency_penalty", "top_k", "nested", "tools"}
    assert job["metadata"] == {"run": "7"}


def test_json_schema(client: openai.OpenAI, engine: sa.Engine) -> None:
    schema: Any = {"type": "object", "properties": {"z": {}, "answer": {"type": "string"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    raw = client.chat.completions.with_raw_response.create(
        model="small", messages=ask("Hi"), response_format=form
    )
    content = raw.parse().choices[0].message.content
    assert content is not None
    assert content.startswith('{"answer":')
    stored = job_row(engine, uuid.UUID(raw.headers["x-promptfleet-job"]))["request"]
    properties = stored["response_format"]["json_schema"]["schema"]["properties"]
    assert list(properties) == ["z", "answer"]  # the order in which a model answers


def test_options_of_the_fleet(client: openai.OpenAI, engine: sa.Engine) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="small",
        messages=ask("Hi"),
        extra_headers={"x-promptfleet-priority": "3", "x-promptfleet-cache": "off"},
        extra_body={
            "promptfleet": {"tier": "other", "metadata": {"a": 1}, "deadline_s": 30, "priority": 9}
        },
    )
    job = job_row(engine, uuid.UUID(raw.headers["x-promptfleet-job"]))
    assert job["priority"] == 9
    assert job["tier"] == "other"
    assert job["model"] == "small"
    assert job["metadata"] == {"a": 1}
    assert raw.headers["x-promptfleet-cache"] == "off"
    assert 25 < (job["deadline"] - job["created_at"]).total_seconds() < 35
    assert "promptfleet" not in job["request"]


def test_a_cached_answer_costs_nothing(client: openai.OpenAI) -> None:
    messages = ask("Say it again")
    first = client.chat.completions.with_raw_response.create(model="small", messages=messages)

    def again() -> Any:  # the cache is filled behind the answer
        raw = client.chat.completions.with_raw_response.create(model="small", messages=messages)
        return raw if raw.headers["x-promptfleet-cache"] == "hit" else None

    raw = eventually(again, "the cache answers")
    assert raw.parse().choices == first.parse().choices
    assert raw.headers["x-promptfleet-cost-usd"] == "0"


def test_an_idempotency_key(client: openai.OpenAI, engine: sa.Engine) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    messages = ask("Once")
    create = client.chat.completions.with_raw_response.create
    first = create(model="small", messages=messages, extra_headers=key)
    second = create(model="small", messages=messages, extra_headers=key)
    assert first.headers["x-promptfleet-job"] == second.headers["x-promptfleet-job"]
    assert second.headers["idempotent-replayed"] == "true"
    assert second.parse() == first.parse()
    with pytest.raises(openai.UnprocessableEntityError, match="key"):
        create(model="small", messages=ask("Twice"), extra_headers=key)


def test_anthropic_answers_in_openai_s_words(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="claude", messages=ask("Hi"), max_tokens=3)
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    chunks = list(
        client.chat.completions.create(
            model="claude",
            messages=ask("Hi"),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


# -- streams ---------------------------------------------------------------------------------


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_stream_comes_as_the_whole_answer_would(client: openai.OpenAI) -> None:
    messages = ask("Tell me a story of many words, one after the other")
    chunks = list(client.chat.completions.create(model="small", messages=messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len(chunks) > 3
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    whole = client.chat.completions.create(model="small", messages=messages)
    assert text_of(chunks) == whole.choices[0].message.content


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="small", messages=ask("Hi"), stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.usage is not None
    assert final.usage.completion_tokens > 0
    assert final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_a_stream_names_its_job_at_once(client: openai.OpenAI, engine: sa.Engine) -> None:
    messages = ask("[[sim:latency-ms=4000]] slow")
    with client.chat.completions.with_streaming_response.create(
        model="small", messages=messages, stream=True
    ) as response:
        job_id = uuid.UUID(response.headers["x-promptfleet-job"])
        assert job_row(engine, job_id)["finished_at"] is None
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_an_early_refusal_of_a_stream_has_its_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="small", messages=ask("[[sim:status=400]]"), stream=True
        )


def test_a_stream_that_fails_in_the_middle_raises(client: openai.OpenAI) -> None:
    messages = ask("[[sim:error-event,latency-ms=100]] one two three four five six")
    seen: list[ChatCompletionChunk] = []
    stream = client.chat.completions.create(model="small", messages=messages, stream=True)
    with pytest.raises(openai.APIError) as raised:
        seen.extend(stream)
    assert isinstance(raised.value.body, dict)
    assert raised.value.body.keys() == {"message", "type", "param", "code"}
    assert text_of(seen)


def test_a_stream_that_begins_anew_goes_on_where_it_was(client: openai.OpenAI) -> None:
    messages = ask("[[sim:truncate,times=1]] one two three four five six seven eight nine ten")
    chunks = list(client.chat.completions.create(model="small", messages=messages, stream=True))
    whole = client.chat.completions.create(model="small", messages=messages)
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_asynchronous_client(server: ApiServer, tenant: Tenant) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=tenant.key) as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="small", messages=ask(f"{n}")) for n in range(9))
        )
        assert len({answer.id for answer in answers}) == 9
        stream = await client.chat.completions.create(
            model="tier/other", messages=ask("Hi"), stream=True
        )
        assert text_of([chunk async for chunk in stream])
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="none", messages=ask("Hi"))


# -- completions and embeddings --------------------------------------------------------------


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="small", prompt=f"Go on {uuid.uuid4()}", max_tokens=4)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    several = client.completions.create(model="many", prompt=["one", "two", "three"], best_of=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    chunks = list(client.completions.create(model="small", prompt="Go on", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) != ""
    assert chunks[-1].choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="a stream has one prompt"):
        client.completions.create(model="small", prompt=["a", "b"], stream=True)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2], [3]]])
def test_tokens_are_prompts_too(client: openai.OpenAI, engine: sa.Engine, prompt: Any) -> None:
    """The simulated provider reads texts only: its refusal shows that they got there."""
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="small", prompt=prompt)
    job_id = uuid.UUID(raised.value.response.headers["x-promptfleet-job"])
    assert job_row(engine, job_id)["request"] == {"prompt": prompt}


def test_embeddings(client: openai.OpenAI) -> None:
    texts = [f"{uuid.uuid4()}", "second"]
    as_floats = client.embeddings.create(model="small", input=texts, encoding_format="float")
    as_usual = client.embeddings.create(model="small", input=texts)  # Base64, within
    assert [item.index for item in as_usual.data] == [0, 1]
    for usual, floats in zip(as_usual.data, as_floats.data, strict=True):
        assert usual.embedding == pytest.approx(floats.embedding, abs=1e-6)
    assert len(as_usual.data[0].embedding) == 64
    assert as_usual.usage.prompt_tokens > 0
    one = client.embeddings.create(model="small", input="alone", dimensions=8)
    assert len(one.data[0].embedding) == 8


# -- models ----------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    tiers = ["tier/basic", "tier/other", "tier/auto"]
    assert names == ["small", "large", "claude", "many", "real", *tiers]
    for name in ("small", "tier/basic"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("tier/none")
    assert raised.value.code == "model_not_found"


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "error", "status", "code"),
    [
        ("status=400", openai.BadRequestError, 400, "invalid_request_error"),
        (
            "status=400,code=context_length_exceeded",
            openai.BadRequestError,
            400,
            "context_length_exceeded",
        ),
        ("status=404", openai.NotFoundError, 404, "invalid_request_error"),
        ("status=403", openai.PermissionDeniedError, 403, "invalid_request_error"),
        ("status=422", openai.UnprocessableEntityError, 422, "invalid_request_error"),
        ("status=401", openai.InternalServerError, 502, "invalid_api_key"),
        ("status=500", openai.InternalServerError, 502, "server_error"),
        ("truncate", openai.InternalServerError, 502, "connection_lost"),
    ],
)
def test_what_the_provider_refuses(
    client: openai.OpenAI, marker: str, error: type[openai.APIStatusError], status: int, code: str
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(model="small", messages=ask(f"[[sim:{marker}]]"))
    assert raised.value.status_code == status
    assert raised.value.code == code
    assert isinstance(raised.value.body, dict)
    assert raised.value.body.keys() == {"message", "type", "param", "code"}
    headers = raised.value.response.headers
    assert uuid.UUID(headers["x-promptfleet-job"])
    assert raised.value.request_id
    assert headers["x-should-retry"] == "false"


def test_too_many_requests(client: openai.OpenAI) -> None:
    messages = ask("[[sim:status=429,retry-after-ms=60000]]")
    with pytest.raises(openai.RateLimitError) as raised:
        client.with_options(max_retries=0).chat.completions.create(
            model="small", messages=messages, extra_body={"promptfleet": {"deadline_s": 2}}
        )
    assert int(raised.value.response.headers["retry-after"]) > 0
    assert raised.value.type == "rate_limit_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"n": 2}, "n"),
        ({"model": 7}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"metadata": "x"}, "metadata"),
        ({"promptfleet": {"teir": "x"}}, "promptfleet"),
        ({"promptfleet": {"priority": 99}}, "priority"),
        ({"promptfleet": {"tier": "none"}}, "tier"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.post(
            "/chat/completions",
            cast_to=object,
            body={"model": "small", "messages": ask("Hi"), **body},
        )
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"


def test_keys_and_scopes(server: ApiServer, engine: sa.Engine) -> None:
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="pf_nonsense")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    reader = new_tenant(engine, "read")
    reading = openai.OpenAI(base_url=f"{server.url}/v1", api_key=reader.key)
    assert list(reading.models.list())
    with pytest.raises(openai.PermissionDeniedError):
        reading.chat.completions.create(model="small", messages=ask("Hi"))
    assert jobs_of(engine, reader.name) == 0


# -- responses -------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI, engine: sa.Engine) -> None:
    raw = client.responses.with_raw_response.create(
        model="small",
        instructions="Be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": f"Hi {uuid.uuid4()}"}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
        max_output_tokens=5,
        temperature=0.5,
        metadata={"run": "1"},
        text={"format": {"type": "json_schema", "name": "reply", "schema": {"type": "object"}}},
        tools=[{"type": "function", "name": "weather", "parameters": {}, "strict": False}],
    )
    response = raw.parse()
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens == 5
    assert response.instructions == "Be brief"
    assert response.metadata == {"run": "1"}
    assert response.temperature == 0.5
    request = job_row(engine, uuid.UUID(raw.headers["x-promptfleet-job"]))["request"]
    assert request["messages"][0] == {"role": "system", "content": "Be brief"}
    assert [message["role"] for message in request["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
    ]
    assert request["max_completion_tokens"] == 5
    assert request["response_format"]["json_schema"]["name"] == "reply"
    assert request["tools"][0]["function"]["name"] == "weather"
    assert client.responses.retrieve(response.id).output_text == response.output_text


def test_a_response_in_the_background(client: openai.OpenAI) -> None:
    text = f"[[sim:latency-ms=300]] later {uuid.uuid4()}"
    response = client.responses.create(model="small", input=text, background=True)
    assert response.status == "queued"
    assert response.background
    assert response.output == []

    def ended() -> Any:
        found = client.responses.retrieve(response.id)
        return None if found.status in {"queued", "in_progress"} else found

    found = eventually(ended, "the response is complete")
    assert found.status == "completed"
    assert "later" in found.output_text
    assert found.model == "sim-small"
    assert found.created_at == pytest.approx(response.created_at, abs=5)


def test_a_response_is_cancelled(client: openai.OpenAI) -> None:
    text = f"[[sim:latency-ms=20000]] never {uuid.uuid4()}"
    response = client.responses.create(model="small", input=text, background=True)
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.retrieve(response.id).status == "cancelled"
    assert client.responses.cancel(response.id).status == "cancelled"


def test_a_response_is_deleted(client: openai.OpenAI, engine: sa.Engine) -> None:
    text = f"[[sim:latency-ms=20000]] kept {uuid.uuid4()}"
    response = client.responses.create(model="small", input=text, background=True)
    with pytest.raises(openai.ConflictError):
        client.responses.delete(response.id)
    client.responses.cancel(response.id)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(response.id)
    job_id = uuid.UUID(response.id.removeprefix("resp_"))
    with engine.connect() as connection:
        left = connection.execute(
            sa.text(
                "SELECT (SELECT count(*) FROM jobs WHERE id = :id)"
                " + (SELECT count(*) FROM results WHERE job_id = :id)"
            ),
            {"id": job_id},
        )
        assert left.scalar_one() == 0


def test_a_response_fails(client: openai.OpenAI) -> None:
    text = f"[[sim:status=400]] {uuid.uuid4()}"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="small", input=text)
    response = client.responses.create(model="small", input=text, background=True)

    def failed() -> Any:
        found = client.responses.retrieve(response.id)
        return found if found.status == "failed" else None

    found = eventually(failed, "the response fails")
    assert found.error is not None
    assert found.error.message


def test_a_response_as_a_stream(client: openai.OpenAI) -> None:
    text = f"one two three four five six {uuid.uuid4()}"
    with client.responses.stream(model="small", input=text) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text
    assert final.usage is not None
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": ""}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, None),
        ({"background": 1}, "background"),
    ],
)
def test_what_responses_can_not_do(
    client: openai.OpenAI, body: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/responses", cast_to=object, body={"model": "small", "input": "Hi", **body})
    assert param is None or raised.value.param == param


def test_responses_of_others_do_not_exist(
    client: openai.OpenAI, engine: sa.Engine, server: ApiServer
) -> None:
    mine = client.responses.create(model="small", input=f"Mine {uuid.uuid4()}")
    other = new_tenant(engine)
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key=other.key)
    for verb in (
        theirs.responses.retrieve,
        theirs.responses.cancel,
        theirs.responses.delete,
    ):
        for id_ in (mine.id, f"resp_{uuid.uuid4().hex}", "resp_x", "x"):
            with pytest.raises(openai.NotFoundError) as raised:
                verb(id_)
            assert raised.value.body == {
                "message": "There is no such response.",
                "type": "invalid_request_error",
                "param": None,
                "code": "not_found",
            }


# -- patience --------------------------------------------------------------------------------


def test_who_waits_too_long_is_told_the_job(
    client: openai.OpenAI, engine: sa.Engine, server: ApiServer
) -> None:
    other = new_tenant(engine)
    hasty = openai.OpenAI(base_url=f"{server.url}/v1", api_key=other.key, timeout=1)
    with pytest.raises(openai.InternalServerError) as raised:
        hasty.chat.completions.create(
            model="small", messages=ask("[[sim:latency-ms=2500,text=At last]]")
        )
    assert raised.value.status_code == 504
    assert raised.value.code == "still_running"
    job_id = raised.value.response.headers["x-promptfleet-job"]
    assert job_id in raised.value.message
    with server.client(other.key) as http:
        job = http.get(f"/v1/jobs/{job_id}?wait=20").json()
    assert job["state"] == "succeeded"
    assert job["result"]["text"].startswith("At last")
    assert jobs_of(engine, other.name) == 1  # the client did not try again


@pytest.mark.parametrize("cancels", [False, True])
def test_a_client_that_leaves(server: ApiServer, engine: sa.Engine, *, cancels: bool) -> None:
    other = new_tenant(engine)
    headers = {"x-promptfleet-cancel-on-disconnect": "1"} if cancels else {}
    body = {"model": "small", "messages": ask("[[sim:latency-ms=3000]] long")}
    with (
        server.client(other.key) as http,
        pytest.raises(httpx.ReadTimeout),
    ):
        http.post("/v1/chat/completions", json=body, headers=headers, timeout=0.5)
    with engine.connect() as connection:
        query = sa.select(jobs.c.id).where(jobs.c.tenant == other.name)
        [job_id] = connection.execute(query).scalars()
    state = eventually(
        lambda: job_row(engine, job_id)["finished_at"] and job_row(engine, job_id)["state"],
        "the job ends",
    )
    assert state == ("cancelled" if cancels else "succeeded")


# -- a real model ----------------------------------------------------------------------------


def test_a_real_model(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Count from one to ten."}]
    usual: Any = {"model": "real", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**usual)
    assert whole.usage is not None
    assert 1 < whole.usage.completion_tokens <= 8
    chunks = list(
        client.chat.completions.create(
            **usual,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"promptfleet": {"cache": "off"}},
        )
    )
    assert len(chunks) > 5
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    reply = client.chat.completions.create(
        model="real", messages=messages, response_format=form, max_tokens=40
    )
    assert isinstance(orjson.loads(reply.choices[0].message.content or "")["n"], int)
    response = client.responses.create(
        model="real", input="Count to ten.", max_output_tokens=4, temperature=0
    )
    assert response.status == "incomplete"
    assert response.output_text
    text = client.completions.create(model="real", prompt=["One, two,", "A, b,"], max_tokens=3)
    assert all(choice.text for choice in text.choices)


# -- the documentation -----------------------------------------------------------------------


def test_the_documented_script(
    server: ApiServer,
    tenant: Tenant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", tenant.key)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/howto/use-the-openai-sdk.md", "python"):
        code = block.code.replace("Write a novel", "[[sim:latency-ms=2000]] Write a novel")
        exec(compile(code, block.page, "exec"), names)  # noqa: S102 - our own page
    names["client"].close()
    assert names["answer"].choices[0].message.content
    assert names["job"]["state"] == "succeeded"
    assert "sim-small" in capsys.readouterr().out
