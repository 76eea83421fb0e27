"""How soon prompts are answered by three unequal deployments, by load balancing strategy.

    python -m benchmarks.balancing [--only peak_ewma,ordered] [--seconds 10] [--rate 110]

Three servers stand for a model's deployments: each has so many slots, takes so long for a call, and
lets the others wait, as a GPU server does. In the middle third of each run the quick one takes
five times as long. Prompts come at a steady rate, whether earlier ones were answered or not, to two
worker processes that share their loads through Valkey. All strategies run one after the other on
the same servers; only ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from benchmarks import machine
from promptfleet import Client
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey, free_port
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate

STRATEGIES = (
    "ordered",
    "ordered+bounds",
    "cheapest+bounds",
    "weighted",
    "least_busy",
    "peak_ewma",
)
"""With bounds, each deployment's `max_concurrency` is its number of slots."""
RATE = 110
SECONDS = 9
WORKERS = 2
BROWN_OUT = 5
TIMEOUT_S = 120.0
RESULTS = Path(__file__).with_name("results") / "balancing.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A deployment: `slots` calls at once, `latency_s` each; `price_as` for the cheapest."""

    name: str
    slots: int
    latency_s: float
    price_as: str
    browns_out: bool = False


SERVERS = (
    Server(name="quick", slots=12, latency_s=0.1, price_as="openai/gpt-4o", browns_out=True),
    Server(name="usual", slots=12, latency_s=0.2, price_as="openai/gpt-4o-mini"),
    Server(name="slow", slots=12, latency_s=0.8, price_as="free"),
)
_FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 2
max_concurrent_calls = 400
[cache]
enabled = false
[breaker]
enabled = false
[balancing]
strategy = "{strategy}"
[tiers.basic]
models = ["m"]
[models.m]
deployments = [
{deployments}]
"""
_ANSWER = orjson.dumps(
    {
        "model": "m",
        "choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1},
    }
)
_RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_ANSWER),
    _ANSWER,
)


# -- the servers -------------------------------------------------------------------------------


def serve(server: Server, port: int, slow_from: Any, slow_until: Any) -> None:
    """Answer until killed; between the two instants, five times as slowly."""

    async def run() -> None:
        slots = asyncio.Semaphore(server.slots)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                    await reader.readexactly(length)
                    async with slots:
                        is_slow = slow_from.value < time.monotonic() < slow_until.value
                        await asyncio.sleep(server.latency_s * (BROWN_OUT if is_slow else 1))
                    writer.write(_RESPONSE)
                    await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", port) as listening:
            await listening.serve_forever()

    asyncio.run(run())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What runs for the whole benchmark."""

    directory: Path
    database_url: str
    broker_url: str
    engine: sa.Engine
    ports: Sequence[int]
    slow_from: Any
    slow_until: Any


