"""OpenAI's files and batches with its official package, against real processes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import sqlalchemy as sa
from openai.types import Batch
from openai.types.responses import Response
from openai.types.webhooks import BatchCompletedWebhookEvent
from tests.api_server import ApiServer, Tenant, api_server, new_tenant
from tests.databases import one_database
from tests.docs.pages import ROOT, blocks
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.receiver import Receiver
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.signing import new_secret
from promptfleet_shared.store.engines import make_engine

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[retry]
retry_attempts = 1
retry_delay_ms = 20
[breaker]
enabled = false
[tiers.basic]
models = ["small"]
[tiers.idle]
models = ["small"]
[models.small]
price_as = "free"
deployments = [{{ base_url = "{url}/v1", model = "sim-small" }}]
"""
CHAT: Any = "/v1/chat/completions"
COMPLETIONS, EMBEDDINGS, RESPONSES = "/v1/completions", "/v1/embeddings", "/v1/responses"
FINAL = {"completed", "failed", "expired", "cancelled"}
SECRET = new_secret()
LEASE_S = 1
Line = dict[str, Any]


# -- real servers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def engine(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[sa.Engine]:
    """One database for the module; its tests are apart by their tenants."""
    with one_database(postgres, admin, template) as url:
        made = make_engine(url, application_name="tests")
        yield made
        made.dispose()


@pytest.fixture(scope="module")
def simulated(directory: Path) -> Iterator[Provider]:
    with provider(directory, "--latency-ms", "5", "--tokens-per-s", "0") as running:
        yield running


@pytest.fixture(scope="module")
def env(
    engine: sa.Engine, valkey: EmbeddedValkey, simulated: Provider, directory: Path
) -> dict[str, str]:
    config = directory / "fleet.toml"
    config.write_text(FLEET.format(url=simulated.url))
    return worker_environment(
        database_url=engine.url.render_as_string(hide_password=False),
        broker_url=valkey.url,
        config=config,
        lease_s=LEASE_S,
        callback_secrets=SECRET,
        callback_allow_loopback=True,
        callback_poll_s=0.1,
        api_max_file_bytes=20_000_000,
    )


@pytest.fixture(scope="module")
def worker(env: dict[str, str], directory: Path) -> Iterator[Process]:
    """Serves the tier basic; nobody serves the tier idle."""
    with start_worker(["basic"], name="batches", env=env, log=directory / "worker.log") as running:
        yield running


@pytest.fixture(scope="module")
def server(worker: Process, env: dict[str, str], directory: Path) -> Iterator[ApiServer]:
    with api_server(directory, env) as running:
        yield running


@pytest.fixture
def tenant(engine: sa.Engine) -> Tenant:
    return new_tenant(engine)


@pytest.fixture
def client(server: ApiServer, tenant: Tenant) -> Iterator[openai.OpenAI]:
    with client_of(server, tenant) as made:
        yield made


def client_of(server: ApiServer, tenant: Tenant) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=tenant.key, max_retries=0)


# -- lines -----------------------------------------------------------------------------------


def chat(custom_id: str, text: str | None = None, *, model: str = "small", **body: Any) -> Line:
    text = text or f"Hello {custom_id} {uuid.uuid4().hex}"
    messages = [{"role": "user", "content": text}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT,
        "body": {"model": model, "messages": messages, **body},
    }


def jsonl(lines: Sequence[Line | str]) -> bytes:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return "".join(f"{text}\n" for text in texts).encode()


def start(
    client: openai.OpenAI,
    lines: Sequence[Line | str],
    *,
    endpoint: Any = CHAT,
    window: Any = "24h",
    **options: Any,
) -> Batch:
    uploaded = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(
        input_file_id=uploaded.id, endpoint=endpoint, completion_window=window, **options
    )


