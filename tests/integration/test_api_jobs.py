"""Jobs over HTTP: one and many, looked at, waited for, listed and cancelled."""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
import psutil
import pytest
import sqlalchemy as sa
from tests.api_server import ApiServer, Tenant, api_server, new_tenant
from tests.processes import worker_environment
from tests.rows import claim_one, job_row, outcome
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.jobs import TurnTaken
from promptfleet_shared.store.conversations import Ask, take_conversations
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.tables import jobs

FLEET = """
default_tier = "standard"
[tiers.basic]
models = ["small"]
[tiers.standard]
models = ["small"]
[models.small]
[[models.small.deployments]]
base_url = "http://127.0.0.1:9/v1"
"""
ERROR_KEYS = {"message", "type", "param", "code"}
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(
    engine: sa.Engine, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    directory = tmp_path_factory.mktemp("api")
    (directory / "fleet.toml").write_text(FLEET)
    env = worker_environment(
        database_url=engine.url.render_as_string(hide_password=False),
        broker_url=valkey.url,
        config=directory / "fleet.toml",
        database_pool_size=2,
    )
    with api_server(directory, env) as running:
        yield running


@pytest.fixture
def tenant(engine: sa.Engine) -> Tenant:
    return new_tenant(engine)


@pytest.fixture
def client(server: ApiServer, tenant: Tenant) -> Iterator[httpx.Client]:
    with server.client(tenant.key) as made:
        yield made


@pytest.fixture
def stranger(server: ApiServer, engine: sa.Engine) -> Iterator[httpx.Client]:
    """A client of another tenant."""
    with server.client(new_tenant(engine).key) as made:
        yield made


def submit(client: httpx.Client, **fields: object) -> str:
    answer = client.post("/v1/jobs", json={"prompt": "Hello", "tier": "basic", **fields})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def end(engine: sa.Engine, job_id: str, **fields: Any) -> None:
    """Let the job end as a worker would."""
    job = claim_one(engine, uuid.UUID(job_id))
    with engine.begin() as connection:
        assert finish(connection, [outcome(job, **fields)])


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == ERROR_KEYS
    assert error["code"] == code
    assert answer.headers["x-request-id"]
    return error


def lines_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 202, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [orjson.loads(line) for line in answer.content.splitlines()]


def ndjson(*items: object) -> bytes:
    return b"".join(orjson.dumps(item) + b"\n" for item in items)


def post_lines(client: httpx.Client, content: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/x-ndjson", **headers}
    return client.post("/v1/jobs", content=content, headers=headers)


# One job


def test_a_job_is_committed_when_its_202_comes(
    client: httpx.Client, engine: sa.Engine, tenant: Tenant
) -> None:
    fields = {"tier": "basic", "max_tokens": 9, "metadata": {"k": "v"}, "priority": 7}
    answer = client.post("/v1/jobs", json={"prompt": "Hello", **fields})

    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["state"], job["tier"]) == ("job", "queued", "basic")
    assert (job["metadata"], job["priority"], job["result"]) == ({"k": "v"}, 7, None)
    row = job_row(engine, uuid.UUID(job["id"]))
    assert row["tenant"] == tenant.name
    assert row["request"] == {
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    assert client.get(answer.headers["location"]).json() == job


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"messages": [{"role": "nobody"}]}, "messages[0].role"),
        ({"prompt": "x", "tier": "nowhere"}, "tier"),
        ({"prompt": "x", "model": "unknown"}, "model"),
        ({"prompt": "x", "temperature": 3}, "temperature"),
        ({"prompt": "x", "deadline": "tomorrow"}, "deadline"),
        ({"prompt": "x", "deadline": "2020-01-01T00:00:00Z"}, "deadline"),
        ({"prompt": "x", "cache": {"mode": "never"}}, "cache.mode"),
        ({"prompt": "x", "cache": {"secret": 1}}, "cache"),
        ({"prompt": "x", "callback_url": "http://127.0.0.1/"}, "callback_url"),
        ({"prompt": "x", "no_such_option": 1}, "no_such_option"),
        ({"prompt": "x", "metadata": {"a": "\0"}}, "metadata"),
        ("text", "the body"),
    ],
)
def test_a_wrong_field_is_named(client: httpx.Client, body: object, param: str) -> None:
    answer = client.post("/v1/jobs", json=body)

    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error.keys() == ERROR_KEYS
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b'{"prompt": ', "application/json", 422, "invalid_request"),
        (b'{"prompt": "\xff"}', "application/json", 422, "invalid_request"),
        (b"", "application/json", 422, "invalid_request"),
        (b'{"prompt": "x"}', "text/plain", 415, "unsupported_media_type"),
        (
            b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
            "application/json",
            422,
            "too_deep",
        ),
        (b'{"prompt": [' + b"[]," * 400_000 + b"[]]}", "application/json", 422, "too_many_values"),
    ],
)
def test_what_is_no_json_is_refused(
    client: httpx.Client, content: bytes, kind: str, status: int, code: str
) -> None:
    answer = client.post("/v1/jobs", content=content, headers={"content-type": kind})

    error_of(answer, status, code)


