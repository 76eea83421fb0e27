"""Tenants are apart, and keys open what they say, on every endpoint of the OpenAPI document."""

from __future__ import annotations

import dataclasses
import functools
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from tests.api_server import ApiServer, api_server, new_tenant
from tests.processes import Provider, provider, start_worker, worker_environment
from tests.waiting import eventually

from promptfleet.api import create_app, lifespan
from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.settings import Settings

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[tiers.basic]
models = ["small"]
[models.small]
price_as = "free"
deployments = [{{ base_url = "{url}/v1" }}]
"""
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
OPEN = {"/healthz", "/readyz", "/metrics"}
# Parameters of paths that name nothing of a tenant's.
OF_EVERYBODY = {"model"}
FIRST_BATCH_LINE = (
    '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",'
    ' "body": {"model": "tier/basic", "messages": [{"role": "user", "content": "Hello batch"}]}}'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An endpoint of the document."""

    method: str
    path: str
    content_types: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def ids(self) -> list[str]:
        """The parameters of its path."""
        return re.findall(r"\{(\w+)\}", self.path)

    @property
    def scope(self) -> str | None:
        """What a key must have: the rule that every endpoint keeps to."""
        if self.path in OPEN or self.path.startswith("/v1/models"):
            return None
        if self.path.startswith("/v1/admin"):
            return "admin"
        return "read" if self.method == "GET" else "submit"

    def call(self, client: httpx.Client, values: Mapping[str, str]) -> httpx.Response:
        """Ask it; with as little in a body as it takes to be read."""
        request = self.request(client, values)
        return client.send(request)

    def request(
        self, client: httpx.Client | httpx.AsyncClient, values: Mapping[str, str]
    ) -> httpx.Request:
        path = self.path.format_map(dict.fromkeys(self.ids, "none") | dict(values))
        if "multipart/form-data" in self.content_types:
            form = {"purpose": "batch"}
            return client.build_request(self.method, path, data=form, files={"file": b"{}\n"})
        if self.content_types:
            return client.build_request(self.method, path, json={})
        return client.build_request(self.method, path)