def wait(client: openai.OpenAI, batch: Batch, *statuses: str, timeout_s: float = 60) -> Batch:
    """The batch, once it has one of these statuses; by default one of the final ones."""

    def looked() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in (statuses or FINAL) else None

    found = eventually(looked, f"the batch is {statuses}", timeout_s=timeout_s, every_s=0.05)
    assert found
    return found


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Line]:
    """A file's lines by their custom ids, each there once."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    assert all(line.keys() == {"id", "custom_id", "response", "error"} for line in lines)
    return by_id


def ends(client: openai.OpenAI, batch: Batch, expected: int) -> tuple[dict[str, Line], ...]:
    """The lines of both files: together all of them, and each in one."""
    output, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert not output.keys() & errors.keys()
    assert len(output) + len(errors) == expected
    return output, errors


def answer_of(line: Line) -> str:
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"]
    content: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return content


def rows(engine: sa.Engine, statement: str, **parameters: object) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.text(statement), parameters))


def execute(engine: sa.Engine, statement: str, **parameters: object) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(statement), parameters)


def row_id(public: str) -> uuid.UUID:
    return uuid.UUID(public.removeprefix("batch_").removeprefix("file-"))


# -- files -----------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_went(client: openai.OpenAI) -> None:
    content = bytes(range(256)) * 4_000  # more than a chunk, and none of its borders
    made = client.files.create(file=("Äpfel.jsonl", content), purpose="batch")

    assert made.object == "file"
    assert made.id.startswith("file-")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "Äpfel.jsonl", "batch")
    assert made.status == "processed"
    assert made.expires_at
    assert 29 * 86_400 < made.expires_at - made.created_at <= 30 * 86_400
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content

    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.delete(made.id)


def test_an_empty_file_is_one(client: openai.OpenAI) -> None:
    made = client.files.create(file=("none.jsonl", b""), purpose="batch")
    assert made.bytes == 0
    assert client.files.content(made.id).content == b""


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=262143-262145", 262_143, 262_146),
        ("bytes=500000-", 500_000, 600_000),
        ("bytes=-7", 599_993, 600_000),
        ("bytes=599990-999999", 599_990, 600_000),
    ],
)
def test_a_part_of_a_file(client: openai.OpenAI, asked: str, start: int, stop: int) -> None:
    content = b"".join(b"%06d" % n for n in range(100_000))
    made = client.files.create(file=content, purpose="batch")
    answer = client.files.with_raw_response.content(made.id, extra_headers={"range": asked})
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/600000"
    assert answer.content == content[start:stop]


def test_a_part_that_is_not_there(client: openai.OpenAI) -> None:
    made = client.files.create(file=b"short", purpose="batch")
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.content(made.id, extra_headers={"range": "bytes=5-"})
    assert refused.value.status_code == 416


def test_files_are_listed_a_page_at_a_time(client: openai.OpenAI) -> None:
    made = [client.files.create(file=b"{}", purpose="batch").id for _ in range(5)]
    other = client.files.create(
        file=b"{}", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert other.expires_at == pytest.approx(other.created_at + 3600, abs=1)
    kept = client.files.create(file=b"{}", purpose="assistants")
    assert kept.expires_at is None

    everything = [kept.id, other.id, *reversed(made)]
    assert [file.id for file in client.files.list()] == everything
    assert [file.id for file in client.files.list(limit=2)] == everything
    assert [file.id for file in client.files.list(order="asc", limit=3)] == everything[::-1]
    assert [file.id for file in client.files.list(purpose="batch")] == made[::-1]
    page = client.files.list(limit=2, after=made[3])
    assert [file.id for file in page.data] == [made[2], made[1]]
    assert page.has_more


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "nonsense"}, "purpose"),
        (
            {"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 1}},
            "expires_after.seconds",
        ),
        (
            {"purpose": "batch", "expires_after": {"anchor": "later", "seconds": 3600}},
            "expires_after.anchor",
        ),
    ],
)
def test_a_wrong_form_leaves_nothing_behind(
    client: openai.OpenAI, engine: sa.Engine, tenant: Tenant, options: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=b"x" * 600_000, **options)
    assert refused.value.param == param
    assert not rows(engine, "SELECT id FROM files WHERE tenant = :t", t=tenant.name)


def test_the_purpose_may_come_after_the_file(server: ApiServer, tenant: Tenant) -> None:
    """As the client for JavaScript sends it."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\r\n'
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    with server.client(tenant.key) as plain:
        answer = plain.post("/v1/files", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["bytes"], answer.json()["purpose"]) == (2, "batch")

        cut = plain.post("/v1/files", content=body[:-10], headers=headers)
        assert (cut.status_code, cut.json()["error"]["code"]) == (400, "bad_form")
        no_file = body.replace(b'name="file"', b'name="fil"')
        answer = plain.post("/v1/files", content=no_file, headers=headers)
        assert answer.json()["error"]["param"] == "file"
        answer = plain.post("/v1/files", content=b"{}", headers={"content-type": "text/plain"})
        assert answer.status_code == 400


