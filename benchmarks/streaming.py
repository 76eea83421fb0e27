"""How soon a token reaches a client: provider, worker, Redis, API, client, each its own process.

    python -m benchmarks.streaming

Each token of the provider here is the very instant at which it is sent, by the machine's monotonic
clock; the client subtracts. So the number holds all: the worker's HTTP client, the write to Redis,
the API's read, and the event's way to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks import machine
from promptfleet import AsyncClient
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey, free_port
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate

TOKENS = 30
FIRST_TOKEN_S = 0.3
ARRIVAL_S = 0.04
"""For each stream that begins in the same instant: all listen before the first token is sent, so
that what is measured is the token's way and not the client's."""
START_TIMEOUT_S = 60.0
ONE_BY_ONE = 50
EVERY_S = 0.02
"""Between two tokens of a stream, one stream at a time."""
AT_ONCE = ((10, 0.02), (50, 0.05), (200, 0.2))
"""Numbers of streams, and the seconds between two tokens of each."""
FIRST_GOAL_MS = 30

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
)
_FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[cache]
enabled = false
[tiers.basic]
models = ["clock"]
[models.clock]
price_as = "free"
[[models.clock.deployments]]
base_url = "http://127.0.0.1:{port}/v1"
"""


# -- a provider whose tokens are instants ----------------------------------------------------


def serve_instants(port: int) -> None:
    """Answer every request with a stream of instants."""

    async def serve() -> None:
        async with await asyncio.start_server(_answer, "127.0.0.1", port) as server:
            await server.serve_forever()

    asyncio.run(serve())


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        request = orjson.loads(await reader.readexactly(length))
        first_s, every_s = map(float, request["messages"][-1]["content"].split())
        writer.write(_HEAD)
        await asyncio.sleep(first_s + every_s * random.random())
        for _ in range(TOKENS):
            await asyncio.sleep(every_s)
            writer.write(_chunk({"content": f"{time.monotonic():.6f} "}, None))
            await writer.drain()
        done = b"data: [DONE]\n\n"
        writer.write(_chunk({}, "stop") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))
        await writer.drain()
    writer.close()


def _chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    event = b"data: %b\n\n" % orjson.dumps(
        {"object": "chat.completion.chunk", "model": "clock", "choices": [choice]}
    )
    return b"%x\r\n%b\r\n" % (len(event), event)


# -- clients ---------------------------------------------------------------------------------


async def follow(port: int, job_id: object) -> list[float]:
    """Milliseconds that each token of a job was on its way to a client of the API."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    ages: list[float] = []
    kind = b""
    while line := await reader.readline():
        if line.startswith(b"event: "):
            kind = line[7:].strip()
        elif line.startswith(b"data: ") and kind == b"token":
            now = time.monotonic()
            text = orjson.loads(line[6:])["text"]
            ages += [(now - float(instant)) * 1000 for instant in text.split()]
        elif kind == b"result":
            break
    writer.close()
    assert len(ages) == TOKENS, f"{len(ages)} tokens of {TOKENS} came"
    return ages


async def follow_in_python(client: AsyncClient, timing: str) -> list[float]:
    """The same to `async for token in job.tokens()`."""
    job = await client.enqueue_prompt(timing, stream=True)
    ages: list[float] = []
    async for token in job.tokens(60):
        now = time.monotonic()
        ages += [(now - float(instant)) * 1000 for instant in token.split()]
    return ages


async def measure(port: int, settings: Settings) -> dict[str, list[list[float]]]:
    """Ages of tokens, by how many streams there are at once."""
    found: dict[str, list[list[float]]] = {}
    async with AsyncClient(settings) as client:

        async def one(timing: str) -> list[float]:
            job = await client.enqueue_prompt(timing, stream=True)
            return await follow(port, job.id)

        lone = f"{FIRST_TOKEN_S} {EVERY_S}"
        await one(lone)
        found["HTTP, one by one"] = [await one(lone) for _ in range(ONE_BY_ONE)]
        found["Python, one by one"] = [
            await follow_in_python(client, lone) for _ in range(ONE_BY_ONE)
        ]
        for number, every_s in AT_ONCE:
            timing = f"{FIRST_TOKEN_S + number * ARRIVAL_S} {every_s}"
            runs = await asyncio.gather(*(one(timing) for _ in range(number)))
            found[f"HTTP, {number} at once, {number / every_s:.0f} tokens/s"] = list(runs)
    return found


# -- the machine -----------------------------------------------------------------------------


@contextlib.contextmanager
def fleet(directory: Path) -> Iterator[tuple[int, Settings]]:
    """Servers, a provider, a worker and an API; the API's port, and the settings of clients."""
    provider_port, api_port = free_port(), free_port()
    config = directory / "fleet.toml"
    config.write_text(_FLEET.format(port=provider_port))
    provider = multiprocessing.Process(target=serve_instants, args=(provider_port,), daemon=True)
    provider.start()
    with (
        EmbeddedPostgres(directory / "postgres") as postgres,
        EmbeddedValkey(directory / "valkey") as valkey,
    ):
        engine = make_engine(postgres.url, application_name="benchmark")
        migrate(engine)
        engine.dispose()
        env = {
            "PROMPTFLEET_DATABASE_URL": postgres.url,
            "PROMPTFLEET_BROKER_URL": valkey.url,
            "PROMPTFLEET_CONFIG": str(config),
            "PROMPTFLEET_API_KEYLESS": "1",
        }
        worker = ["celery", "-A", "promptfleet_workers.app", "worker", "-Q", "prompts.basic"]
        api = ["uvicorn", "promptfleet.api.app:create_app", "--factory", "--port", str(api_port)]
        processes = [
            machine.start([*worker, "--loglevel", "WARNING"], env=env, log=directory / "w.log"),
            machine.start([*api, "--log-level", "warning"], env=env, log=directory / "api.log"),
        ]
        with machine.running(processes):
            machine.wait_for(
                lambda: machine.accepts_connections(api_port),
                "start of the API",
                processes=processes,
                timeout_s=START_TIMEOUT_S,
            )
            facts: dict[str, Any] = {"database_url": postgres.url, "broker_url": valkey.url}
            yield api_port, Settings(**facts, config=config)
    provider.kill()
    provider.join()


def report(found: dict[str, list[list[float]]]) -> str:
    """A table of milliseconds."""
    lines = [
        "| From provider to client, ms | streams | first token p50 | p95 | all p50 | p95 |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        first, every = [run[0] for run in runs], [age for run in runs for age in run]
        cells = [*_spread(first), *_spread(every)]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(f"{c:.1f}" for c in cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=20)
    return cuts[9], cuts[18]


def main() -> int:
    """Measure, print, and fail if a lone stream's first token is later than promised."""
    with (
        tempfile.TemporaryDirectory(prefix="streaming") as directory,
        fleet(Path(directory)) as (port, settings),
    ):
        found = asyncio.run(measure(port, settings))
    print(report(found))
    _, p95 = _spread([run[0] for run in found["HTTP, one by one"]])
    return 0 if p95 <= FIRST_GOAL_MS else 1


if __name__ == "__main__":
    sys.exit(main())