def operations() -> list[Operation]:
    document = create_app(Settings()).openapi()
    return [
        Operation(
            method=method.upper(),
            path=path,
            content_types=tuple(operation.get("requestBody", {}).get("content", ())),
        )
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


ALL = operations()
CLOSED = [operation for operation in ALL if operation.path not in OPEN]
WITH_IDS = [operation for operation in ALL if set(operation.ids) - OF_EVERYBODY]
LISTS = [o for o in CLOSED if o.method == "GET" and not o.ids and "models" not in o.path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api-security")


@pytest.fixture(scope="module")
def simulated(directory: Path) -> Iterator[Provider]:
    with provider(directory) as running:
        yield running


@pytest.fixture(scope="module")
def server(
    engine: sa.Engine, valkey: EmbeddedValkey, simulated: Provider, directory: Path
) -> Iterator[ApiServer]:
    config = directory / "fleet.toml"
    config.write_text(FLEET.format(url=simulated.url))
    env = worker_environment(
        database_url=engine.url.render_as_string(hide_password=False),
        broker_url=valkey.url,
        config=config,
        callback_allow_loopback=True,
        operator_tenant="nobody",
    )
    with (
        start_worker(["basic"], name="security", env=env, log=directory / "worker.log"),
        api_server(directory, env) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def owner(server: ApiServer, engine: sa.Engine) -> Iterator[httpx.Client]:
    with server.client(new_tenant(engine).key) as made:
        yield made


@pytest.fixture(scope="module")
def stranger(server: ApiServer, engine: sa.Engine) -> Iterator[httpx.Client]:
    with server.client(new_tenant(engine).key) as made:
        yield made


@pytest.fixture(scope="module")
def things(owner: httpx.Client) -> dict[str, str]:
    """One of each thing that the owner can have, by the name of its path parameter."""
    job = owner.post("/v1/jobs", json={"prompt": "Hello", "stream": True}).json()["id"]
    ended = owner.get(f"/v1/jobs/{job}?wait=30").json()
    assert ended["state"] == "succeeded", ended
    form = {"purpose": "batch"}
    file = owner.post(
        "/v1/files", data=form, files={"file": ("in.jsonl", FIRST_BATCH_LINE.encode())}
    ).json()["id"]
    batch = owner.post(
        "/v1/batches",
        json={
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
    ).json()["id"]
    eventually(
        lambda: owner.get(f"/v1/batches/{batch}").json()["status"] == "completed",
        "the batch is completed",
    )
    key = owner.post("/v1/admin/keys", json={"name": "spare"}).json()["id"]
    memory = str(uuid.uuid4())
    turn = owner.post("/v1/jobs", json={"prompt": "Hello again", "memory_id": memory}).json()["id"]
    assert owner.get(f"/v1/jobs/{turn}?wait=30").json()["state"] == "succeeded"
    return {
        "job_id": job,
        "response_id": f"resp_{uuid.UUID(job).hex}",
        "file_id": file,
        "batch_id": batch,
        "key_id": key,
        "memory_id": memory,
    }


def missing(thing: str) -> str:
    """An id of the same form, of nothing."""
    nothing = uuid.uuid4()
    match = re.fullmatch(r"(\w+[-_])?[0-9a-f]{32}", thing)
    return str(nothing) if match is None else f"{match[1] or ''}{nothing.hex}"


def told(answer: httpx.Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """All that a client can tell answers apart by, but the moment and the request's own id."""
    headers = [
        (name, value)
        for name, value in answer.headers.multi_items()
        if name not in {"x-request-id", "date"}
    ]
    return answer.status_code, answer.content, headers


# -- another tenant's is as missing ----------------------------------------------------------


def test_the_document_has_what_these_tests_know(things: dict[str, str]) -> None:
    """A new kind of id must be made by `things`."""
    named = {name for operation in WITH_IDS for name in operation.ids}
    assert named - OF_EVERYBODY <= set(things)
    assert len(WITH_IDS) >= 12
    assert len(LISTS) >= 5


@pytest.mark.parametrize("operation", WITH_IDS, ids=str)
def test_a_guessed_id_is_a_missing_one(
    operation: Operation, stranger: httpx.Client, owner: httpx.Client, things: dict[str, str]
) -> None:
    before = owner.get(f"/v1/jobs/{things['job_id']}").content
    guessed = operation.call(stranger, things)
    nothing = {name: missing(thing) for name, thing in things.items()}
    assert guessed.status_code == 404, guessed.text
    assert told(guessed) == told(operation.call(stranger, nothing))
    assert told(guessed) == told(operation.call(owner, nothing))
    assert owner.get(f"/v1/jobs/{things['job_id']}").content == before


def test_the_owner_is_answered_otherwise(owner: httpx.Client, things: dict[str, str]) -> None:
    """So that the tests before can fail; what only reads, since they share these things."""
    for operation in WITH_IDS:
        if operation.method == "GET":
            answer = operation.call(owner, things)
            assert answer.status_code == 200, f"{operation}: {answer.text}"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/batches",
            {
                "input_file_id": "file_id",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            },
        ),
    ],
)
def test_a_guessed_id_in_a_body_is_a_missing_one(
    path: str, body: dict[str, str], stranger: httpx.Client, things: dict[str, str]
) -> None:
    guessed = stranger.post(path, json={k: things.get(v, v) for k, v in body.items()})
    nothing = stranger.post(
        path, json={k: missing(things[v]) if v in things else v for k, v in body.items()}
    )
    assert guessed.status_code == 404
    assert told(guessed) == told(nothing)


@pytest.mark.parametrize(
    ("path", "thing"),
    [
        ("/v1/files?after={}", "file_id"),
        ("/v1/batches?after={}", "batch_id"),
        ("/v1/jobs?batch_id={}", "batch_id"),
        ("/v1/jobs/{}/stream?last_event_id=done", "job_id"),
    ],
)
def test_a_guessed_id_in_a_query_is_a_missing_one(
    path: str, thing: str, stranger: httpx.Client, things: dict[str, str]
) -> None:
    guessed = stranger.get(path.format(things[thing]))
    assert told(guessed) == told(stranger.get(path.format(missing(things[thing]))))
    assert things[thing] not in guessed.text


@pytest.mark.parametrize("operation", LISTS, ids=str)
def test_a_list_has_nothing_of_anybody_else(
    operation: Operation,
    server: ApiServer,
    engine: sa.Engine,
    owner: httpx.Client,
    things: dict[str, str],
) -> None:
    field = "rows" if operation.path == "/v1/costs" else "data"
    assert operation.call(owner, {}).json()[field]
    whoever = new_tenant(engine)
    with server.client(whoever.key) as new:
        answer = operation.call(new, {})
    data = answer.json()[field]
    if operation.path == "/v1/admin/keys":  # the key that asks
        assert [key["tenant"] for key in data] == [whoever.name]
    else:
        assert data == []
    for thing in things.values():
        assert thing not in answer.text


def test_another_tenants_cursor_shows_nothing(owner: httpx.Client, stranger: httpx.Client) -> None:
    for _ in range(2):
        owner.post("/v1/jobs", json={"prompt": "One of two", "tier": "basic"})
    jobs = owner.get("/v1/jobs?limit=1").json()["cursor"]
    results = eventually(
        lambda: owner.get("/v1/results?limit=1").json()["cursor"], "there are results"
    )
    assert stranger.get("/v1/jobs", params={"cursor": jobs}).json()["data"] == []
    assert stranger.get("/v1/results", params={"after": results}).json()["data"] == []


def test_keys_of_other_tenants_are_not_made(owner: httpx.Client) -> None:
    answer = owner.post("/v1/admin/keys", json={"tenant": "somebody"})
    unknown = owner.post("/v1/admin/keys", json={"tenant": "nobody-knows"})
    assert answer.status_code == 403
    assert told(answer) == told(unknown)


# -- what tenants do not share ---------------------------------------------------------------


def test_the_cache_is_not_shared(
    owner: httpx.Client, stranger: httpx.Client, simulated: Provider
) -> None:
    prompt = f"A prompt of both {uuid.uuid4().hex}"
    space = {"namespace": "the same", "mode": "use"}
    body = {"prompt": prompt, "tier": "basic", "temperature": 0, "cache": space}
    caches = []
    for client in (owner, owner, stranger, stranger):
        job = client.post("/v1/jobs", json=body).json()["id"]
        caches.append(client.get(f"/v1/jobs/{job}?wait=30").json()["result"]["cache"])
    assert caches == ["miss", "hit", "miss", "hit"]
    assert simulated.calls_of(prompt) == 2


def test_equal_prompts_at_once_share_no_call(
    owner: httpx.Client, stranger: httpx.Client, simulated: Provider
) -> None:
    prompt = f"A prompt at once {uuid.uuid4().hex}"
    lines = b'{"prompt": "%s", "tier": "basic"}\n' % prompt.encode() * 20
    ndjson = {"content-type": "application/x-ndjson"}
    for client in (owner, stranger):
        assert client.post("/v1/jobs", content=lines, headers=ndjson).status_code == 202
    for client in (owner, stranger):
        eventually(functools.partial(_all_ended, client), "all are answered")
    assert simulated.calls_of(prompt) == 2


def _all_ended(client: httpx.Client) -> bool:
    states = ("queued", "running")
    return not any(client.get("/v1/jobs", params={"state": s}).json()["data"] for s in states)


def test_idempotency_keys_are_not_shared(owner: httpx.Client, stranger: httpx.Client) -> None:
    headers = {"idempotency-key": uuid.uuid4().hex}
    first = owner.post("/v1/jobs", json={"prompt": "Hello"}, headers=headers)
    other = stranger.post("/v1/jobs", json={"prompt": "Something else"}, headers=headers)
    again = owner.post("/v1/jobs", json={"prompt": "Hello"}, headers=headers)
    assert other.status_code == 202
    assert other.json()["id"] != first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in other.headers


# -- keys ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clients(server: ApiServer, engine: sa.Engine) -> Iterator[dict[str, httpx.Client]]:
    """Clients whose keys have one scope each."""
    made = {
        scope: server.client(new_tenant(engine, scope).key) for scope in ("submit", "read", "admin")
    }
    yield made
    for client in made.values():
        client.close()


@pytest.mark.parametrize("operation", CLOSED, ids=str)
def test_a_key_opens_what_its_scope_says(
    operation: Operation, clients: dict[str, httpx.Client], things: dict[str, str]
) -> None:
    nothing = {name: missing(thing) for name, thing in things.items()}
    for scope, client in clients.items():
        answer = operation.call(client, nothing)
        if operation.scope in {None, scope}:
            assert answer.status_code not in {401, 403}, f"{scope}: {answer.text}"
            assert answer.status_code < 500
        else:
            assert answer.status_code == 403, f"{scope}: {answer.text}"
            assert answer.json()["error"]["code"] == "insufficient_scope"


def test_a_reader_can_not_ask_for_a_cancellation(
    clients: dict[str, httpx.Client], things: dict[str, str]
) -> None:
    path = f"/v1/jobs/{things['job_id']}/stream?cancel_on_disconnect=1"
    assert clients["read"].get(path).status_code == 403


@pytest.mark.parametrize("operation", ALL, ids=str)
def test_without_a_key_only_probes_are_answered(operation: Operation, server: ApiServer) -> None:
    with server.client() as client:
        answer = operation.call(client, {})
    if operation.path in OPEN:
        assert answer.status_code == 200
    else:
        check_refused(answer)


def test_keys_that_open_nothing_are_alike(server: ApiServer, engine: sa.Engine) -> None:
    with server.client(new_tenant(engine).key) as admin:
        revoked = admin.post("/v1/admin/keys", json={}).json()
        assert admin.delete(f"/v1/admin/keys/{revoked['id']}").status_code == 200
    answers = []
    for key in (revoked["key"], "pf_" + "A" * 43, "pf_", "sk-none", revoked["key"] + "x"):
        with server.client(key) as client:
            answers.append(client.get("/v1/jobs"))
    for answer in answers:
        check_refused(answer)
        assert told(answer) == told(answers[0])
        assert revoked["key"] not in answer.text


def check_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 401, answer.text
    assert answer.headers["www-authenticate"] == "Bearer"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == "invalid_api_key"


# -- without keys ----------------------------------------------------------------------------


@pytest.fixture
async def keyless(engine: sa.Engine, valkey: EmbeddedValkey) -> AsyncIterator[Any]:
    """The API as `promptfleet dev` runs it, in this process."""
    api = create_app(
        Settings(
            database_url=SecretStr(engine.url.render_as_string(hide_password=False)),
            broker_url=SecretStr(valkey.url),
            api_keyless=True,
        )
    )
    async with lifespan(api):
        yield api


def asking(api: Any, peer: str, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(api, client=(peer, 40_000))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)


async def test_keyless_is_for_this_machine_alone(keyless: Any) -> None:
    for operation in CLOSED:
        for peer in ("203.0.113.7", "10.0.0.1", "::ffff:203.0.113.7", "2001:db8::1", ""):
            async with asking(keyless, peer) as client:
                check_refused(await client.send(operation.request(client, {})))
    for peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        async with asking(keyless, peer) as client:
            assert (await client.get("/v1/jobs")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "10.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
    ],
    ids=str,
)
async def test_keyless_is_not_for_web_pages(keyless: Any, headers: dict[str, str]) -> None:
    async with asking(keyless, "127.0.0.1", **headers) as client:
        check_refused(await client.get("/v1/jobs"))
        check_refused(await client.post("/v1/jobs", json={"prompt": "Hello"}))


async def test_a_key_that_is_none_is_not_keyless(keyless: Any) -> None:
    async with asking(keyless, "127.0.0.1", authorization="Bearer pf_" + "A" * 43) as client:
        check_refused(await client.get("/v1/jobs"))


def test_who_stands_behind_a_proxy_is_not_this_machine(
    engine: sa.Engine, valkey: EmbeddedValkey, directory: Path
) -> None:
    env = worker_environment(
        database_url=engine.url.render_as_string(hide_password=False),
        broker_url=valkey.url,
        config=directory / "fleet.toml",
        api_keyless=True,
    )
    with api_server(directory, env) as running, running.client() as client:
        assert client.get("/v1/jobs").status_code == 200
        forwarded = {"x-forwarded-for": "203.0.113.7"}
        check_refused(client.get("/v1/jobs", headers=forwarded))
