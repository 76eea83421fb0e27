"""`tier="auto"` and escalation through a real API and a real worker, with its queues."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import httpx
import openai
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from tests.api_server import ApiServer, Tenant, api_server, new_tenant
from tests.integration.test_streaming import read_events
from tests.processes import provider, start_worker, worker_environment
from tests.rows import job_row, ledger_rows, result_rows
from tests.waiting import eventually

from promptfleet import Client
from promptfleet.dev_stack import EmbeddedValkey
from promptfleet.regret import Regret, measure_regret
from promptfleet.tier_options import Escalation
from promptfleet_shared.settings import Settings

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[tiers.basic]
models = ["small"]
max_tokens = 16
conditions = {{ complexity = "low" }}
[tiers.top]
models = ["large"]
conditions = {{ complexity = ["medium", "high"] }}
[routing.shadow]
share = 1.0
[models.small]
price_as = "openai/gpt-4o-mini"
deployments = [{{ base_url = "{url}/v1", model = "sim-small" }}]
[models.large]
price_as = "openai/gpt-4o"
deployments = [{{ base_url = "{url}/v1", model = "sim-large" }}]
"""
TOO_SHORT: Escalation = {"min_chars": 1_000_000}
HARD = "Prove step by step why x^2 = 2 has no rational solution. Compare two proofs."


@pytest.fixture(scope="module")
def server(
    engine: sa.Engine, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    directory = tmp_path_factory.mktemp("tiers")
    with provider(directory, "--latency-ms", "5", "--tokens-per-s", "400") as simulated:
        config = directory / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.url))
        env = worker_environment(
            database_url=engine.url.render_as_string(hide_password=False),
            broker_url=valkey.url,
            config=config,
        )
        with (
            start_worker(("basic", "top"), name="tiers", env=env, log=directory / "worker.log"),
            api_server(directory, env) as running,
        ):
            yield running


@pytest.fixture
def tenant(engine: sa.Engine) -> Tenant:
    return new_tenant(engine)


@pytest.fixture
def in_python(
    server: ApiServer,
    engine: sa.Engine,
    valkey: EmbeddedValkey,
    tmp_path: Path,
) -> Iterator[Client]:
    url = engine.url.render_as_string(hide_password=False)
    config = tmp_path / "fleet.toml"
    config.write_text(FLEET.format(url="http://127.0.0.1:1"))
    settings = Settings(
        database_url=SecretStr(url), broker_url=SecretStr(valkey.url), config=config
    )
    with Client(settings) as made:
        yield made


@pytest.fixture
def client(server: ApiServer, tenant: Tenant) -> Iterator[httpx.Client]:
    with server.client(tenant.key) as made:
        yield made


def submit(client: httpx.Client, **fields: object) -> uuid.UUID:
    answer = client.post("/v1/jobs", json=fields)
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    client.get(f"/v1/jobs/{job_id}", params={"wait": 20})
    return uuid.UUID(job_id)


def test_jobs_are_sorted_into_tiers(client: httpx.Client, engine: sa.Engine) -> None:
    easy = submit(client, prompt="What is the capital of France?", tier="auto")
    hard = submit(client, prompt=HARD, tier="auto")
    said = submit(client, prompt="Hi", tier="auto", attributes={"complexity": "high"})

    rows = [result_rows(engine, job_id)[0] for job_id in (easy, hard, said)]
    assert [row["tier"] for row in rows] == ["basic", "top", "top"]
    assert [row["model"] for row in rows] == ["sim-small", "sim-large", "sim-large"]
    assert [row["decision"]["tier"]["by"] for row in rows] == ["rules", "rules", "attributes"]
    assert rows[0]["output_tokens"] <= 16


def test_a_bad_answer_goes_to_the_next_queue(client: httpx.Client, engine: sa.Engine) -> None:
    moved = submit(client, prompt="Hi", tier="basic", escalate_on={"min_chars": 1_000_000})

    (row,) = result_rows(engine, moved)
    assert (row["state"], row["tier"], row["calls"]) == ("succeeded", "top", 2)
    told = row["decision"]["tier"]
    assert told["escalated_from"] == [{"tier": "basic", "model": "sim-small", "check": "min_chars"}]
    assert told["failed_check"] == "min_chars"
    bill = {(r["tier"], r["model"]): r["cost_usd"] for r in ledger_rows(engine, moved)}
    assert bill.keys() == {("basic", "sim-small"), ("top", "sim-large")}
    assert all(isinstance(cost, Decimal) and cost > 0 for cost in bill.values())