def test_fields_that_json_has_no_form_for(client: httpx.Client, engine: sa.Engine) -> None:
    cache = {"mode": "refresh", "ttl_s": 60, "namespace": "n"}
    job_id = submit(client, cache=cache, deadline=60, stream=True)

    row = job_row(engine, uuid.UUID(job_id))
    assert row["cache"] == cache
    assert row["stream"] is True


def test_a_key_makes_a_repeat_the_same_job(client: httpx.Client) -> None:
    headers = {"idempotency-key": "order-1"}
    first = client.post("/v1/jobs", json={"prompt": "Hello"}, headers=headers)
    again = client.post("/v1/jobs", json={"prompt": "Hello"}, headers=headers)
    other = client.post("/v1/jobs", json={"prompt": "Bye"}, headers=headers)

    assert "idempotent-replayed" not in first.headers
    assert again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    error_of(other, 422, "idempotency_conflict")


def test_keys_of_tenants_are_apart(client: httpx.Client, stranger: httpx.Client) -> None:
    headers = {"idempotency-key": "shared"}
    ours = client.post("/v1/jobs", json={"prompt": "Hello"}, headers=headers)
    theirs = stranger.post("/v1/jobs", json={"prompt": "Bye"}, headers=headers)

    assert theirs.status_code == 202
    assert ours.json()["id"] != theirs.json()["id"]


# Many jobs


def test_many_as_an_array(client: httpx.Client, engine: sa.Engine) -> None:
    items: list[object] = [{"prompt": 'a "quoted, [text}\\'}, {"prompt": "b", "tier": "nowhere"}]
    items += ["no object", {"messages": [{"role": "user", "content": "d"}]}]

    lines = lines_of(client.post("/v1/jobs", json=items))

    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["error"]["param"] == "tier"
    assert lines[2]["error"]["param"] == "the body"
    first = job_row(engine, uuid.UUID(lines[0]["id"]))
    assert first["request"]["messages"][0]["content"] == 'a "quoted, [text}\\'
    assert job_row(engine, uuid.UUID(lines[3]["id"]))["state"] == "queued"


def test_many_as_lines(client: httpx.Client) -> None:
    content = ndjson({"prompt": "a"}) + b"\n{broken\n\r\n" + ndjson({"prompt": "b"})[:-1]

    lines = lines_of(post_lines(client, content))

    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[1]["error"].keys() == ERROR_KEYS
    assert "id" in lines[0]
    assert "id" in lines[2]


