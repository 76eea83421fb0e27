"""Tokens from a provider to clients, through real workers and two processes of the API."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
import psutil
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from tests.api_server import ApiServer, Tenant, api_server, new_tenant
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.rows import job_row
from tests.waiting import eventually

from promptfleet import AsyncClient, Client, JobCancelledError, JobFailedError, WaitTimeoutError
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[retry]
retry_delay_ms = 20
[tiers.basic]
models = ["main"]
[tiers.deserted]
models = ["main"]
[models.main]
deployments = [{{ base_url = "{url}" }}]
"""
PATIENCE_S = 30.0
MIB = 1024 * 1024
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A server-sent event."""

    id: str
    name: str
    data: Any


class Screen:
    """What a page shows that follows a stream."""

    def __init__(self) -> None:
        self.text = ""
        self.last_id: str | None = None
        self.names: list[str] = []
        self.result: dict[str, Any] | None = None

    def show(self, event: Event) -> None:
        self.names.append(event.name)
        self.last_id = event.id
        match event.name:
            case "token":
                self.text += event.data["text"]
            case "reset":
                self.text = ""
            case "result":
                self.result = event.data["result"]


def read_events(lines: Iterator[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if "data" in fields:
            yield Event(
                id=fields.get("id", ""), name=fields["event"], data=orjson.loads(fields["data"])
            )
        fields = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Servers, a provider, a worker and two processes of the API."""

    directory: Path
    database: sa.Engine
    provider: Provider
    cache: EmbeddedValkey
    env: dict[str, str]
    apis: tuple[ApiServer, ApiServer]
    settings: Settings

    def worker(self, *tiers: str) -> Process:
        number = next(_numbers)
        log = self.directory / f"worker-{number}.log"
        return start_worker(tiers, name=f"w{number}", env=self.env, log=log)

    def submit(self, tenant: Tenant, text: str, **fields: object) -> uuid.UUID:
        body = {"prompt": f"{text} {uuid.uuid4().hex}", "stream": True, **fields}
        with self.apis[0].client(tenant.key) as client:
            answer = client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return uuid.UUID(answer.json()["id"])

    @contextmanager
    def following(
        self,
        tenant: Tenant,
        job_id: uuid.UUID,
        *,
        api: int = 0,
        after: str | None = None,
        **query: Any,
    ) -> Iterator[Iterator[Event]]:
        headers = {} if after is None else {"last-event-id": after}
        path = f"/v1/jobs/{job_id}/stream"
        with (
            self.apis[api].client(tenant.key) as client,
            client.stream("GET", path, headers=headers, params=query) as answer,
        ):
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield read_events(answer.iter_lines())

    def follow(self, tenant: Tenant, job_id: uuid.UUID, screen: Screen, **how: Any) -> None:
        """To the end."""
        with self.following(tenant, job_id, **how) as events:
            for event in events:
                screen.show(event)


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    admin: sa.Engine,
    template: str,
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("streaming")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE streaming TEMPLATE {template}"))
    url = sa.make_url(postgres.url).set(database="streaming").render_as_string(hide_password=False)
    database = make_engine(url, application_name="tests")
    # A server of their own for the streams, which a test may kill.
    with (
        EmbeddedValkey(directory / "cache") as cache,
        provider(directory, "--tokens-per-s", "100") as simulated,
    ):
        config = directory / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.base_url))
        env = worker_environment(
            database_url=url,
            broker_url=valkey.url,
            cache_url=cache.url,
            config=config,
            api_keep_alive_s=0.2,
        )
        settings = Settings(
            database_url=SecretStr(url),
            broker_url=SecretStr(valkey.url),
            cache_url=SecretStr(cache.url),
            config=config,
        )
        with api_server(directory, env) as first, api_server(directory, env) as second:
            yield Site(
                directory=directory,
                database=database,
                provider=simulated,
                cache=cache,
                env=env,
                apis=(first, second),
                settings=settings,
            )
    database.dispose()
    with admin.connect() as connection:
        connection.execute(sa.text("DROP DATABASE streaming WITH (FORCE)"))


