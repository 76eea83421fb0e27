"""The API while Postgres and Valkey restart under it, and from end to end with a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from tests.api_server import Tenant, api_server, new_tenant
from tests.processes import provider, start_worker, worker_environment
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(tmp_path / "postgres") as server:
        yield server


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


def _prepared(server: EmbeddedPostgres) -> Tenant:
    engine = make_engine(server.url, application_name="tests")
    migrate(engine)
    tenant = new_tenant(engine)
    engine.dispose()
    return tenant


def test_restarts_of_the_servers(
    own_postgres: EmbeddedPostgres, own_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    tenant = _prepared(own_postgres)
    env = worker_environment(
        database_url=own_postgres.url,
        broker_url=own_valkey.url,
        config=tmp_path / "none.toml",
        database_connect_timeout_s=2,
    )
    del env["PROMPTFLEET_CONFIG"]
    with api_server(tmp_path, env) as server, server.client(tenant.key) as client:

        def submit() -> httpx.Response:
            return client.post("/v1/jobs", json={"prompt": "Hello"})

        accepted = submit().json()["id"]

        own_valkey.stop()
        without_broker = submit()
        assert without_broker.status_code == 202  # the sweeper rings
        assert client.get("/readyz").status_code == 200

        own_postgres.stop()
        for answer in (submit(), client.get(f"/v1/jobs/{accepted}"), client.get("/v1/jobs")):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "store_unavailable"
            assert int(answer.headers["retry-after"]) >= 1
        lines = client.post("/v1/jobs", json=[{"prompt": "a"}, {"prompt": "b"}])
        assert (lines.status_code, lines.json()["error"]["code"]) == (503, "store_unavailable")
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200

        with ThreadPoolExecutor(1) as pool:
            own_postgres.start()
            own_valkey.start()
            eventually(lambda: client.get("/readyz").status_code == 200, "it is ready again")
            eventually(lambda: submit().status_code == 202, "it accepts again")
            wait = pool.submit(client.get, f"/v1/jobs/{accepted}?wait=20")
            with server.client(tenant.key) as other:
                cancelled = other.delete(f"/v1/jobs/{accepted}")
            assert cancelled.json()["state"] == "cancelled"
            assert wait.result().json()["state"] == "cancelled"
        server.process.terminate()
        server.process.wait()
        assert "Hello" not in server.process.output
        assert tenant.key not in server.process.output


def test_from_a_request_to_its_answer(
    settings: Settings, database: sa.Engine, tmp_path: Path
) -> None:
    tenant = new_tenant(database)
    with provider(tmp_path, "--latency-ms", "5") as simulated:
        config = tmp_path / "fleet.toml"
        config.write_text(
            'default_tier = "basic"\n[tiers.basic]\nmodels = ["small"]\n[models.small]\n'
            f'price_as = "openai/gpt-4.1-nano"\n'
            f'[[models.small.deployments]]\nbase_url = "{simulated.base_url}"\n'
        )
        env = worker_environment(
            database_url=settings.database_url.get_secret_value(),
            broker_url=settings.broker_url.get_secret_value(),
            config=config,
        )
        with (
            api_server(tmp_path, env, "--workers", "2") as server,
            start_worker(["basic"], name="e2e", env=env, log=tmp_path / "worker.log"),
            server.client(tenant.key) as client,
        ):
            job = client.post("/v1/jobs", json={"prompt": "Hello there", "max_tokens": 20}).json()
            answer = client.get(f"/v1/jobs/{job['id']}?wait=30")
            items = [{"prompt": f"Hello {n}", "metadata": {"n": n}} for n in range(30)]
            client.post("/v1/jobs", json=items).raise_for_status()
            seen: list[int] = []
            cursor: str | None = None
            while len(seen) < 31:
                wanted = {"wait": "20", **({"after": cursor} if cursor else {})}
                page = client.get("/v1/results", params=wanted).json()
                assert page["data"], seen
                cursor = page["cursor"]
                seen += [result["metadata"].get("n", -1) for result in page["data"]]

    assert answer.json()["state"] == "succeeded", answer.text
    result = answer.json()["result"]
    assert "Hello there" in result["text"]
    assert result["usage"]["output_tokens"] > 0
    assert result["cost_usd"] > 0
    assert answer.headers["x-promptfleet-model"] == "small"
    assert float(answer.headers["x-promptfleet-cost-usd"]) == result["cost_usd"]
    assert sorted(seen) == list(range(-1, 30))