def test_too_large_a_file(client: openai.OpenAI, engine: sa.Engine, tenant: Tenant) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=b"x" * 21_000_000, purpose="batch")
    assert refused.value.status_code == 413
    assert "20000000 bytes (20 MB)" in refused.value.message

    def chunked() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(21):
            yield b"x" * 1_000_000
        yield b"\r\n--b--\r\n"

    headers = {
        "content-type": "multipart/form-data; boundary=b",
        "authorization": f"Bearer {tenant.key}",
    }
    url = str(client.base_url) + "files"
    answer = httpx.post(url, content=chunked(), headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert not rows(engine, "SELECT id FROM files WHERE tenant = :t", t=tenant.name)


def test_memory_stays_flat_while_files_come_and_go(
    client: openai.OpenAI, server: ApiServer
) -> None:
    content = b"0123456789abcdef" * 1_180_000  # 19 MB
    process = psutil.Process(server.process.pid)

    def once() -> None:
        made = client.files.create(file=content, purpose="batch")
        with client.files.with_streaming_response.content(made.id) as response:
            assert sum(len(part) for part in response.iter_bytes()) == len(content)
        client.files.delete(made.id)

    once()
    before = process.memory_info().rss
    highest = 0
    with ThreadPoolExecutor(4) as pool:
        several = [pool.submit(once) for _ in range(4)]
        while not all(one.done() for one in several):
            highest = max(highest, process.memory_info().rss)
        for one in several:
            one.result()
    assert highest - before < len(content)  # of the 75 MB that were under way at once


# -- batches ---------------------------------------------------------------------------------


def test_a_batch_of_a_thousand_lines(client: openai.OpenAI, simulated: Provider) -> None:
    lines = [chat(f"line-{n}", max_tokens=20) for n in range(990)]
    # Some take longer than the others, and than the second between two counts.
    slow = "[[sim:latency-ms=2500]]"
    lines += [chat(f"line-{n}", f"{n} {uuid.uuid4().hex} {slow}") for n in range(990, 1_000)]
    batch = start(client, lines, metadata={"run": "nightly"})
    assert batch.object == "batch"
    assert (batch.status, batch.completion_window) == ("validating", "24h")
    assert batch.metadata == {"run": "nightly"}

    counts = set()

    def ended() -> bool:
        looked = client.batches.retrieve(batch.id)
        assert looked.request_counts
        counts.add(looked.request_counts.completed)
        return looked.status in FINAL

    eventually(ended, "the batch ends", timeout_s=90, every_s=0.02)
    done = client.batches.retrieve(batch.id)
    assert done.status == "completed", done
    assert any(0 < count < 1_000 for count in counts), "the counts did not move"
    assert done.request_counts
    assert (done.request_counts.total, done.request_counts.completed) == (1_000, 1_000)
    assert done.request_counts.failed == 0
    assert done.model == "small"
    assert done.error_file_id is None
    assert done.usage
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0
    steps = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert all(steps)
    assert steps == sorted(steps)  # type: ignore[type-var]

    output, _ = ends(client, done, 1_000)
    assert output.keys() == {line["custom_id"] for line in lines}
    assert all(answer_of(line) for line in output.values())
    assert output["line-7"]["response"]["body"]["object"] == "chat.completion"
    one = lines[7]["body"]["messages"][0]["content"]
    assert simulated.calls_of(one) == 1
    [file] = [f for f in client.files.list() if f.id == done.output_file_id]
    assert file.purpose == "batch_output"
    assert client.batches.list().data[0].id == batch.id


def test_each_answer_is_that_of_its_line(client: openai.OpenAI) -> None:
    lines = [chat(f"line-{n}", f"{uuid.uuid4().hex} [[sim:text=answer {n}]]") for n in range(50)]
    done = wait(client, start(client, lines))
    output, _ = ends(client, done, 50)
    assert {key: answer_of(line) for key, line in output.items()} == {
        f"line-{n}": f"answer {n}" for n in range(50)
    }


def test_other_endpoints(client: openai.OpenAI) -> None:
    def line(url: str, n: object, **body: Any) -> Line:
        body = {"model": "tier/basic", **body}
        return {"custom_id": f"{n}", "method": "POST", "url": url, "body": body}

    texts = [line(COMPLETIONS, n, prompt=f"Once {uuid.uuid4().hex}") for n in range(3)]
    vectors = [line(EMBEDDINGS, n, input=[f"a {n}", f"b {n}"]) for n in range(3)]
    inputs = [line(RESPONSES, n, input=f"Tell {uuid.uuid4().hex}", temperature=0.5) for n in "abc"]
    started = [
        start(client, texts, endpoint=COMPLETIONS),
        start(client, vectors, endpoint=EMBEDDINGS),
        start(client, inputs, endpoint=RESPONSES),
    ]
    completions, embeddings, responses = (ends(client, wait(client, b), 3)[0] for b in started)
    assert all(one["response"]["body"]["choices"][0]["text"] for one in completions.values())
    assert all(len(one["response"]["body"]["data"]) == 2 for one in embeddings.values())
    for one in responses.values():
        response = Response.model_validate(one["response"]["body"])
        assert response.status == "completed"
        assert response.output_text
        assert response.temperature == 0.5
        assert response.metadata == {}


def test_some_lines_fail(client: openai.OpenAI) -> None:
    lines = [chat(f"good-{n}") for n in range(5)]
    lines += [chat(f"bad-{n}", f"{n} [[sim:status=400,code=bad_thing]]") for n in range(3)]
    done = wait(client, start(client, lines))
    assert done.status == "completed"
    assert done.request_counts
    assert (done.request_counts.completed, done.request_counts.failed) == (5, 3)
    output, errors = ends(client, done, 8)
    assert output.keys() == {f"good-{n}" for n in range(5)}
    for line in errors.values():
        assert line["error"] is None
        assert line["response"]["status_code"] == 400
        assert line["response"]["body"]["error"].keys() == {"message", "type", "param", "code"}


def test_a_batch_that_fails_its_validation(
    client: openai.OpenAI, engine: sa.Engine, tenant: Tenant
) -> None:
    lines: list[Line | str] = [
        chat("ok"),
        "{nonsense",
        "",
        chat("ok"),
        {**chat("x"), "method": "GET"},
        {**chat("y"), "url": EMBEDDINGS},
        {"method": "POST", "url": CHAT, "body": {}},
        chat("z", model="unknown"),
        chat("s", stream=True),
        {**chat("m"), "body": {"model": "small"}},
        {**chat("b"), "body": None},
        "[]",
    ]
    done = wait(client, start(client, lines))
    assert done.status == "failed"
    assert done.failed_at
    assert done.errors
    assert done.errors.object == "list"
    assert done.errors.data
    assert [(error.line, error.code, error.param) for error in done.errors.data] == [
        (2, "invalid_json_line", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_method", "method"),
        (6, "url_mismatch", "url"),
        (7, "missing_required_parameter", "custom_id"),
        (8, "model_not_found", "body.model"),
        (9, "unsupported_value", "body.stream"),
        (10, "invalid_request", "body.messages"),
        (11, "missing_required_parameter", "body"),
        (12, "invalid_json_line", None),
    ]
    assert done.output_file_id is done.error_file_id is None
    assert not rows(engine, "SELECT id FROM jobs WHERE tenant = :t", t=tenant.name)


def test_an_empty_batch_fails(client: openai.OpenAI) -> None:
    done = wait(client, start(client, ["", " "]))
    assert done.errors
    assert done.errors.data
    assert [error.code for error in done.errors.data] == ["empty_file"]


def test_too_many_lines(client: openai.OpenAI) -> None:
    line = json.dumps(chat("n", "x")).replace('"n"', '"{}"', 1)
    prefix, suffix = line.split("{}")
    done = wait(client, start(client, [f"{prefix}{n}{suffix}" for n in range(50_001)]))
    assert done.errors
    assert done.errors.data
    assert [error.code for error in done.errors.data] == ["too_many_tasks"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "15d"}, "completion_window"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        (
            {"extra_body": {"promptfleet": {"callback_url": "http://10.0.0.1/"}}},
            "promptfleet.callback_url",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
            "output_expires_after.seconds",
        ),
        ({"extra_body": {"nonsense": 1}}, "body"),
    ],
)
def test_a_wrong_parameter(client: openai.OpenAI, change: Any, param: str) -> None:
    file = client.files.create(file=jsonl([chat("a")]), purpose="batch")
    usual: Any = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(**{**usual, **change})
    assert refused.value.param == param