@pytest.fixture(scope="module")
def worker(site: Site) -> Iterator[Process]:
    with site.worker("basic") as running:
        yield running


@pytest.fixture
def tenant(site: Site) -> Tenant:
    return new_tenant(site.database)


LONG = "[[sim:output-tokens=150]] a long answer"
ENDLESS = "[[sim:output-tokens=100000]] for ever"


def first_tokens(events: Iterator[Event], screen: Screen, number: int) -> None:
    while screen.names.count("token") < number:
        screen.show(next(events))


@pytest.mark.usefixtures("worker")
class TestOverHttp:
    def test_tokens_come_while_the_job_runs_and_the_result_at_last(
        self, site: Site, tenant: Tenant
    ) -> None:
        job_id = site.submit(tenant, LONG)
        screen = Screen()
        with site.following(tenant, job_id) as events:
            first_tokens(events, screen, 3)
            assert job_row(site.database, job_id)["state"] == "running"
            for event in events:
                screen.show(event)

        assert screen.names[-2:] == ["end", "result"]
        assert screen.result is not None
        assert screen.text == screen.result["text"]
        assert len(screen.text.split()) == 150
        with site.apis[1].client(tenant.key) as client:
            assert client.get(f"/v1/jobs/{job_id}").json()["result"] == screen.result

    def test_cut_again_and_again_it_goes_on_at_the_other_process(
        self, site: Site, tenant: Tenant
    ) -> None:
        job_id = site.submit(tenant, LONG)
        screen = Screen()
        cuts = 0
        while screen.result is None:
            with site.following(tenant, job_id, api=cuts % 2, after=screen.last_id) as events:
                for event in itertools.islice(events, 8):
                    screen.show(event)
            cuts += 1

        assert cuts > 3
        assert "reset" not in screen.names
        assert screen.text == screen.result["text"]

    def test_who_comes_late_gets_the_whole(self, site: Site, tenant: Tenant) -> None:
        job_id = site.submit(tenant, LONG)
        early, late, at_the_end = Screen(), Screen(), Screen()
        with site.following(tenant, job_id) as events:
            first_tokens(events, early, 20)
            site.follow(tenant, job_id, late, api=1)
        site.follow(tenant, job_id, at_the_end, last_event_id=early.last_id)

        assert late.result is not None
        assert late.text == late.result["text"]
        assert early.text + at_the_end.text == late.text
        with site.apis[0].client(tenant.key) as client:
            again = client.get(
                f"/v1/jobs/{job_id}/stream", headers={"last-event-id": late.last_id or ""}
            )
        assert again.status_code == 204

    def test_a_job_without_stream_and_a_cached_one_come_in_one_piece(
        self, site: Site, tenant: Tenant
    ) -> None:
        text = f"{LONG} {uuid.uuid4().hex}"
        with site.apis[0].client(tenant.key) as client:
            for stream in (False, True):
                answer = client.post("/v1/jobs", json={"prompt": text, "stream": stream})
                screen = Screen()
                site.follow(tenant, uuid.UUID(answer.json()["id"]), screen)
                assert screen.result is not None
                assert screen.text == screen.result["text"]
                assert screen.names == ["token", "end", "result"]
                if stream:
                    assert screen.result["cache"] == "hit"
                else:
                    self._until_cached(site, tenant, text)

    @staticmethod
    def _until_cached(site: Site, tenant: Tenant, text: str) -> None:
        """The cache is filled right after the result is written."""

        def is_hit() -> bool:
            with site.apis[0].client(tenant.key) as client:
                answer = client.post("/v1/jobs", json={"prompt": text})
                job = client.get(f"/v1/jobs/{answer.json()['id']}", params={"wait": 10}).json()
            return bool(job["result"]["cache"] == "hit")

        eventually(is_hit, "the answer comes from the cache")

    def test_a_try_that_breaks_off_is_reset(self, site: Site, tenant: Tenant) -> None:
        job_id = site.submit(tenant, "[[sim:cut,times=1,output-tokens=60]] twice")
        screen = Screen()

        site.follow(tenant, job_id, screen)

        assert screen.result is not None
        assert screen.names.count("reset") == 1
        assert screen.names.index("reset") > 0
        assert screen.text == screen.result["text"]
        assert screen.result["attempts"] == 2

    def test_a_failure_ends_the_stream_too(self, site: Site, tenant: Tenant) -> None:
        job_id = site.submit(tenant, "[[sim:status=400]] no")
        screen = Screen()

        site.follow(tenant, job_id, screen)

        assert screen.names == ["end", "result"]
        assert screen.result is not None
        assert screen.result["state"] == "failed"

    def test_a_job_that_ends_without_a_worker_ends_its_stream(
        self, site: Site, tenant: Tenant
    ) -> None:
        job_id = site.submit(tenant, "nobody works on this tier", tier="deserted")
        screen = Screen()
        with site.following(tenant, job_id) as events:
            with site.apis[1].client(tenant.key) as client:
                assert client.delete(f"/v1/jobs/{job_id}").status_code == 202
            for event in events:
                screen.show(event)

        assert screen.names == ["end", "result"]
        assert screen.result is not None
        assert screen.result["state"] == "cancelled"

    def test_comments_come_while_nothing_else_does(self, site: Site, tenant: Tenant) -> None:
        job_id = site.submit(tenant, "nobody works on this tier", tier="deserted")
        with (
            site.apis[0].client(tenant.key) as client,
            client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer,
        ):
            comments = (line for line in answer.iter_lines() if line.startswith(":"))
            assert [next(comments) for _ in range(3)] == [": keep-alive"] * 3
            assert answer.headers["cache-control"] == "no-store"
            client.delete(f"/v1/jobs/{job_id}")

    @pytest.mark.parametrize("asked", [False, True])
    def test_who_leaves_cancels_only_if_asked(
        self, site: Site, tenant: Tenant, asked: bool
    ) -> None:
        query: dict[str, Any] = {"cancel_on_disconnect": 1} if asked else {}
        job_id = site.submit(tenant, ENDLESS)
        screen = Screen()
        with site.following(tenant, job_id, **query) as events:
            first_tokens(events, screen, 3)
        if asked:
            eventually(
                lambda: job_row(site.database, job_id)["state"] == "cancelled", "it is cancelled"
            )
            return
        with site.following(tenant, job_id, api=1, after=screen.last_id) as events:
            first_tokens(events, screen, 10)  # it goes on
        assert not job_row(site.database, job_id)["cancel_requested"]
        with site.apis[0].client(tenant.key) as client:
            client.delete(f"/v1/jobs/{job_id}")

    def test_another_tenants_stream_looks_like_a_missing_one(
        self, site: Site, tenant: Tenant
    ) -> None:
        job_id = site.submit(tenant, ENDLESS)
        stranger = new_tenant(site.database)
        with site.apis[0].client(stranger.key) as client:
            theirs = client.get(f"/v1/jobs/{job_id}/stream")
            missing = client.get(f"/v1/jobs/{uuid.uuid4()}/stream")
        assert (theirs.status_code, theirs.content) == (404, missing.content)
        assert _plain(theirs) == _plain(missing)
        with site.apis[0].client() as client:
            assert client.get(f"/v1/jobs/{job_id}/stream").status_code == 401
        submitter = new_tenant(site.database, "read")
        with site.apis[0].client(submitter.key) as client:
            path = f"/v1/jobs/{job_id}/stream?cancel_on_disconnect=1"
            assert client.get(path).status_code == 403
        with site.apis[0].client(tenant.key) as client:
            client.delete(f"/v1/jobs/{job_id}")

    def test_many_streams_at_once_and_memory_stays(self, site: Site, tenant: Tenant) -> None:
        asyncio.run(_follow_many(site, tenant, 20))  # what is loaded at first is loaded
        before = _memory(site)

        texts = asyncio.run(_follow_many(site, tenant, 200))

        assert len(texts) == 200
        assert all(len(text.split()) == 20 for text in texts)
        assert _memory(site) - before < 48 * MIB