def test_thousands_for_a_client_that_reads_when_all_is_sent(
    client: httpx.Client, engine: sa.Engine, tenant: Tenant
) -> None:
    content = ndjson(*({"prompt": f"prompt {n}", "tier": "basic"} for n in range(3_500)))

    lines = lines_of(post_lines(client, content))

    assert [line["index"] for line in lines] == list(range(3_500))
    with engine.connect() as connection:
        known = connection.execute(sa.select(jobs.c.id).where(jobs.c.tenant == tenant.name))
        assert {str(id_) for id_ in known.scalars()} == {line["id"] for line in lines}


def test_what_is_broken_in_an_array_ends_it(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    content = b'[{"prompt": "a"}, {"prompt": "b"},, {"prompt": "c"}]'

    lines = lines_of(client.post("/v1/jobs", content=content, headers=headers))

    assert ["id" in line for line in lines] == [True, True, False]
    assert lines[2]["index"] == 2
    assert lines[2]["error"]["code"] == "invalid_json"
    for early in (b"[", b'[{"prompt": "a"', b'["'):
        refused = client.post("/v1/jobs", content=early, headers=headers)
        error_of(refused, 422, "invalid_json")


def test_each_of_many_has_a_key_of_the_whole(client: httpx.Client) -> None:
    content = ndjson(*({"prompt": f"{n}"} for n in range(40)))
    first = lines_of(post_lines(client, content, **{"idempotency-key": "upload"}))
    again = lines_of(post_lines(client, content, **{"idempotency-key": "upload"}))
    assert again == first

    changed = content.replace(b'"7"', b'"seven"').replace(b'"31"', b'"x"')
    mixed = lines_of(post_lines(client, changed, **{"idempotency-key": "upload"}))

    refused = [line["index"] for line in mixed if "error" in line]
    assert refused == [7, 31]
    assert {line["error"]["code"] for line in mixed if "error" in line} == {"idempotency_conflict"}
    assert [line for line in mixed if "id" in line] == [
        line for line in first if line["index"] not in {7, 31}
    ]


class Wire:
    """A request that is written and read by hand."""

    def __init__(self, url: str, key: str, *headers: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 0), 20)
        head = [
            "POST /v1/jobs HTTP/1.1",
            f"host: {parts.netloc}",
            f"authorization: Bearer {key}",
            "transfer-encoding: chunked",
            *headers,
        ]
        self._socket.sendall("\r\n".join([*head, "", ""]).encode())
        self._seen = b""

    def send(self, piece: bytes) -> None:
        self._socket.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))

    def try_to_send(self, piece: bytes, *, within_s: float) -> bool:
        """False if the server did not take it in time."""
        self._socket.settimeout(within_s)
        try:
            self.send(piece)
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(20)
        return True

    def end(self) -> None:
        self._socket.sendall(b"0\r\n\r\n")

    def read_until(self, text: bytes) -> bytes:
        while text not in self._seen:
            piece = self._socket.recv(65_536)
            assert piece, f"it hung up: {self._seen[-500:]!r}"
            self._seen += piece
        return self._seen

    def close(self) -> None:
        self._socket.close()


def test_ids_come_while_the_upload_goes_on(
    server: ApiServer, tenant: Tenant, engine: sa.Engine
) -> None:
    wire = Wire(server.url, tenant.key, "content-type: application/x-ndjson")
    wire.send(b'{"prompt": "a"}\n{"pro')
    wire.read_until(b'"index":0')
    wire.send(b'mpt": "b"}\n')

    seen = wire.read_until(b'"index":1')

    assert b" 202 " in seen.partition(b"\r\n")[0]
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).where(jobs.c.tenant == tenant.name)
        assert connection.execute(query).scalar_one() == 2
    wire.end()
    wire.read_until(b"\r\n0\r\n\r\n")
    wire.close()


