"""What the HTTP API adds to a chat: client, API, Postgres, Valkey, worker, each its own process.

    python -m benchmarks.api [--requests 200] [--concurrent 32] [--latency-ms 50]

The provider takes a fixed time. What is left of the client's own time once the provider's and the
batch window are taken away is the overhead. The rows' instants are of the same machine's clock, so
they tell where it goes: before the job is committed, until a worker has it, around the call, and
from the result's commit back to the client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import psutil
import sqlalchemy as sa

from benchmarks import machine
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey, free_port
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate
from promptfleet_shared.store.tables import results

WINDOW_MS = 10.0
GOAL_MS = 15.0
WARM_UP = 30
START_TIMEOUT_S = 60.0
_FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = {window}
[cache]
enabled = false
[tiers.basic]
models = ["fixed"]
[models.fixed]
price_as = "free"
[[models.fixed.deployments]]
base_url = "http://127.0.0.1:{port}/v1"
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request, in seconds of Unix' time."""

    job_id: uuid.UUID
    sent: float
    received: float


class ChatClient:
    """One kept connection that does as little as it can."""

    def __init__(self, port: int) -> None:
        """Connect with the first request."""
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, text: str) -> Sample:
        """One chat, from its first byte to its last."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = orjson.dumps(
            {"model": "fixed", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        )
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        sent = time.time()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        headers = dict(
            line.split(b": ", 1) for line in answer.lower().split(b"\r\n") if b": " in line
        )
        await reader.readexactly(int(headers[b"content-length"]))
        received = time.time()
        assert answer.split(b" ", 2)[1] == b"200", answer
        job_id = uuid.UUID(headers[b"x-promptfleet-job"].decode())
        return Sample(job_id=job_id, sent=sent, received=received)

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()


async def measure(port: int, requests: int, concurrent: int) -> list[Sample]:
    """So many chats, so many at once."""
    clients = [ChatClient(port) for _ in range(concurrent)]
    each = -(-requests // concurrent)

    async def one(client: ChatClient) -> list[Sample]:
        return [await client.ask(uuid.uuid4().hex) for _ in range(each)]

    found = await asyncio.gather(*(one(client) for client in clients))
    for client in clients:
        client.close()
    return [sample for samples in found for sample in samples]


Parts = dict[str, list[float]]


def dissect(engine: sa.Engine, samples: Sequence[Sample]) -> Parts:
    """Milliseconds of each part of the requests' way."""
    with engine.connect() as connection:
        query = sa.select(results).where(results.c.job_id.in_([s.job_id for s in samples]))
        rows = {row.job_id: row for row in connection.execute(query)}
    parts: Parts = {}
    for sample in samples:
        row = rows[sample.job_id]
        created, finished = row.created_at.timestamp(), row.finished_at.timestamp()
        total_ms = (sample.received - sample.sent) * 1000
        for name, ms in {
            "all": total_ms,
            "provider": row.provider_ms,
            "overhead (without provider and window)": total_ms - row.provider_ms - WINDOW_MS,
            "  client's request to its commit": (created - sample.sent) * 1000,
            "  commit to claim, without window": row.queued_ms - WINDOW_MS,
            "  claim to result, without provider": row.total_ms - row.queued_ms - row.provider_ms,
            "  result to client's answer": (sample.received - finished) * 1000,
        }.items():
            parts.setdefault(name, []).append(ms)
    return parts


def report(title: str, parts: Parts) -> str:
    """A table of milliseconds."""
    lines = [f"| {title}, ms | p50 | p95 |", "|---|---|---|"]
    for name, values in parts.items():
        cuts = statistics.quantiles(values, n=20)
        lines.append(f"| {name} | {cuts[9]:.1f} | {cuts[18]:.1f} |")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What is measured.

    Attributes:
        port: Of the API.
        processes: By name, for their CPU time.
    """

    port: int
    engine: sa.Engine
    processes: dict[str, psutil.Process]

    def measure(self, requests: int, concurrent: int) -> Parts:
        """Milliseconds of each part, and of CPU a request."""
        before = self._cpu_s()
        samples = asyncio.run(measure(self.port, requests, concurrent))
        used = {name: seconds - before[name] for name, seconds in self._cpu_s().items()}
        parts = dissect(self.engine, samples)
        for name, seconds in used.items():
            parts[f"CPU of the {name}"] = [seconds / len(samples) * 1000] * 2
        return parts

    def _cpu_s(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: used.user + used.system for name, used in times.items()}


@contextlib.contextmanager
def fleet(directory: Path, latency_ms: float) -> Iterator[Fleet]:
    """Servers, a provider, a worker and an API."""
    provider_port, api_port = free_port(), free_port()
    config = directory / "fleet.toml"
    config.write_text(_FLEET.format(port=provider_port, window=WINDOW_MS))
    simulated = ["promptfleet_workers.providers.simulated"]
    with (
        EmbeddedPostgres(directory / "postgres") as postgres,
        EmbeddedValkey(directory / "valkey") as valkey,
    ):
        engine = make_engine(postgres.url, application_name="benchmark")
        migrate(engine)
        env = {
            "PROMPTFLEET_DATABASE_URL": postgres.url,
            "PROMPTFLEET_BROKER_URL": valkey.url,
            "PROMPTFLEET_CONFIG": str(config),
            "PROMPTFLEET_API_KEYLESS": "1",
        }
        worker = ["celery", "-A", "promptfleet_workers.app", "worker", "-Q", "prompts.basic"]
        flags = ["--port", str(provider_port), "--latency-ms", str(latency_ms)]
        processes = [
            machine.start([*simulated, *flags], env=env, log=directory / "provider.log"),
            machine.start([*worker, "--loglevel", "WARNING"], env=env, log=directory / "w.log"),
            machine.start(
                ["promptfleet.cli", "api", "--port", str(api_port)],
                env=env,
                log=directory / "api.log",
            ),
        ]
        with machine.running(processes):
            for what, port in (("the provider", provider_port), ("the API", api_port)):
                machine.wait_for(
                    functools.partial(machine.accepts_connections, port),
                    f"start of {what}",
                    processes=processes,
                    timeout_s=START_TIMEOUT_S,
                )
            provider, worker_process, api = (psutil.Process(p.pid) for p in processes)
            yield Fleet(
                port=api_port,
                engine=engine,
                processes={"API": api, "worker": worker_process, "provider": provider},
            )
        engine.dispose()


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if a lone chat's overhead is above the goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=50)
    flags = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="api") as directory,
        fleet(Path(directory), flags.latency_ms) as running,
    ):
        running.measure(WARM_UP, 1)
        alone = running.measure(flags.requests, 1)
        together = running.measure(flags.requests * 4, flags.concurrent)
    print(report("One by one", alone))
    print(report(f"{flags.concurrent} at once", together))
    overhead = statistics.median(alone["overhead (without provider and window)"])
    return 0 if overhead <= GOAL_MS else 1


if __name__ == "__main__":
    sys.exit(main())
