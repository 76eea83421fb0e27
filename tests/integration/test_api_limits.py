"""The API in this very process: back-pressure, keyless callers, and mounted in another app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import Message
from tests.api_server import Tenant, new_tenant

import promptfleet.api
from promptfleet.api import uploads
from promptfleet.api.bodies import BodyReader
from promptfleet.api.edge import BrokenOffError
from promptfleet.api.errors import ApiError
from promptfleet_shared.settings import Settings

LOOPBACK = "http://127.0.0.1"


@contextlib.asynccontextmanager
async def serving(settings: Settings, **changes: object) -> AsyncIterator[FastAPI]:
    app = promptfleet.api.create_app(settings.model_copy(update=changes))
    async with promptfleet.api.lifespan(app):
        yield app


def client_of(app: Any, tenant: Tenant | None = None, **options: Any) -> httpx.AsyncClient:
    headers = {} if tenant is None else {"authorization": f"Bearer {tenant.key}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    base_url = options.pop("base_url", LOOPBACK)
    return httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers, **options)


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


async def test_a_tenants_backlog(settings: Settings, database: sa.Engine) -> None:
    ours, theirs = new_tenant(database), new_tenant(database)
    job = {"prompt": "Hello"}
    async with (
        serving(settings, api_max_queued_per_tenant=3, api_max_queued=5) as app,
        client_of(app, ours) as client,
        client_of(app, theirs) as stranger,
    ):
        lines = (await client.post("/v1/jobs", json=[job] * 2)).text.splitlines()
        assert [("id" in line) for line in lines] == [True, True]
        refused = await client.post("/v1/jobs", json=[job] * 2)
        assert (refused.status_code, code_of(refused)) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        one = await client.post("/v1/jobs", json=job)
        assert one.status_code == 202
        refused = await client.post("/v1/jobs", json=job)
        assert (refused.status_code, code_of(refused)) == (429, "queue_full")
        assert "3" in refused.json()["error"]["message"]

        assert (await stranger.post("/v1/jobs", json=[job] * 2)).status_code == 202
        full = await stranger.post("/v1/jobs", json=job)
        assert (full.status_code, code_of(full)) == (503, "overloaded")
        assert full.headers["retry-after"]
        page = (await client.get("/metrics")).text
        assert 'promptfleet_api_refused_total{limit="queued"} 1.0' in page


async def test_a_backlog_that_has_shrunk_is_noticed(
    settings: Settings, database: sa.Engine
) -> None:
    tenant = new_tenant(database)
    async with (
        serving(settings, api_max_queued_per_tenant=1) as app,
        client_of(app, tenant) as client,
    ):
        first = (await client.post("/v1/jobs", json={"prompt": "x"})).json()
        assert (await client.post("/v1/jobs", json={"prompt": "x"})).status_code == 429
        await client.delete(f"/v1/jobs/{first['id']}")
        async with asyncio.timeout(20):
            while (await client.post("/v1/jobs", json={"prompt": "x"})).status_code == 429:
                await asyncio.sleep(0.1)


async def test_requests_that_wait(settings: Settings, database: sa.Engine) -> None:
    tenant, other = new_tenant(database), new_tenant(database)
    async with (
        serving(settings, api_max_waiting=2, api_max_waiting_per_tenant=1) as app,
        client_of(app, tenant) as client,
        client_of(app, other) as stranger,
    ):
        path = await _submitted(client)
        waits = [asyncio.create_task(client.get(f"{path}?wait=30"))]
        await _until(lambda: app.state.services.limits.waiting._taken == 1)
        refused = await client.get(f"{path}?wait=30")
        assert (refused.status_code, code_of(refused)) == (429, "too_many_requests")
        waits.append(asyncio.create_task(stranger.get(f"{await _submitted(stranger)}?wait=30")))
        await _until(lambda: app.state.services.limits.waiting._taken == 2)
        third = new_tenant(database)
        async with client_of(app, third) as late:
            full = await late.get(f"{await _submitted(late)}?wait=30")
            assert (full.status_code, code_of(full)) == (503, "overloaded")
        await client.delete(path)
        assert (await waits[0]).json()["state"] == "cancelled"
        waits[1].cancel()
        await asyncio.gather(waits[1], return_exceptions=True)
        await _until(lambda: app.state.services.limits.waiting._taken == 0)


async def test_memory_of_all_bodies(settings: Settings, database: sa.Engine) -> None:
    tenant = new_tenant(database)
    started, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt": "' + b"x" * 60_000
        started.set()
        await go_on.wait()
        yield b'"}'

    headers = {"content-type": "application/json"}
    async with (
        serving(settings, api_body_memory_bytes=100_000) as app,
        client_of(app, tenant) as client,
    ):
        first = asyncio.create_task(client.post("/v1/jobs", content=slow(), headers=headers))
        await started.wait()
        await _until(lambda: app.state.services.limits.body_memory._held > 60_000)
        refused = await client.post("/v1/jobs", json={"prompt": "y" * 60_000})
        assert (refused.status_code, code_of(refused)) == (503, "overloaded")
        go_on.set()
        assert (await first).status_code == 202
        assert app.state.services.limits.body_memory._held == 0


async def test_only_this_machine_needs_no_key(settings: Settings) -> None:
    async with serving(settings, api_keyless=True) as app:
        async with client_of(app) as client:
            assert (await client.get("/v1/jobs")).status_code == 200
        transport = httpx.ASGITransport(app, client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url=LOOPBACK) as far:
            assert (await far.get("/v1/jobs")).status_code == 401


async def test_mounted_in_another_app(settings: Settings, database: sa.Engine) -> None:
    api = promptfleet.api.create_app(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with promptfleet.api.lifespan(api):
            yield

    outer = FastAPI(lifespan=lifespan, routes=[Mount("/llm", api)])
    async with (
        outer.router.lifespan_context(outer),
        client_of(outer, new_tenant(database)) as client,
    ):
        answer = await client.post("/llm/v1/jobs", json={"prompt": "Hello"})
        assert answer.headers["location"].startswith("/llm/v1/jobs/")
        assert (await client.get(answer.headers["location"])).json()["id"] == answer.json()["id"]
        assert (await client.get("/llm/v1/jobs?limit=0")).status_code == 422
        assert "/llm/openapi.json" in (await client.get("/llm/docs")).text
        page = (await client.get("/llm/metrics")).text
        assert 'route="/v1/jobs"' in page


async def test_a_mounted_api_that_was_not_started_says_so(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    api = promptfleet.api.create_app(settings)
    with caplog.at_level(logging.ERROR):
        async with client_of(api) as client:
            answer = await client.get("/metrics")
    assert (answer.status_code, code_of(answer)) == (500, "internal_error")
    assert "RuntimeError" in str(caplog.records[0].__dict__)


async def test_a_bug_tells_nothing(
    settings: Settings, database: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serving(settings) as app,
        client_of(app, new_tenant(database)) as client,
    ):

        async def broken(*_: object) -> None:
            raise KeyError("a prompt")

        object.__setattr__(app.state.services.stores, "submit", broken)
        answer = await client.post("/v1/jobs", json={"prompt": "x"})
    assert (answer.status_code, code_of(answer)) == (500, "internal_error")
    assert answer.headers["x-request-id"] in str(caplog.records[-1].__dict__)
    assert "a prompt" not in answer.text + caplog.text + str(caplog.records[-1].__dict__)


# An upload whose client is slow


async def test_who_does_not_read_slows_the_upload(
    settings: Settings, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_UNREAD_BYTES", 1_000)
    line = b'{"prompt": "x"}\n' * uploads.MAX_JOBS
    given = 0

    async def receive() -> Message:
        nonlocal given
        given += 1
        return {"type": "http.request", "body": line, "more_body": given < 10}

    reading = asyncio.Event()
    lines: list[bytes] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await reading.wait()
            lines.append(message["body"])

    tenant = new_tenant(database)
    async with serving(settings) as app:
        running = asyncio.create_task(app(_scope(tenant), receive, send))
        await _until(lambda: given >= 3)
        # The lines of one chunk are being sent, those of the next wait, and a third was read.
        for _ in range(100):
            await asyncio.sleep(0.01)
            assert given <= 4
        reading.set()
        await running
    assert given == 10
    assert b"".join(lines).count(b'"id"') == 10 * uploads.MAX_JOBS


async def test_who_never_reads_is_cut_off(
    settings: Settings, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_UNREAD_BYTES", 1_000)
    monkeypatch.setattr(uploads, "STALLED_S", 0.2)

    async def receive() -> Message:
        body = b'{"prompt": "x"}\n' * uploads.MAX_JOBS
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with serving(settings) as app:
        with pytest.raises(BrokenOffError):  # what makes the server hang up
            async with asyncio.timeout(20):
                await app(_scope(new_tenant(database)), receive, send)
        assert app.state.services.limits.uploads._taken == 0


async def test_a_body_that_pauses_for_too_long() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    reader = BodyReader(receive, idle_s=0.05)
    assert await reader.read(within_s=0.01) is None
    with pytest.raises(ApiError) as raised:
        await reader.read()
    assert (raised.value.status, raised.value.error_code) == (408, "body_timeout")
    await reader.close()


def _scope(tenant: Tenant) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/jobs",
        "raw_path": b"/v1/jobs",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "headers": [
            (b"content-type", b"application/x-ndjson"),
            (b"authorization", f"Bearer {tenant.key}".encode()),
        ],
    }


async def _submitted(client: httpx.AsyncClient) -> str:
    answer = await client.post("/v1/jobs", json={"prompt": "Hello"})
    location: str = answer.headers["location"]
    return location


async def _until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