def test_a_file_that_is_none_of_a_batch(client: openai.OpenAI) -> None:
    other = client.files.create(file=jsonl([chat("a")]), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id=other.id, endpoint=CHAT, completion_window="24h")
    assert refused.value.code == "invalid_purpose"
    for missing in (f"file-{uuid.uuid4().hex}", "file-abc", "x"):
        with pytest.raises(openai.NotFoundError):
            client.batches.create(input_file_id=missing, endpoint=CHAT, completion_window="24h")


def test_the_same_key_is_the_same_batch(client: openai.OpenAI) -> None:
    headers = {"idempotency-key": uuid.uuid4().hex}
    file = client.files.create(file=jsonl([chat("a")]), purpose="batch")
    usual: Any = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    first = client.batches.create(**usual, extra_headers=headers)
    assert client.batches.create(**usual, extra_headers=headers).id == first.id
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.batches.create(**usual, metadata={"other": "1"}, extra_headers=headers)
    assert refused.value.code == "idempotency_conflict"
    wait(client, first)


def test_batches_are_listed_a_page_at_a_time(client: openai.OpenAI) -> None:
    made = [start(client, [chat("a")]).id for _ in range(4)]
    assert [batch.id for batch in client.batches.list(limit=3)] == made[::-1]
    page = client.batches.list(limit=2, after=made[3])
    assert [batch.id for batch in page.data] == [made[2], made[1]]