def test_what_was_told_before_the_client_left_is_kept(
    server: ApiServer, tenant: Tenant, client: httpx.Client
) -> None:
    wire = Wire(server.url, tenant.key, "content-type: application/json")
    wire.send(b'[{"prompt": "a"}, {"prompt": "b"}, {"prompt')
    wire.read_until(b'"index":1')
    wire.close()

    assert len(client.get("/v1/jobs").json()["data"]) == 2
    submit(client)  # and the place is free again


# Limits


def test_memory_stays_flat(server: ApiServer, client: httpx.Client) -> None:
    """Bodies beyond the limits, lines and elements among them: they are dropped as they come."""
    json_type = {"content-type": "application/json"}
    submit(client)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    highest = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        text = b'{"prompt": "' + b"x" * (33 * MIB) + b'"}'
        known = client.post("/v1/jobs", content=text, headers=json_type)
        error = error_of(known, 413, "request_too_large")
        assert str(32 * MIB) in error["message"]
        assert max(highest) - before < 12 * MIB
        (line,) = lines_of(post_lines(client, text))
        assert line["error"]["code"] == "request_too_large"
        assert str(8 * MIB) in line["error"]["message"]
        (line,) = lines_of(client.post("/v1/jobs", content=b"[" + text + b"]", headers=json_type))
        assert line["error"]["code"] == "request_too_large"
        deep = b"[" * 33 * MIB
        refused = client.post("/v1/jobs", content=deep, headers=json_type)
        error_of(refused, 422, "too_deep")
        assert max(highest) - before < 40 * MIB
        pieces = (text[start : start + MIB] for start in range(0, len(text), MIB))
        unknown = client.post("/v1/jobs", content=pieces, headers=json_type)
        error_of(unknown, 413, "request_too_large")
    finally:
        done.set()
        watcher.join()
    assert max(highest) - before < 80 * MIB, [before, max(highest)]


def test_a_prompt_of_too_many_tokens(client: httpx.Client) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "x" * 4_000_100})

    assert "1000000" in error_of(answer, 413, "prompt_too_long")["message"]


# Looking, waiting


def test_a_job_with_its_result(client: httpx.Client, engine: sa.Engine) -> None:
    job_id = submit(client)
    end(engine, job_id, text="An answer", provider_ms=12.5, model="small")

    answer = client.get(f"/v1/jobs/{job_id}")

    job = answer.json()
    assert (job["state"], job["result"]["text"]) == ("succeeded", "An answer")
    assert job["result"]["response"] == {"choices": []}
    assert job["result"]["timings"]["provider_ms"] == 12.5
    assert answer.headers["x-promptfleet-job"] == job_id
    assert answer.headers["x-promptfleet-tier"] == "basic"
    assert answer.headers["x-promptfleet-model"] == "small"
    assert answer.headers["x-promptfleet-provider-ms"] in {"12", "13"}


def test_a_missing_job_and_anothers_are_answered_the_same(
    client: httpx.Client, stranger: httpx.Client
) -> None:
    theirs = submit(stranger)
    answers = [
        client.request(method, path)
        for path in (f"/v1/jobs/{theirs}", f"/v1/jobs/{uuid.uuid4()}", "/v1/jobs/none")
        for method in ("GET", "DELETE")
    ]
    answers.append(client.get(f"/v1/jobs/{theirs}?wait=5"))

    for answer in answers:
        error_of(answer, 404, "not_found")
        assert answer.content == answers[0].content
        own = {"x-request-id", "date"}
        assert {k: v for k, v in answer.headers.items() if k not in own} == {
            k: v for k, v in answers[0].headers.items() if k not in own
        }


