"""Jobs on their way through a real pipeline, with limits in a real Valkey."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from tests.integration.test_pipeline import DEADLINE_S, Rig
from tests.rows import change, insert, job_row, result_rows, spec

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions, parse_fleet
from promptfleet_shared.jobs import JobKind
from promptfleet_shared.policies.limits import Dimension
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.providers.gemini import GeminiProvider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Call
from promptfleet_workers.providers.simulated.http import HttpServer
from promptfleet_workers.providers.simulated.options import Options
from promptfleet_workers.providers.simulated.server import SimulatedProvider
from promptfleet_workers.rate_limits.building import Limiting
from promptfleet_workers.rate_limits.exchange import PREFIX
from promptfleet_workers.rate_limits.learning import limits_told

# Six a minute: the first goes at once, the next in ten seconds.
FULL_FIRST = """
[models.m]
[[models.m.deployments]]
name = "first"
base_url = "http://first"
limits = { requests_per_minute = 6 }
[[models.m.deployments]]
name = "second"
base_url = "http://second"
"""
TENANTS = """
[[limits.rules]]
per = "tenant"
requests_per_minute = 6
"""
Rigged = Callable[[str], Rig]


@pytest.fixture
async def limited(database_url: str, database: sa.Engine, broker_url: str) -> AsyncIterator[Rigged]:
    made: list[tuple[Rig, Limiting]] = []

    def make(limits: str) -> Rig:
        rig = Rig(database_url, database, calls=8, batches=8)
        limiting = Limiting.of(parse_fleet(limits), broker_url, Pricer(), rig.database)
        assert limiting is not None
        rig.caller._quotas = limiting.quotas
        made.append((rig, limiting))
        return rig

    yield make
    for rig, limiting in made:
        async with asyncio.timeout(DEADLINE_S):
            await rig.pipeline.drain(0.0)
        await limiting.aclose()
        await rig.database.close()


async def run(rig: Rig, *ids: uuid.UUID) -> None:
    await rig.settled(rig.take(*ids))


async def test_a_job_without_room_waits_in_the_database_and_its_result_tells_of_it(
    limited: Rigged,
) -> None:
    rig = limited(TENANTS)
    first, second = spec("a", tenant="t"), spec("b", tenant="t")
    other = spec("c", tenant="u")
    insert(rig.rows, first, second, other)
    await run(rig, first.id)

    await run(rig, second.id, other.id)

    assert [call.requests for call in rig.provider.calls[1:]] == [[other.request.decode()]]
    row = job_row(rig.rows, second.id)
    assert (row["state"], row["attempt"], row["deferrals"], row["calls"]) == ("queued", 0, 1, 0)
    assert row["last_error"]["code"] == "limit_reached"
    with rig.rows.connect() as connection:
        wait_s = connection.execute(
            sa.text("SELECT extract(epoch FROM run_at - clock_timestamp())::float8 FROM jobs"
                    " WHERE id = :id"), {"id": second.id},
        ).scalar_one()  # fmt: skip
    assert 5 < wait_s < 11

    change(rig.rows, second.id, run_at="clock_timestamp()")
    # The clock of the limit can't be moved: the tenant's next job comes from elsewhere.
    rig.caller._quotas = None
    await run(rig, second.id)
    (result,) = result_rows(rig.rows, second.id)
    assert result["decision"]["limits"]["limit"] == "tenant/requests_per_minute"
    assert result["decision"]["limits"]["waited_ms"] > 5000


async def test_where_one_deployment_has_no_room_its_sibling_is_asked(limited: Rigged) -> None:
    rig = limited(FULL_FIRST)
    jobs = [spec(f"{n}") for n in range(3)]
    insert(rig.rows, *jobs)

    await run(rig, *[job.id for job in jobs])

    called = {name: len(provider.calls) for name, provider in rig.providers.items()}
    assert called == {"first": 1, "second": 2}


async def test_a_short_wait_is_waited_out_in_the_worker(limited: Rigged) -> None:
    rig = limited(TENANTS.replace("6", "120"))
    jobs = [spec(f"{n}", tenant="t") for n in range(2)]
    insert(rig.rows, *jobs)

    await run(rig, *[job.id for job in jobs])

    rows = [result_rows(rig.rows, job.id)[0] for job in jobs]
    assert [row["state"] for row in rows] == ["succeeded", "succeeded"]
    waited = [(row["decision"] or {}).get("limits", {}).get("waited_ms", 0) for row in rows]
    assert max(waited) >= 150


async def test_a_minutes_quota_that_a_refusal_of_gemini_names_holds_for_the_fleet(
    limited: Rigged, broker_url: str
) -> None:
    simulated = SimulatedProvider(Options(rpm=2))
    server = HttpServer(simulated)
    port = await server.start("127.0.0.1", 0)
    client = HttpClient()
    deployment = f"""
[models.m]
[[models.m.deployments]]
name = "first"
provider = "gemini"
base_url = "http://127.0.0.1:{port}/v1beta"
limits = {{}}
"""
    (there,) = parse_fleet(deployment).models["m"].deployments
    first, second = limited(deployment), limited(deployment)
    for rig in (first, second):
        rig.provider.behaviour = GeminiProvider(there, client).call
    jobs = [spec(f"{n}", deadline_s=600.0) for n in range(4)]
    insert(first.rows, *jobs)
    await run(first, jobs[0].id, jobs[1].id, jobs[2].id)
    states = sorted(first.state(job.id) for job in jobs[:3])
    assert states == ["queued", "succeeded", "succeeded"]
    with redis.Redis.from_url(broker_url, decode_responses=True) as valkey:
        name = f"{PREFIX}deployment:first"
        told: Any = valkey.hgetall(f"{name}:requests_per_minute")
        valkey.delete(f"{name}:health")  # the pause that it asked for is over
        valkey.hset(f"{name}:requests_per_minute", "at", int(told["till"]) - 3_540_000_000)
    assert told["told"] == "2"

    await run(second, jobs[3].id)

    called = {name: len(provider.calls) for name, provider in second.providers.items()}
    assert called == {"first": 0, "second": 1}
    assert simulated.stats.rejected[429] == 1
    await client.aclose()
    await server.drain(1)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_headers_of_answers_and_of_refusals_are_heard(stream: bool) -> None:
    server = HttpServer(SimulatedProvider(Options(rpm=1, tpm=5000)))
    port = await server.start("127.0.0.1", 0)
    client = HttpClient()
    provider = OpenAIProvider(Deployment(base_url=f"http://127.0.0.1:{port}/v1"), client)
    heard: list[dict[Dimension, float]] = []
    call = Call(
        kind=JobKind.CHAT,
        model="m",
        requests=['{"messages":[{"content":"hi","role":"user"}]}'],
        input_tokens=[1],
        timeouts=TimeoutOptions(),
        stream=stream,
        on_headers=lambda headers: heard.append(dict(limits_told(headers))),
    )

    await provider.call(call)
    with pytest.raises(ProviderError, match="rate_limit_exceeded"):
        await provider.call(call)

    assert heard == [{Dimension.REQUESTS: 1, Dimension.TOKENS: 5000}] * 2
    await client.aclose()
    await server.drain(1)