# -- cancel and expiry -----------------------------------------------------------------------


def test_cancelled_in_mid_flight(client: openai.OpenAI, simulated: Provider) -> None:
    lines = [chat(f"quick-{n}") for n in range(20)]
    lines += [chat(f"waits-{n}", promptfleet={"tier": "idle"}) for n in range(30)]
    lines += [chat(f"hangs-{n}", f"{n} {uuid.uuid4().hex} [[sim:hang]]") for n in range(2)]
    batch = start(client, lines)
    eventually(
        lambda: client.batches.retrieve(batch.id).request_counts.completed == 20,  # type: ignore[union-attr]
        "the quick ones are done",
        timeout_s=60,
    )
    asked = client.batches.cancel(batch.id)
    assert asked.status == "cancelling"
    assert asked.cancelling_at
    done = wait(client, batch)
    assert done.status == "cancelled"
    assert done.cancelled_at
    output, errors = ends(client, done, 52)
    assert output.keys() == {f"quick-{n}" for n in range(20)}
    assert all(line["error"]["code"] == "batch_cancelled" for line in errors.values())
    assert all(line["response"] is None for line in errors.values())
    assert done.request_counts
    assert (done.request_counts.completed, done.request_counts.failed) == (20, 0)
    with pytest.raises(openai.ConflictError) as refused:
        client.batches.cancel(batch.id)
    assert refused.value.code == "batch_not_cancellable"


def test_a_batch_that_is_over_before_it_began(client: openai.OpenAI) -> None:
    batch = start(client, [chat("a", promptfleet={"tier": "idle"})])
    client.batches.cancel(batch.id)
    done = wait(client, batch)
    assert done.status == "cancelled"
    assert len(lines_of(client, done.error_file_id)) == (done.request_counts or batch).total  # type: ignore[union-attr]


def test_expired(client: openai.OpenAI) -> None:
    lines = [chat(f"quick-{n}") for n in range(5)]
    lines += [chat(f"waits-{n}", promptfleet={"tier": "idle"}) for n in range(5)]
    batch = start(client, lines, window="8s")
    assert batch.completion_window == "8s"
    assert batch.expires_at
    assert batch.expires_at - batch.created_at == pytest.approx(8, abs=1)
    done = wait(client, batch)
    assert done.status == "expired"
    assert done.expired_at
    assert done.expired_at >= batch.expires_at
    output, errors = ends(client, done, 10)
    assert output.keys() == {f"quick-{n}" for n in range(5)}
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}


# -- beyond OpenAI ---------------------------------------------------------------------------


