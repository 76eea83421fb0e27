"""The peers as contestants: which processes they are, and how their backlogs are made."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import orjson
import sqlalchemy as sa
from celery import Celery

from benchmarks import machine
from benchmarks.contest import Heat, Stage, count_rows, instants
from benchmarks.peers.hand_rolled import Base, Prompt

CONCURRENCIES = (5, 20, 50, 100)  # fewer threads fight less for the interpreter
PREFORK_PROCESSES = 2
HAND_ROLLED_PROMPTS = 2_000
BARE_LOOP_PROMPTS = 20_000
CALLS_IN_FLIGHT = 500
_RESULTS = "hand_rolled.results"
_APP = "benchmarks.peers.hand_rolled"


def heats() -> list[Heat]:
    """All the peers' measurements."""
    hand_rolled = [
        *(HandRolled(pool="threads", concurrency=number) for number in CONCURRENCIES),
        *(HandRolled(pool="gevent", concurrency=number) for number in CONCURRENCIES),
        HandRolled(pool="prefork", concurrency=PREFORK_PROCESSES),
    ]
    return [
        *(
            Heat(contestant=peer, prompts=HAND_ROLLED_PROMPTS, warm_up=HAND_ROLLED_PROMPTS // 10)
            for peer in hand_rolled
        ),
        Heat(
            contestant=BareLoop(concurrency=100),
            prompts=BARE_LOOP_PROMPTS,
            warm_up=BARE_LOOP_PROMPTS // 10,
        ),
        Heat(
            contestant=BareLoop(concurrency=CALLS_IN_FLIGHT),
            latency_ms="1000",
            prompts=12 * CALLS_IN_FLIGHT,
            warm_up=2 * CALLS_IN_FLIGHT,
        ),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HandRolled:
    """One worker of the hand-rolled app: one process, or with prefork `concurrency` of them."""

    pool: Literal["threads", "gevent", "prefork"]
    concurrency: int

    @property
    def name(self) -> str:
        """Its key in the results."""
        return f"hand_rolled_{self.pool}"

    @property
    def variant(self) -> str:
        """Its concurrency."""
        return f"-c {self.concurrency}"

    def enqueue(self, stage: Stage, prompts: int) -> None:
        """Insert the rows, then send one task for each."""
        with stage.engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA IF EXISTS hand_rolled CASCADE"))
            connection.execute(sa.text("CREATE SCHEMA hand_rolled"))
            Base.metadata.create_all(connection)
            connection.execute(
                sa.insert(Prompt),
                [
                    {"id": number, "text": f"Question {number}: how are you?"}
                    for number in range(prompts)
                ],
            )
        with (
            Celery(broker=stage.broker_url, set_as_current=False) as sender,
            sender.producer_or_acquire() as producer,
        ):
            for number in range(prompts):
                sender.send_task(
                    "hand_rolled.run_prompt",
                    args=[number],
                    queue="hand_rolled",
                    producer=producer,
                )

    def start(self, stage: Stage) -> Sequence[subprocess.Popen[bytes]]:
        """`celery worker` with the switches that are recommended for speed."""
        arguments = ["celery", "-A", _APP, "worker", "--loglevel", "WARNING"]
        arguments += ["--pool", self.pool, "--concurrency", str(self.concurrency)]
        arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        env = {
            "HAND_ROLLED_DATABASE_URL": stage.database_url,
            "HAND_ROLLED_BROKER_URL": stage.broker_url,
            "HAND_ROLLED_PROVIDER_URL": stage.provider_url,
            "HAND_ROLLED_CONCURRENCY": str(1 if self.pool == "prefork" else self.concurrency),
        }
        return [
            machine.start(
                arguments, env=env, log=stage.directory / f"{self.name}_{self.concurrency}.log"
            )
        ]

    def finished(self, stage: Stage) -> int:
        """The rows of its result table."""
        return count_rows(stage, _RESULTS)

    def finish_times(self, stage: Stage) -> list[float]:
        """When its result rows were inserted."""
        return instants(stage, _RESULTS)


@dataclasses.dataclass(kw_only=True, slots=True)
class BareLoop:
    """The bare loop's process; its backlog is a number."""

    concurrency: int
    _prompts: int = 0

    @property
    def name(self) -> str:
        """Its key in the results."""
        return "bare_loop"

    @property
    def variant(self) -> str:
        """How many calls are in flight."""
        return f"{self.concurrency} in flight"

    def enqueue(self, stage: Stage, prompts: int) -> None:
        """Remember the number."""
        _output(stage).unlink(missing_ok=True)
        self._prompts = prompts

    def start(self, stage: Stage) -> Sequence[subprocess.Popen[bytes]]:
        """One process."""
        arguments = ["benchmarks.peers.bare_loop", stage.provider_url, str(self._prompts)]
        arguments += [str(self.concurrency), str(_output(stage))]
        return [machine.start(arguments, env={}, log=stage.directory / "bare_loop.log")]

    def finished(self, stage: Stage) -> int:
        """It tells only when all is done."""
        return self._prompts if _output(stage).exists() else 0

    def finish_times(self, stage: Stage) -> list[float]:
        """As it noted them."""
        return sorted(orjson.loads(_output(stage).read_bytes()))


def _output(stage: Stage) -> Path:
    return stage.directory / "bare_loop.json"