def test_a_streams_bad_answer_is_taken_back_when_the_next_tier_answers(
    client: httpx.Client, engine: sa.Engine
) -> None:
    prompt = f"[[sim:latency-ms=300]] {uuid.uuid4().hex}"
    fields = {"prompt": prompt, "tier": "basic", "stream": True, "escalate_on": TOO_SHORT}
    job_id = client.post("/v1/jobs", json=fields).json()["id"]
    names, text = [], ""
    with client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
        for event in read_events(answer.iter_lines()):
            names.append(event.name)
            match event.name:
                case "token":
                    text += event.data["text"]
                case "reset":
                    text = ""

    (row,) = result_rows(engine, uuid.UUID(job_id))
    assert (row["tier"], row["calls"], row["text"]) == ("top", 2, text)
    assert row["decision"]["tier"]["escalated_from"][0]["check"] == "min_chars"
    assert names[0] == "token"
    assert names.count("reset") == 1
    assert names[-2:] == ["end", "result"]


def test_tokens_of_the_next_tier_restart_the_text(in_python: Client) -> None:
    prompt = f"[[sim:latency-ms=300]] {uuid.uuid4().hex}"
    job = in_python.enqueue_prompt(prompt, tier="basic", stream=True, escalate_on=TOO_SHORT)
    tokens = list(job.tokens(30))

    restarts = [n for n, token in enumerate(tokens) if token.restarts]
    assert len(restarts) == 1
    assert restarts[0] > 0
    assert "".join(tokens[restarts[0] :]) == job.result().text


@pytest.mark.parametrize(("escalate_on", "tier"), [(TOO_SHORT, "top"), (False, "basic")])
def test_openais_streams_tell_only_what_is_final(
    server: ApiServer, tenant: Tenant, engine: sa.Engine, escalate_on: object, tier: str
) -> None:
    """They have no word for an answer that begins anew."""
    prompt = f"[[sim:latency-ms=300]] {uuid.uuid4().hex}"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=tenant.key) as client:
        chunks = list(
            client.chat.completions.create(
                model="tier/basic",
                messages=[{"role": "user", "content": prompt}],
                stream=True,
                extra_body={"promptfleet": {"escalate_on": escalate_on}},
            )
        )
    texts = [text for chunk in chunks for choice in chunk.choices if (text := choice.delta.content)]
    (row,) = result_rows(engine, uuid.UUID(chunks[0].id.removeprefix("chatcmpl-")))
    assert (row["tier"], row["text"]) == (tier, "".join(texts))
    assert (len(texts) == 1) is (tier == "top")
    assert chunks[-1].choices[0].finish_reason is not None


def test_openai_clients_name_it_as_a_model(
    server: ApiServer, tenant: Tenant, engine: sa.Engine
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=tenant.key) as client:
        assert "tier/auto" in [model.id for model in client.models.list()]
        answer = client.chat.completions.with_raw_response.create(
            model="tier/auto",
            messages=[{"role": "user", "content": HARD}],
            extra_body={"promptfleet": {"complexity": "low"}},
        )
    (row,) = result_rows(engine, uuid.UUID(answer.headers["x-promptfleet-job"]))
    assert row["tier"] == "basic"


def test_regret_is_measured(client: httpx.Client, tenant: Tenant, engine: sa.Engine) -> None:
    first = submit(client, prompt="What is the capital of Peru?", tier="auto", cache=False)
    assert job_row(engine, first)["tier"] == "basic"

    def measured() -> list[Regret]:
        with engine.connect() as connection:
            return measure_regret(connection, tenant.name, since_s=600, limit=100)

    (regret,) = eventually(measured, "the second job's result")
    assert (regret.tier, regret.top_tier, regret.pairs) == ("basic", "top", 1)
    assert 0 <= regret.similarity <= 1
    assert regret.usd is not None
    assert regret.top_usd is not None
    assert 0 < regret.usd < regret.top_usd


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"complexity": "hard"}, "complexity"),
        ({"escalate_on": {"function": "os:system"}}, "escalate_on.function"),
        ({"attributes": {"critical_task": 1}}, "attributes.critical_task"),
    ],
)
def test_mistakes_are_named(client: httpx.Client, fields: dict[str, object], param: str) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "Hi", "tier": "auto", **fields})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param