def test_results_are_read_as_they_land(
    client: openai.OpenAI, server: ApiServer, tenant: Tenant
) -> None:
    lines = [chat(f"line-{n}") for n in range(300)]
    batch = start(client, lines)
    seen: list[str] = []
    cursor = None
    with server.client(tenant.key) as plain:
        for _ in range(1_000):
            query = {"limit": 70, "wait": 5} | ({"after": cursor} if cursor else {})
            page = plain.get(f"/v1/batches/{batch.id}/results", params=query).json()
            cursor = page["cursor"]
            seen += [item["custom_id"] for item in page["data"]]
            for item in page["data"]:
                assert item["result"]["state"] == "succeeded"
                assert item["result"]["job_id"] == item["job_id"]
            if not page["data"] and page["status"] in FINAL:
                break
    assert sorted(seen) == sorted(line["custom_id"] for line in lines)
    wait(client, batch)


def test_progress_is_followed(client: openai.OpenAI, server: ApiServer, tenant: Tenant) -> None:
    batch = start(client, [chat(f"line-{n}") for n in range(20)])
    events = []
    with (
        server.client(tenant.key) as plain,
        plain.stream("GET", f"/v1/batches/{batch.id}/events") as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                events.append((name, json.loads(line.removeprefix("data: "))))
    name, last = events[-1]
    assert name == "batch.completed"
    assert last == json.loads(client.batches.with_raw_response.retrieve(batch.id).content)


def test_its_end_is_posted_as_by_openai(client: openai.OpenAI) -> None:
    with Receiver() as receiver:
        hook = {"promptfleet": {"callback_url": f"{receiver.url}/extra"}}
        done = start(client, [chat("a")], extra_body=hook)
        failed = start(
            client, ["x"], metadata={"promptfleet_callback_url": f"{receiver.url}/metadata"}
        )
        eventually(lambda: len(receiver.received) == 2, "both are told", timeout_s=60)
        events = {one.path: one for one in receiver.received}
        told = events["/extra"]
        event = client.webhooks.unwrap(told.body, dict(told.headers), secret=SECRET)
        assert isinstance(event, BatchCompletedWebhookEvent)
        assert event.data.id == done.id
        assert event.created_at == client.batches.retrieve(done.id).completed_at
        other = client.webhooks.unwrap(
            events["/metadata"].body, dict(events["/metadata"].headers), secret=SECRET
        )
        assert (other.type, other.data.id) == ("batch.failed", failed.id)  # type: ignore[union-attr]
        assert other.id != event.id


def test_the_documented_script(
    server: ApiServer, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", tenant.key)
    page = ROOT / "docs/howto/run-batches.md"
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if block.mark == "recipe":
            exec(compile(block.code, block.page, "exec"), names)  # noqa: S102 - our own page
    names["client"].close()
    assert names["batch"].status == "completed"
    assert names["answers"].keys() == names["landed"].keys()
    assert len(names["answers"]) == 20
    for custom_id, result in names["landed"].items():
        assert result["text"] == names["answers"][custom_id]


# -- tenants ---------------------------------------------------------------------------------


def test_other_tenants_things_do_not_exist(
    client: openai.OpenAI, server: ApiServer, engine: sa.Engine
) -> None:
    batch = wait(client, start(client, [chat("a")]))
    ours = [batch.input_file_id, batch.output_file_id]
    with client_of(server, new_tenant(engine)) as stranger:
        for file_id in ours:
            assert file_id
            missing = f"file-{uuid.uuid4().hex}"
            asks: list[Callable[[str], Any]] = [stranger.files.retrieve, stranger.files.content]
            for ask in (*asks, stranger.files.delete):
                assert _refusal(ask, file_id) == _refusal(ask, missing)
        missing = f"batch_{uuid.uuid4().hex}"
        for ask in (stranger.batches.retrieve, stranger.batches.cancel):
            assert _refusal(ask, batch.id) == _refusal(ask, missing)
        with server.client(stranger.api_key) as plain:
            for what in ("results", "events"):
                theirs = plain.get(f"/v1/batches/{batch.id}/{what}")
                none = plain.get(f"/v1/batches/{missing}/{what}")
                assert (theirs.status_code, theirs.content) == (404, none.content)
        with pytest.raises(openai.NotFoundError):
            stranger.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            )
        assert not list(stranger.files.list())
        assert not list(stranger.batches.list())
    assert client.files.retrieve(batch.input_file_id)


def _refusal(ask: Callable[[str], Any], thing: str) -> tuple[object, ...]:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(thing)
    return refused.value.status_code, refused.value.body
