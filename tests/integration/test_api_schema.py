"""The API keeps to the OpenAPI document that it serves: requests that nobody would think of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from schemathesis import checks
from tests.api_server import ApiServer, api_server, new_tenant
from tests.processes import provider, start_worker, worker_environment

from promptfleet.api import create_app
from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.settings import Settings

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 1
[retry]
retry_attempts = 1
retry_delay_ms = 10
[breaker]
enabled = false
[tiers.basic]
models = ["small"]
[models.small]
price_as = "free"
deployments = [{{ base_url = "{url}/v1" }}]
"""
EXAMPLES = 5
ERROR_KEYS = {"message", "type", "param", "code"}
# Those that look at answers. The others judge which requests are to be refused, and take a header
# that is always sent, an unknown parameter or a line among many for a reason.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
DOCUMENT = create_app(Settings()).openapi()
schema = schemathesis.openapi.from_dict(DOCUMENT)


@schemathesis.serializer("application/x-ndjson")
def lines(context: Any, value: Any) -> bytes:
    """One of the values, or several."""
    items = value if isinstance(value, list) else [value]
    return "".join(f"{json.dumps(item)}\n" for item in items).encode()


@pytest.fixture(scope="module")
def server(
    engine: sa.Engine, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    directory: Path = tmp_path_factory.mktemp("api-schema")
    with provider(directory, "--latency-ms", "0") as simulated:
        config = directory / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.url))
        env = worker_environment(
            database_url=engine.url.render_as_string(hide_password=False),
            broker_url=valkey.url,
            config=config,
        )
        with (
            start_worker(["basic"], name="schema", env=env, log=directory / "worker.log"),
            api_server(directory, env) as running,
        ):
            yield running


@pytest.fixture(scope="module")
def key(server: ApiServer, engine: sa.Engine) -> str:
    """Of a tenant that has a result, so that nobody waits for a first one."""
    made = new_tenant(engine).key
    with server.client(made) as client:
        job = client.post("/v1/jobs", json={"prompt": "Hello"}).json()["id"]
        assert client.get(f"/v1/jobs/{job}?wait=30").json()["state"] == "succeeded"
    return made


def test_the_document_is_served(server: ApiServer) -> None:
    with server.client() as client:
        assert client.get("/openapi.json").json() == DOCUMENT
        page = client.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
)
def test_every_answer_is_one_of_the_document(
    case: schemathesis.Case[Any], server: ApiServer, key: str
) -> None:
    answer = case.call_and_validate(
        base_url=server.url,
        headers={"authorization": f"Bearer {key}"},
        timeout=30,
        checks=CHECKS,
    )
    # `default` stands for every refusal, and for nothing else.
    declared = case.operation.definition.raw["responses"]
    assert answer.status_code >= 400 or str(answer.status_code) in declared
    assert answer.headers["x-request-id"]
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == ERROR_KEYS
