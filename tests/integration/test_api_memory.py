"""What an API process needs of memory while clients ask too much of it, on every endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import orjson
import psutil
import pytest
import sqlalchemy as sa
from tests.api_server import ApiServer, api_server, new_tenant
from tests.processes import worker_environment

from promptfleet.api import create_app
from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.tables import jobs

MIB = 1024 * 1024
# In all, whatever they are sent: bodies under 32 MiB are held whole, a few at once.
ROOM = 150 * MIB
DEPTH = 10_000
UPLOADED = 5_000
CLIENTS = 4
LARGE = b'{"model": "small", "prompt": "%s"}' % (b"x" * (33 * MIB))
DEEP = b'{"model": "small", "prompt": ' + b"[" * DEPTH + b"]" * DEPTH + b"}"
JSON = {"content-type": "application/json"}
FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["small"]
[models.small]
deployments = [{ base_url = "http://127.0.0.1:9/v1" }]
"""


def endpoints() -> list[str]:
    """Every path that takes JSON, with ids of nothing."""
    return [
        path.format_map(dict.fromkeys(("key_id", "batch_id", "response_id"), "0" * 32))
        for path, item in create_app(Settings()).openapi()["paths"].items()
        if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {})
    ]


@pytest.fixture(scope="module")
def server(
    engine: sa.Engine, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    directory: Path = tmp_path_factory.mktemp("api-memory")
    (directory / "fleet.toml").write_text(FLEET)
    env = worker_environment(
        database_url=engine.url.render_as_string(hide_password=False),
        broker_url=valkey.url,
        config=directory / "fleet.toml",
    )
    with api_server(directory, env) as running:
        yield running


@pytest.fixture(scope="module")
def key(server: ApiServer, engine: sa.Engine) -> str:
    made = new_tenant(engine).key
    with server.client(made) as client:  # so that what a first request imports is there
        assert client.post("/v1/jobs", json={"prompt": "Hello"}).status_code == 202
    return made


@contextmanager
def watched(server: ApiServer) -> Iterator[Callable[[], int]]:
    """Tells the most bytes that the process has had since, beyond those of the beginning."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    highest = before
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest - before
    finally:
        done.set()
        watcher.join()


@pytest.mark.parametrize("with_key", [True, False], ids=["key", "no-key"])
@pytest.mark.parametrize("path", endpoints())
def test_a_body_beyond_the_limit(path: str, server: ApiServer, key: str, with_key: bool) -> None:
    expected = {413} if with_key else {401, 413}
    with watched(server) as grown, server.client(key if with_key else None) as client:
        answer = client.post(path, content=LARGE, headers=JSON)
        assert answer.status_code in expected, answer.text
        assert grown() < 16 * MIB  # refused by its length, before it is read
        pieces = (LARGE[start : start + MIB] for start in range(0, len(LARGE), MIB))
        answer = client.post(path, content=pieces, headers=JSON)
        assert answer.status_code in expected, answer.text
        assert grown() < ROOM


@pytest.mark.parametrize("path", endpoints())
def test_a_body_that_is_too_deep(path: str, server: ApiServer, key: str) -> None:
    with watched(server) as grown, server.client(key) as client:
        answer = client.post(path, content=DEEP, headers=JSON)
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["code"] == "too_deep"
        assert grown() < 16 * MIB


def test_all_of_it_at_once(server: ApiServer, key: str) -> None:
    """And who asks for little meanwhile is answered."""

    def ask(path: str) -> set[int]:
        with server.client(key) as client:
            return {client.post(path, content=c, headers=JSON).status_code for c in (LARGE, DEEP)}

    with (
        watched(server) as grown,
        ThreadPoolExecutor(8) as pool,
        server.client(key) as client,
    ):
        asked = [pool.submit(ask, path) for path in endpoints()]
        while not all(one.done() for one in asked):
            assert client.post("/v1/jobs", json={"prompt": "Hello"}).status_code == 202
        assert {status for one in asked for status in one.result()} == {413, 422}
        assert grown() < ROOM


def test_a_long_upload(server: ApiServer, key: str, engine: sa.Engine) -> None:
    before = count(engine)
    with watched(server) as grown:
        assert upload(server, key, UPLOADED) == CLIENTS * UPLOADED
        assert grown() < ROOM
    assert count(engine) - before == CLIENTS * UPLOADED


def upload(server: ApiServer, key: str, jobs: int) -> int:
    """How many ids came back for so many jobs of several clients at once."""
    line = orjson.dumps({"prompt": "Hello " * 20, "metadata": {"n": 1}}) + b"\n"

    def send() -> int:
        pieces = (line * 100 for _ in range(jobs // 100))
        headers = {"content-type": "application/x-ndjson"}
        with (
            server.client(key) as client,
            client.stream("POST", "/v1/jobs", content=pieces, headers=headers) as answer,
        ):
            return sum(1 for told in answer.iter_lines() if '"id"' in told)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(one.result() for one in [pool.submit(send) for _ in range(CLIENTS)])


def count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).select_from(jobs)
        return int(connection.execute(query).scalar_one())
