"""A worker is killed at any step of a provider's batch: no line is sent, or paid for, twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.integration.provider_batching import (
    FLEET,
    PRICES,
    Station,
    batch_job,
    batch_rows,
    calls_of,
    due_now,
    fleet_of,
    line_count,
    simulated,
)
from tests.rows import insert, job_row, ledger_rows, result_rows
from tests.waiting import eventually

from promptfleet_shared.jobs import JobKind
from promptfleet_shared.store import provider_batches as store
from promptfleet_workers.providers.simulated.server import SimulatedProvider

WORKER = Path(__file__).with_name("provider_batch_worker.py")
LEASE_S = 0.8
Seen = Callable[[SimulatedProvider, sa.Engine], bool]

# What hangs, and how the test knows that the worker is there; half of a file is some answers.
STEPS: dict[str, tuple[str, int, Seen]] = {
    "upload": ("upload-hang", 3, lambda there, _: there.stats.requests["POST batches"] == 1),
    "asked, and made": ("create-hang", 3, lambda there, _: there.stats.batches == 1),
    "asked, and not made": (
        "create-deaf",
        3,
        lambda there, rows: (
            batch_rows(rows)[0]["state"] == "submitting"
            and there.stats.requests["POST batches"] >= 1 + _uploads(rows)
        ),
    ),
    "watched": ("look-hang", 3, lambda there, _: there.stats.requests["GET batches"] == 1),
    "landing": (
        "results-hang",
        450,
        lambda _, rows: 0 < _landed(rows) < 450,
    ),
}


def _uploads(rows: sa.Engine) -> int:
    return int(batch_rows(rows)[0]["file_id"] is not None)


def _landed(rows: sa.Engine) -> int:
    with rows.connect() as connection:
        return int(connection.execute(sa.text("SELECT count(*) FROM results")).scalar_one())


class Nursery:
    """Starts workers, each in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @contextlib.contextmanager
    def worker(self, url: str, fleet: Path) -> Iterator[int]:
        """A worker's process id; killed at the end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{url} {fleet} {LEASE_S}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, and what it has started."""
        self._process.communicate(timeout=20)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait off the loop, which the provider runs on."""
    await asyncio.to_thread(eventually, condition, what)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_worker_that_is_killed_at_any_step_sends_nothing_twice(
    provider: str,
    step: str,
    tmp_path: Path,
    database: sa.Engine,
    nursery: Nursery,
) -> None:
    database_url = database.url.render_as_string(hide_password=False)
    if provider == "anthropic" and step == "upload":
        return  # it has no such step
    fault, lines, seen = STEPS[step]
    async with simulated(batch_faults=fault) as (there, url):
        options = {"gather_s": 0.1, "poll_s": 0.1, "settle_s": 0.3, "max_lines": 1000}
        fleet = tmp_path / "fleet.toml"
        fleet.write_text(
            FLEET.format(
                provider=provider,
                base_url=f"{url}/v1",
                price_as=PRICES[provider],
                batch_api="true",
                **options,
            )
        )
        station = Station(database_url, fleet_of(provider, url, gather_s=0.2))
        ids = insert(database, *[batch_job(f"{n}") for n in range(lines)])
        await station.give(ids)
        with nursery.worker(database_url, fleet):
            await until(lambda: seen(there, database), f"the worker is at: {step}")
        there.options = there.options.changed({"batch_faults": []})
        with nursery.worker(database_url, fleet):
            await until(
                lambda: batch_rows(database)[0]["state"] == "ended", "somebody else ends it"
            )
        await station.aclose()

    assert (there.stats.batches, there.stats.batch_lines) == (1, lines)
    assert calls_of(there) == [1] * lines
    for job in ids:
        (result,) = result_rows(database, job)
        assert (result["state"], result["calls"], result["unknown_calls"]) == ("succeeded", 1, 0)
        assert len(ledger_rows(database, job)) == 1
    assert line_count(database) == 0


async def test_many_workers_share_the_batches_and_none_is_sent_twice(
    database_url: str, database: sa.Engine
) -> None:
    async with simulated() as (there, url):
        fleet = fleet_of("openai", url, max_lines=5)
        stations = [Station(database_url, fleet) for _ in range(3)]
        ids = insert(database, *[batch_job(f"{n}") for n in range(60)])
        await asyncio.gather(*[s.give(ids[n::3]) for n, s in enumerate(stations)])
        for _ in range(30):
            with database.begin() as connection:  # as time goes by: held ones stay held
                connection.execute(
                    sa.text(
                        "UPDATE provider_batches SET lease_until = clock_timestamp()"
                        " WHERE lease_owner IS NULL"
                    )
                )
            await asyncio.gather(*[station.look() for station in stations])
            if all(row["state"] == "ended" for row in batch_rows(database)):
                break
        for station in stations:
            await station.aclose()

    assert there.stats.batch_lines == 60
    assert calls_of(there) == [1] * 60
    assert all(result_rows(database, job)[0]["state"] == "succeeded" for job in ids)
    assert max(row["lines"] for row in batch_rows(database)) <= 5


class TestLeases:
    """What a worker that was taken for lost may still do: nothing."""

    async def held(self, station: Station, database: sa.Engine) -> store.Held:
        (job,) = insert(database, batch_job("a"))
        await station.give([job])
        due_now(database)
        with database.begin() as connection:
            (held,) = store.claim_due(connection, ["d"], owner="late", lease_s=30, limit=1)
        return held

    async def test_it_moves_nothing_on(self, database_url: str, database: sa.Engine) -> None:
        async with simulated() as (_, url):
            station = Station(database_url, fleet_of("openai", url))
            late = await self.held(station, database)
            due_now(database)
            with database.begin() as connection:
                (now,) = store.claim_due(connection, ["d"], owner="now", lease_s=30, limit=1)
                assert store.mark_lines(connection, late, after=store.NO_ROW, limit=9) is None
                assert not store.note_file(connection, late, "file", sent=1)
                assert not store.begin_submitting(connection, late, sent=1)
                assert not store.hold(connection, late)
                store.end(connection, late)
                store.pause(connection, late, 1000.0)
                assert store.hold(connection, now)
            await station.aclose()

        (row,) = batch_rows(database)
        assert (row["state"], row["lease_owner"]) == ("preparing", "now")
        assert line_count(database) == 1

    async def test_a_second_name_for_a_batch_is_refused(
        self, database_url: str, database: sa.Engine
    ) -> None:
        async with simulated() as (_, url):
            station = Station(database_url, fleet_of("openai", url))
            held = await self.held(station, database)
            with database.begin() as connection:
                assert store.begin_submitting(connection, held, sent=1)
                assert store.note_submitted(connection, held, "one", pause_s=1)
                assert store.note_submitted(connection, held, "one", pause_s=1)
                assert not store.note_submitted(connection, held, "two", pause_s=1)
            await station.aclose()

        assert batch_rows(database)[0]["provider_id"] == "one"

    async def test_a_fenced_job_is_not_given_away(
        self, database_url: str, database: sa.Engine
    ) -> None:
        async with simulated() as (_, url):
            station = Station(database_url, fleet_of("openai", url))
            (job,) = insert(database, batch_job("a"))
            destination = store.Destination(
                tenant="default", deployment="d", kind=JobKind.CHAT, model="m"
            )
            room = store.Room(max_lines=9, max_bytes=999, gather_s=1, spill_before_s=1)
            line = store.NewLine(job_id=job, fence=7, bytes=1)
            with database.begin() as connection:
                given = store.attach(
                    connection, destination, [line], new_id=uuid.uuid4(), room=room
                )
            await station.aclose()

        assert given == set()
        assert job_row(database, job)["state"] == "queued"
        assert line_count(database) == 0