def _plain(answer: httpx.Response) -> dict[str, str]:
    changing = {"x-request-id", "date"}
    return {name: value for name, value in answer.headers.items() if name not in changing}


def _memory(site: Site) -> int:
    return int(psutil.Process(site.apis[1].process.pid).memory_info().rss)


async def _follow_many(site: Site, tenant: Tenant, number: int) -> list[str]:
    body = {"prompt": "[[sim:output-tokens=20]] one of many", "stream": True, "cache": False}
    lines = [orjson.dumps({**body, "metadata": {"n": n}}) for n in range(number)]
    headers = {"authorization": f"Bearer {tenant.key}"}
    async with httpx.AsyncClient(base_url=site.apis[0].url, headers=headers, timeout=60) as client:
        answer = await client.post(
            "/v1/jobs", content=b"\n".join(lines), headers={"content-type": "application/x-ndjson"}
        )
    ids = [orjson.loads(line)["id"] for line in answer.content.splitlines()]
    return await asyncio.gather(*(_follow_one(site, tenant, job_id) for job_id in ids))


async def _follow_one(site: Site, tenant: Tenant, job_id: str) -> str:
    address = urlsplit(site.apis[1].url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nhost: {address.netloc}\r\n"
        f"authorization: Bearer {tenant.key}\r\n\r\n".encode()
    )
    screen = Screen()
    event = ""
    async with asyncio.timeout(60):
        while screen.result is None:
            line = (await reader.readline()).decode()
            assert line, "the stream was cut"
            if line.startswith("event: "):
                event = line.removeprefix("event: ").strip()
            elif line.startswith("data: "):
                screen.show(Event(id="", name=event, data=orjson.loads(line[6:])))
    writer.close()
    assert screen.text == screen.result["text"]
    return screen.text


