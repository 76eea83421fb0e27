"""How a contestant is measured, the same for every one of them.

Its whole backlog is enqueued before its workers start, so that the producer costs nothing of the
measured time. Then the workers start, and the clock runs between two instants that the results
themselves carry: from the moment at which the first tenth of the prompts was finished (start-up
and warm-up are over) until the last result. Both are read from the result rows, which take
Postgres' clock as they are inserted; the bare loop, which has no database, notes the time of each
answer itself. CPU time is sampled all along and read at the same two instants, for the whole tree
of worker processes (the waiting parent of a prefork worker included) and for the whole of
Postgres.

All contestants and the servers share the machine's cores, as they would on a small machine.
Postgres is durable (fsync on), the broker is Valkey with its append-only file. Between two
contestants the broker is emptied and Postgres makes a checkpoint, so that none pays for another.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import redis
import sqlalchemy as sa

from benchmarks import machine
from benchmarks.machine import BenchmarkError, CpuTrace

GROUPS = ("worker", "postgres", "valkey", "provider")
_POLL_S = 0.1  # each poll counts rows, which must not cost what it measures


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The servers that a contestant finds, empty of other contestants' work.

    Attributes:
        engine: For the runner's own statements.
        database_url: SQLAlchemy's URL of Postgres.
        broker_url: The URL of Valkey, password included.
        provider_url: Where the OpenAI-compatible provider is, without a path.
        directory: For logs and files.
        pids: The process of each server, by its group.
    """

    engine: sa.Engine
    database_url: str
    broker_url: str
    provider_url: str
    directory: Path
    pids: dict[str, int]


class Contestant(Protocol):
    """A way to get prompts answered."""

    @property
    def name(self) -> str:
        """Its key in the results; those of one name are variants of one contestant."""
        ...

    @property
    def variant(self) -> str:
        """How it is set up, for the reader; of several variants the fastest counts."""
        ...

    def enqueue(self, stage: Stage, prompts: int) -> None:
        """Remove what an earlier run left and make a backlog of `prompts` different prompts."""
        ...

    def start(self, stage: Stage) -> Sequence[subprocess.Popen[bytes]]:
        """Start the workers; they need not be ready yet."""
        ...

    def finished(self, stage: Stage) -> int:
        """How many prompts of the backlog have their result."""
        ...

    def finish_times(self, stage: Stage) -> list[float]:
        """When each result came, in Unix seconds, in ascending order."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """One measurement to be made.

    Attributes:
        latency_ms: The provider's latency, as its option understands it.
        prompts: The whole backlog.
        warm_up: The part of it that is finished before the clock starts. With a latency: a
            multiple of the calls in flight, or a part of a wave would be counted as a whole one.
        timeout_s: After which it has failed.
    """

    contestant: Contestant
    latency_ms: str = "0"
    prompts: int
    warm_up: int
    timeout_s: float = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one heat measured.

    Attributes:
        cpu_us_per_prompt: Microseconds of CPU time a prompt, by group of processes.
        foreign_cores: Cores that were busy with something else on average; the runner itself
            takes a few hundredths, and more than that makes the rate too low.
    """

    name: str
    variant: str
    latency_ms: str
    prompts_per_s: float
    cpu_us_per_prompt: dict[str, float]
    foreign_cores: float


def measure(heat: Heat, stage: Stage) -> Score:
    """Run one heat on an empty stage.

    Raises:
        BenchmarkError: It did not finish its backlog, or a worker failed.
    """
    contestant = heat.contestant
    _clear(stage)
    contestant.enqueue(stage, heat.prompts)
    workers = contestant.start(stage)
    with machine.running(workers):
        roots = {"worker": [worker.pid for worker in workers]}
        roots |= {group: [pid] for group, pid in stage.pids.items()}
        with CpuTrace(roots) as trace:
            machine.wait_for(
                lambda: contestant.finished(stage) >= heat.prompts,
                f"{contestant.name} ({contestant.variant}), logs in {stage.directory}",
                processes=workers,
                timeout_s=heat.timeout_s,
                poll_s=_POLL_S,
            )
        times = contestant.finish_times(stage)
    return _score(heat, times, trace)


def _score(heat: Heat, times: list[float], trace: CpuTrace) -> Score:
    contestant = heat.contestant
    if len(times) != heat.prompts:
        raise BenchmarkError(f"{contestant.name}: {len(times)} results of {heat.prompts}")
    begin, end = times[heat.warm_up - 1], times[-1]
    measured = heat.prompts - heat.warm_up
    cpu = {group: trace.used_s(group, begin, end) / measured * 1e6 for group in GROUPS}
    return Score(
        name=contestant.name,
        variant=contestant.variant,
        latency_ms=heat.latency_ms,
        prompts_per_s=measured / (end - begin),
        cpu_us_per_prompt=cpu,
        foreign_cores=trace.foreign_cores(begin, end),
    )


def _clear(stage: Stage) -> None:
    with redis.Redis.from_url(stage.broker_url) as broker:
        broker.flushall()
    with stage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("CHECKPOINT"))


def count_rows(stage: Stage, table: str) -> int:
    """How many rows `table` has."""
    with stage.engine.connect() as connection:
        return int(connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())


def instants(stage: Stage, table: str, column: str = "finished_at") -> list[float]:
    """A column of timestamps in Unix seconds, in ascending order."""
    query = sa.text(f"SELECT extract(epoch FROM {column})::float8 FROM {table} ORDER BY 1")
    with stage.engine.connect() as connection:
        return [float(instant) for instant in connection.execute(query).scalars()]