def test_waiting_holds_no_connection(client: httpx.Client, engine: sa.Engine) -> None:
    """The server has two connections, and twenty clients wait."""
    ids = [submit(client) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        waits = [pool.submit(client.get, f"/v1/jobs/{id_}?wait=25") for id_ in ids]
        eventually(lambda: _waiting(client) >= 20, "all wait")
        began = time.monotonic()
        submit(client)
        assert time.monotonic() - began < 5
        for id_ in ids:
            end(engine, id_)
        answers = [wait.result() for wait in waits]

    assert {answer.json()["state"] for answer in answers} == {"succeeded"}
    assert time.monotonic() - began < 15


def _waiting(client: httpx.Client) -> float:
    page = client.get("/metrics").text
    (line,) = [x for x in page.splitlines() if x.startswith("promptfleet_api_requests_in_flight ")]
    return float(line.split()[1]) - 1


def test_a_wait_that_ends_before_the_job(client: httpx.Client) -> None:
    job_id = submit(client)

    answer = client.get(f"/v1/jobs/{job_id}?wait=0.2")

    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    for wait in ("-1", "61", "nan", "x"):
        error_of(client.get(f"/v1/jobs/{job_id}?wait={wait}"), 422, "invalid_request")


# Lists


def test_pages_of_jobs_newest_first(client: httpx.Client, stranger: httpx.Client) -> None:
    submit(stranger)
    ids = [submit(client) for _ in range(5)]
    first = client.get("/v1/jobs?limit=2").json()
    submit(client)  # comes before the first page, and moves none
    second = client.get("/v1/jobs", params={"limit": 2, "cursor": first["cursor"]}).json()
    third = client.get("/v1/jobs", params={"limit": 2, "cursor": second["cursor"]}).json()

    pages = [[job["id"] for job in page["data"]] for page in (first, second, third)]
    assert [*pages[0], *pages[1], *pages[2]] == ids[::-1]
    assert (first["has_more"], third["has_more"], third["cursor"]) == (True, False, None)


def test_filters(client: httpx.Client, engine: sa.Engine) -> None:
    done = submit(client, metadata={"run": "r1", "n": 1})
    end(engine, done)
    waiting = submit(client, tier="standard", metadata={"run": "r1", "n": 2})
    submit(client, metadata={"run": "r2"})

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/v1/jobs?{query}").json()["data"]]

    assert found("metadata.run=r1") == [waiting, done]
    assert found("metadata.run=r1&metadata.n=1") == [done]
    assert found("state=succeeded") == [done]
    assert found("tier=standard&state=queued") == [waiting]
    assert found(f"batch_id={uuid.uuid4()}") == []
    for query in ("state=none", "cursor=x", "limit=0", "tier=%00", "metadata.a=%00", "batch_id=x"):
        assert client.get(f"/v1/jobs?{query}").status_code == 422, query


def test_results_as_they_land(
    client: httpx.Client, stranger: httpx.Client, engine: sa.Engine
) -> None:
    end(engine, submit(stranger))
    first, second = submit(client), submit(client)
    end(engine, second, text="2")
    page = client.get("/v1/results").json()
    assert [result["job_id"] for result in page["data"]] == [second]

    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(client.get, "/v1/results", params={"after": page["cursor"], "wait": 20})
        eventually(lambda: _waiting(client) >= 1, "it waits")
        end(engine, first, text="1")
        landed = wait.result().json()

    assert [result["text"] for result in landed["data"]] == ["1"]
    rest = client.get("/v1/results", params={"after": landed["cursor"]}).json()
    assert (rest["data"], rest["has_more"]) == ([], False)
    assert client.get("/v1/results?after=x").status_code == 422


# Cancelling


def test_cancelling(client: httpx.Client, engine: sa.Engine) -> None:
    job_id = submit(client)
    first = client.delete(f"/v1/jobs/{job_id}")
    again = client.delete(f"/v1/jobs/{job_id}")

    assert (first.status_code, first.json()["state"]) == (202, "cancelled")
    assert first.json()["result"]["state"] == "cancelled"
    assert (again.status_code, again.json()) == (202, first.json())

    running = submit(client)
    claim_one(engine, uuid.UUID(running))
    asked = client.delete(f"/v1/jobs/{running}").json()
    assert (asked["state"], asked["cancel_requested"]) == ("running", True)

    ended = submit(client)
    end(engine, ended)
    error_of(client.delete(f"/v1/jobs/{ended}"), 409, "job_final")


# Around them


def test_scopes(server: ApiServer, engine: sa.Engine) -> None:
    with server.client(new_tenant(engine, "read").key) as reader:
        error_of(reader.post("/v1/jobs", json={"prompt": "x"}), 403, "insufficient_scope")
        assert reader.get("/v1/jobs").status_code == 200
    with server.client() as nobody:
        for path in ("/v1/jobs", "/v1/results", f"/v1/jobs/{uuid.uuid4()}"):
            error_of(nobody.get(path), 401, "invalid_api_key")
        error_of(nobody.get("/v1/nothing"), 404, "unknown_path")
        refused = nobody.put("/v1/jobs")
        error_of(refused, 405, "method_not_allowed")
        assert refused.headers["allow"] == "GET, POST"


def test_health_metrics_and_documents(server: ApiServer, client: httpx.Client) -> None:
    with server.client() as nobody:
        assert nobody.get("/healthz").json() == {"status": "ok"}
        assert nobody.get("/readyz").json() == {"status": "ok"}
        docs = nobody.get("/docs").text
        assert "swagger" in docs.lower()
        sources = re.findall(r'(?:src|href)="([^"]+)"', docs)
        assert len(sources) >= 3
        for source in sources:  # all from here: it can be read without internet
            assert source.startswith("/")
            assert nobody.get(source).status_code == 200
        assert nobody.get("/openapi.json").json()["info"]["title"] == "promptfleet"
        page = nobody.get("/metrics").text
    job_id = submit(client)
    client.get(f"/v1/jobs/{job_id}")
    page = client.get("/metrics").text
    assert 'route="/v1/jobs/{job_id}",status="200"' in page
    assert "promptfleet_api_request_seconds_bucket" in page
    assert job_id not in page
    assert "tenant-" not in page


def test_ids_of_requests(client: httpx.Client) -> None:
    assert client.get("/healthz").headers["x-request-id"].startswith("req_")
    given = client.get("/healthz", headers={"x-request-id": "of-the-proxy.1"})
    assert given.headers["x-request-id"] == "of-the-proxy.1"
    made = client.get("/healthz", headers={"x-request-id": "not fit"})
    assert made.headers["x-request-id"].startswith("req_")


class TestConversations:
    def remembered(self, client: httpx.Client, engine: sa.Engine) -> str:
        """A conversation of one turn."""
        memory_id = f"chat-{uuid.uuid4()}"
        job = claim_one(engine, uuid.UUID(submit(client, memory_id=memory_id)))
        turn = TurnTaken(memory_id, b'[{"role":"user","content":"Hello"}]')
        with engine.begin() as connection:
            ask = Ask(job.id, job.fence, job.tenant, memory_id, 10**6)
            assert take_conversations(connection, [ask])
            assert finish(connection, [outcome(job, turn=turn)])
        return memory_id

    def test_is_read_and_forgotten(self, client: httpx.Client, engine: sa.Engine) -> None:
        path = f"/v1/conversations/{self.remembered(client, engine)}"

        answer = client.get(path)

        assert answer.status_code == 200
        (turn,) = answer.json()["turns"]
        assert turn["messages"] == [{"role": "user", "content": "Hello"}]
        assert answer.json()["summary"] is None
        assert client.delete(path).status_code == 204
        error_of(client.get(path), 404, "not_found")
        error_of(client.delete(path), 404, "not_found")

    def test_is_its_tenants(
        self, client: httpx.Client, stranger: httpx.Client, engine: sa.Engine
    ) -> None:
        path = f"/v1/conversations/{self.remembered(client, engine)}"
        error_of(stranger.get(path), 404, "not_found")
        error_of(stranger.delete(path), 404, "not_found")
        assert client.get(path).status_code == 200