@contextlib.contextmanager
def site(directory: Path) -> Iterator[Site]:
    """Postgres, Valkey and the three servers."""
    slow = [multiprocessing.Value("d", 0.0) for _ in range(2)]
    never = [multiprocessing.Value("d", 0.0) for _ in range(2)]
    ports = [free_port() for _ in SERVERS]
    processes = [
        multiprocessing.Process(
            target=serve,
            args=(server, port, *(slow if server.browns_out else never)),
            daemon=True,
        )
        for server, port in zip(SERVERS, ports, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        with (
            EmbeddedPostgres(directory / "postgres") as postgres,
            EmbeddedValkey(directory / "valkey") as valkey,
        ):
            engine = make_engine(postgres.url, application_name="benchmark")
            migrate(engine)
            yield Site(
                directory=directory,
                database_url=postgres.url,
                broker_url=valkey.url,
                engine=engine,
                ports=ports,
                slow_from=slow[0],
                slow_until=slow[1],
            )
            engine.dispose()
    finally:
        for process in processes:
            process.kill()
            process.join()


# -- a run -------------------------------------------------------------------------------------


def run(place: Site, strategy: str, *, rate: float, seconds: float) -> dict[str, Any]:
    """Send prompts at a rate; how long each took, and who answered how many."""
    strategy, _, bounds = strategy.partition("+")
    config = place.directory / f"{strategy}.toml"
    lines = [
        f'  {{ name = "{server.name}", base_url = "http://127.0.0.1:{port}/v1", '
        f'price_as = "{server.price_as}"{bound(server) if bounds else ""} }},\n'
        for server, port in zip(SERVERS, place.ports, strict=True)
    ]
    config.write_text(_FLEET.format(strategy=strategy, deployments="".join(lines)))
    with place.engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE jobs, results, ledger, callbacks"))
    env = {
        "PROMPTFLEET_DATABASE_URL": place.database_url,
        "PROMPTFLEET_BROKER_URL": place.broker_url,
        "PROMPTFLEET_CONFIG": str(config),
    }
    command = ["celery", "-A", "promptfleet_workers.app", "worker", "-Q", "prompts.basic"]
    workers = [
        machine.start(
            [*command, "-n", f"w{n}@%h", "--loglevel", "WARNING"],
            env=env,
            log=place.directory / f"{strategy}-{n}.log",
        )
        for n in range(WORKERS)
    ]
    facts: dict[str, Any] = {"database_url": place.database_url, "broker_url": place.broker_url}
    with machine.running(workers), Client(Settings(**facts, config=config)) as client:
        client.enqueue_prompts([f"warm-up {n}" for n in range(60)])
        wait_for_results(place, 60, workers)
        with place.engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE jobs, results, ledger, callbacks"))
        sent = send(place, client, rate=rate, seconds=seconds)
        wait_for_results(place, sent, workers)
    return measured(place)


def bound(server: Server) -> str:
    """An option of its deployment."""
    return f", max_concurrency = {server.slots}"


def send(place: Site, client: Client, *, rate: float, seconds: float) -> int:
    """Open loop: prompts come whether earlier ones were answered or not."""
    start = time.monotonic()
    place.slow_from.value = start + seconds / 3
    place.slow_until.value = start + 2 * seconds / 3
    sent = 0
    while (elapsed := time.monotonic() - start) < seconds:
        due = int(elapsed * rate) - sent
        if due > 0:
            client.enqueue_prompts([f"question {sent + n}" for n in range(due)])
            sent += due
        time.sleep(0.02)
    return sent


def wait_for_results(place: Site, count: int, workers: Sequence[Any]) -> None:
    """Until so many jobs have ended."""
    query = sa.text("SELECT count(*) FROM results")

    def ended() -> bool:
        with place.engine.connect() as connection:
            return bool(connection.execute(query).scalar_one() >= count)

    machine.wait_for(ended, "results", processes=list(workers), timeout_s=TIMEOUT_S)


def measured(place: Site) -> dict[str, Any]:
    """Milliseconds from acceptance to end, and the deployments' shares of the calls."""
    query = sa.text("SELECT total_ms, deployment, state FROM results")
    with place.engine.connect() as connection:
        rows = connection.execute(query).all()
    assert all(row.state == "succeeded" for row in rows), "a prompt failed"
    cuts = statistics.quantiles([row.total_ms for row in rows], n=20)
    counts = collections.Counter(row.deployment for row in rows)
    return {
        "prompts": len(rows),
        "p50_ms": round(cuts[9]),
        "p95_ms": round(cuts[18]),
        "shares": {server.name: round(counts[server.name] / len(rows), 3) for server in SERVERS},
    }


def report(found: dict[str, dict[str, Any]]) -> str:
    """A table."""
    names = [server.name for server in SERVERS]
    lines = [
        f"| Strategy | p50 ms | p95 ms | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for strategy, row in found.items():
        shares = " | ".join(f"{row['shares'][name]:.0%}" for name in names)
        lines.append(f"| {strategy} | {row['p50_ms']} | {row['p95_ms']} | {shares} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print and write; fail if power of two choices is no better than the file's order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balancing")
    parser.add_argument("--only", default=",".join(STRATEGIES))
    parser.add_argument("--rate", type=float, default=RATE, help="prompts a second")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    flags = parser.parse_args()
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="balancing") as directory,
        site(Path(directory)) as place,
    ):
        for strategy in flags.only.split(","):
            found[strategy] = run(place, strategy, rate=flags.rate, seconds=flags.seconds)
            print(f"{strategy}: {found[strategy]}", flush=True)
    print(report(found))
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"rate": flags.rate, "seconds": flags.seconds, "strategies": found}
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n")
    if not {"ordered", "peak_ewma"} <= found.keys():
        return 0
    return 0 if found["peak_ewma"]["p95_ms"] < found["ordered"]["p95_ms"] else 1


if __name__ == "__main__":
    sys.exit(main())