class TestFaults:
    @pytest.mark.usefixtures("worker")
    def test_redis_is_restarted_in_mid_stream(self, site: Site, tenant: Tenant) -> None:
        job_id = site.submit(tenant, LONG)
        screen = Screen()
        with site.following(tenant, job_id) as events:
            first_tokens(events, screen, 10)
            site.cache.kill()
            site.cache.start()
            for event in events:
                screen.show(event)

        assert screen.result is not None
        assert screen.text == screen.result["text"]
        assert screen.result["attempts"] == 1
        assert "reset" not in screen.names

    @pytest.mark.usefixtures("worker")
    def test_redis_is_away_to_the_end(self, site: Site, tenant: Tenant) -> None:
        job_id = site.submit(tenant, LONG)
        screen = Screen()
        with site.following(tenant, job_id) as events:
            first_tokens(events, screen, 10)
            site.cache.kill()
            try:
                for event in events:
                    screen.show(event)
            finally:
                site.cache.start()

        assert screen.result is not None
        assert screen.text == screen.result["text"]


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.settings) as made:
        yield made


def unique(text: str) -> str:
    return f"{text} {uuid.uuid4().hex}"


@pytest.mark.usefixtures("worker")
class TestInPython:
    def test_tokens_come_while_the_job_runs(self, site: Site, client: Client) -> None:
        job = client.enqueue_prompt(unique(LONG), stream=True)
        tokens = job.tokens(PATIENCE_S)

        first = next(tokens)

        assert job.state().value == "running"
        rest = list(tokens)
        assert len(rest) > 10
        text = first + "".join(rest)
        assert text == job.result(PATIENCE_S).text
        assert "".join(job.tokens()) == text

    def test_without_stream_the_text_comes_once(self, client: Client) -> None:
        job = client.enqueue_prompt(unique(LONG))

        assert list(job.tokens(PATIENCE_S)) == [job.result().text]

    def test_a_try_that_breaks_off_restarts(self, client: Client) -> None:
        job = client.enqueue_prompt(
            unique("[[sim:cut,times=1,output-tokens=60]] twice"), stream=True
        )
        text, restarts = "", 0
        for token in job.tokens(PATIENCE_S):
            restarts += token.restarts
            text = str(token) if token.restarts else text + token

        assert (text, restarts) == (job.result().text, 1)

    def test_ends_raise_as_result_does(self, client: Client) -> None:
        failing = client.enqueue_prompt(unique("[[sim:status=400]] no"), stream=True)
        with pytest.raises(JobFailedError):
            list(failing.tokens(PATIENCE_S))
        endless = client.enqueue_prompt(unique(ENDLESS), stream=True)
        tokens = endless.tokens(PATIENCE_S)
        next(tokens)
        endless.cancel()
        with pytest.raises(JobCancelledError):
            list(tokens)

    def test_a_timeout_is_kept_though_tokens_come(self, client: Client) -> None:
        job = client.enqueue_prompt(unique(ENDLESS), stream=True)
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError):
            list(job.tokens(1.0))
        assert time.monotonic() - began < PATIENCE_S
        job.cancel()

    def test_callbacks(self, client: Client) -> None:
        heard: list[str] = []
        done: list[object] = []
        job = client.enqueue_prompt(unique(LONG), stream=True)

        result = job.stream(on_token=heard.append, on_complete=done.append, timeout=PATIENCE_S)

        assert result is not None
        assert "".join(heard) == result.text
        assert done == [result]
        errors: list[Exception] = []
        failing = client.enqueue_prompt(unique("[[sim:status=400]] no"), stream=True)
        assert failing.stream(on_error=errors.append, timeout=PATIENCE_S) is None
        assert [type(error) for error in errors] == [JobFailedError]
        with pytest.raises(JobFailedError):
            failing.stream(timeout=PATIENCE_S)

    async def test_asynchronously_many_share_a_connection(self, site: Site) -> None:
        async with AsyncClient(site.settings) as client:
            jobs = [await client.enqueue_prompt(unique(LONG), stream=True) for _ in range(5)]

            async def read(number: int) -> str:
                return "".join([token async for token in jobs[number].tokens(PATIENCE_S)])

            texts = await asyncio.gather(*map(read, range(5)))
            assert texts == [(await job.result()).text for job in jobs]
            heard: list[str] = []

            async def on_token(token: str) -> None:
                heard.append(token)

            result = await jobs[0].stream(on_token=on_token)
            assert result is not None
            assert "".join(heard) == result.text

    def test_without_redis_the_text_comes_with_the_result(self, site: Site) -> None:
        settings = site.settings.model_copy(
            update={"cache_url": SecretStr("redis://127.0.0.1:1/0")}
        )
        with Client(settings) as client:
            job = client.enqueue_prompt(unique(LONG), stream=True)

            assert list(job.tokens(PATIENCE_S)) == [job.result().text]


def test_a_worker_is_killed_in_mid_stream(site: Site, worker: Process, tenant: Tenant) -> None:
    """The last test of this module: the worker that they share does not survive it."""
    job_id = site.submit(tenant, LONG)
    screen = Screen()
    with site.following(tenant, job_id) as events:
        first_tokens(events, screen, 10)
        worker.kill()
        with site.worker("basic"):
            for event in events:
                screen.show(event)

    assert screen.names.count("reset") == 1
    assert screen.result is not None
    assert screen.text == screen.result["text"]
    assert job_row(site.database, job_id)["crashes"] == 1
