"""Claimers, sweepers, heartbeats and cancellers at each other's throats, with crashes and zombies.

Whatever the order of their statements: a job ends once, and only its rightful owner ends it.
"""

from __future__ import annotations

import collections
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from tests.rows import insert, outcome, spec

from promptfleet_shared.jobs import ClaimedJob, JobState, Release
from promptfleet_shared.store import sweeping
from promptfleet_shared.store.claims import claim, heartbeat, release
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.results import request_cancel

JOBS = 600
CLAIMERS = 8
SWEEPERS = 2
LEASE_S = 0.1
DEADLINE_S = 60.0
SWEEPS_IN_THE_MIDDLE = 60


Turn = Callable[[sa.Connection, random.Random], None]


class Arena:
    """What all threads share, and what they saw."""

    def __init__(self, url: str, ids: list[uuid.UUID], seed: int) -> None:
        self.url = url
        self.ids = ids
        self.seed = seed
        self.over = threading.Event()
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()
        self.claims: collections.Counter[uuid.UUID] = collections.Counter()
        self.fences: dict[uuid.UUID, list[int]] = collections.defaultdict(list)
        self.landed: dict[uuid.UUID, list[int]] = collections.defaultdict(list)
        self.refused = 0
        self.swept: collections.Counter[str] = collections.Counter()

    def run(self, name: str, turn: Turn) -> None:
        """A thread's life: turn after turn on a connection of its own."""
        draw = random.Random(f"{self.seed} {name}")
        engine = make_engine(self.url, application_name=name, pool_size=1)
        try:
            with engine.connect() as connection:
                while not self.over.is_set():
                    with connection.begin():
                        turn(connection, draw)
        except Exception as error:  # noqa: BLE001 - a thread's failure is the test's
            self.errors.append(error)
            self.over.set()
        finally:
            engine.dispose()


class Claimer:
    """A worker that may crash, dawdle beyond its lease, give back or finish."""

    def __init__(self, arena: Arena, number: int) -> None:
        self.arena = arena
        self.name = f"claimer-{number}"
        self.held: list[ClaimedJob] = []
        self.zombies: list[ClaimedJob] = []

    def turn(self, connection: sa.Connection, draw: random.Random) -> None:
        move = draw.random()
        if move < 0.45:
            self._claim(connection, draw)
        elif move < 0.55:
            heartbeat(connection, {job.id: job.fence for job in self.held}, lease_s=LEASE_S)
        elif move < 0.85:
            self._end(connection, self._some(self.held, draw), draw)
        else:
            self._end(connection, self._some(self.zombies, draw), draw)

    def _claim(self, connection: sa.Connection, draw: random.Random) -> None:
        wanted = draw.sample(self.arena.ids, 12)
        claimed = claim(connection, wanted, worker=self.name, lease_s=LEASE_S)
        with self.arena.lock:
            for job in claimed:
                self.arena.claims[job.id] += 1
                self.arena.fences[job.id].append(job.fence)
        for job in claimed:
            fate = draw.random()
            if fate < 0.55:
                self.held.append(job)
            elif fate < 0.80:
                self.zombies.append(job)  # believes that it still has the job, much later
            # else: crashed, nobody will ever know

    def _some(self, jobs: list[ClaimedJob], draw: random.Random) -> list[ClaimedJob]:
        draw.shuffle(jobs)
        count = draw.randint(0, len(jobs))
        some = jobs[:count]
        del jobs[:count]
        return some

    def _end(self, connection: sa.Connection, jobs: list[ClaimedJob], draw: random.Random) -> None:
        back = [job for job in jobs if draw.random() < 0.3]
        ended = [job for job in jobs if job not in back]
        if back:
            items = [
                Release(job_id=job.id, fence=job.fence, counts=draw.random() < 0.5, calls=1)
                for job in back
            ]
            self._was_rightful(back, {bell.job_id for bell in release(connection, items)})
        if not ended:
            return
        states = [JobState.SUCCEEDED, JobState.FAILED]
        written = finish(
            connection,
            [outcome(j, text=f"{self.name}/{j.fence}", state=draw.choice(states)) for j in ended],
        )
        self._was_rightful(ended, written)
        with self.arena.lock:
            for job in _newest_of_each(ended):
                if job.id in written:
                    self.arena.landed[job.id].append(job.fence)
                else:
                    self.arena.refused += 1

    def _was_rightful(self, jobs: list[ClaimedJob], written: set[uuid.UUID]) -> None:
        """While our row lock holds, nobody can have claimed the job after us."""
        with self.arena.lock:
            for job in _newest_of_each(jobs):
                if job.id in written:
                    newest = max(self.arena.fences[job.id])
                    assert job.fence == newest, f"{job.fence} wrote over {newest}"


def _newest_of_each(jobs: list[ClaimedJob]) -> list[ClaimedJob]:
    """Who claimed a job twice may end both claims in one call; only the newer one can count."""
    return list({job.id: job for job in sorted(jobs, key=lambda job: job.fence)}.values())


def sweeper(arena: Arena) -> Turn:
    def turn(connection: sa.Connection, draw: random.Random) -> None:
        found = sweeping.sweep(connection, limit=draw.choice([5, 50, 500]))
        with arena.lock:
            arena.swept.update(found.verdicts)

    return turn


def canceller(arena: Arena) -> Turn:
    def turn(connection: sa.Connection, draw: random.Random) -> None:
        if draw.random() < 0.01:
            request_cancel(connection, draw.sample(arena.ids, 2), tenant="default")

    return turn


@pytest.fixture
def seed() -> int:
    """Set PROMPTFLEET_TEST_SEED to repeat a run's draws."""
    return int(os.environ.get("PROMPTFLEET_TEST_SEED") or random.SystemRandom().randrange(10**6))


def test_every_job_ends_once_and_by_its_rightful_owner(
    database_url: str, database: sa.Engine, seed: int
) -> None:
    print(f"seed {seed}")
    specs = [spec(f"{n}", deadline_s=600.0, callback_url="https://h") for n in range(JOBS)]
    ids = insert(database, *specs)
    arena = Arena(database_url, ids, seed)
    turns: dict[str, Turn] = {f"claimer-{n}": Claimer(arena, n).turn for n in range(CLAIMERS)}
    turns |= {f"sweeper-{n}": sweeper(arena) for n in range(SWEEPERS)}
    turns |= {"canceller": canceller(arena)}
    threads = [
        threading.Thread(target=arena.run, args=item, name=item[0]) for item in turns.items()
    ]
    for thread in threads:
        thread.start()
    try:
        _wait_until_all_are_final(arena, database)
    finally:
        arena.over.set()
        for thread in threads:
            thread.join(DEADLINE_S)

    assert arena.errors == []  # no deadlock, no violated constraint
    _check(arena, _read(database))
    assert arena.refused > 0, "no zombie ever tried: the test has lost its teeth"
    assert arena.swept["lost"] > 0


def test_a_lease_that_ends_in_the_middle_of_a_sweep_is_judged_once(database: sa.Engine) -> None:
    """It must not be over for one column of its row and go on for the next."""
    ids = insert(database, *[spec(f"{n}", deadline_s=600.0) for n in range(1000)])
    with database.begin() as connection:
        for job in claim(connection, ids, worker="gone", lease_s=LEASE_S):
            assert job.fence == 1
    lease = sa.text(
        "UPDATE jobs SET state = 'running', fence = 1, crashes = 0, unknown_calls = 0,"
        " claim_calls = 1, attempt = 1, sweep_at = clock_timestamp(),"
        " lease_until = clock_timestamp() + random() * interval '20 ms'"
    )
    torn = sa.text(
        "SELECT count(*) FROM jobs WHERE unknown_calls <> crashes OR fence <> 1 + crashes"
        " OR (state = 'queued') <> (crashes = 1) OR attempt <> 1 - crashes"
    )
    judged: collections.Counter[str] = collections.Counter()
    for _ in range(SWEEPS_IN_THE_MIDDLE):
        with database.begin() as connection:
            connection.execute(lease)
        with database.begin() as connection:
            judged.update(sweeping.sweep(connection, limit=1000).verdicts)
        with database.begin() as connection:
            assert connection.execute(torn).scalar_one() == 0
    assert judged["alive"] > 100
    assert judged["lost"] > 100


def _wait_until_all_are_final(arena: Arena, database: sa.Engine) -> None:
    deadline = time.monotonic() + DEADLINE_S
    query = sa.text("SELECT count(*) FROM jobs WHERE finished_at IS NULL")
    open_jobs = -1
    while open_jobs and not arena.over.wait(0.05):
        with database.connect() as connection:
            open_jobs = connection.execute(query).scalar_one()
        assert time.monotonic() < deadline, f"{open_jobs} jobs never ended, seed {arena.seed}"


def _read(database: sa.Engine) -> list[Any]:
    query = sa.text(
        "SELECT j.*, r.state AS result_state, r.text AS result_text, r.attempts AS result_attempts,"
        " r.calls AS result_calls,"
        " (SELECT count(*) FROM results WHERE job_id = j.id) AS result_rows,"
        " (SELECT count(*) FROM callbacks WHERE job_id = j.id) AS callback_rows,"
        " (SELECT coalesce(sum(calls), 0) FROM ledger WHERE job_id = j.id) AS paid"
        " FROM jobs j LEFT JOIN results r ON r.job_id = j.id"
    )
    with database.connect() as connection:
        return list(connection.execute(query))


def _check(arena: Arena, rows: list[Any]) -> None:
    assert len(rows) == JOBS
    for row in rows:
        about = f"seed {arena.seed}, job {row.id}"
        assert (row.result_rows, row.callback_rows) == (1, 1), about
        assert (row.result_state, row.result_attempts, row.result_calls) == (
            row.state,
            row.attempt,
            row.calls,
        ), about
        assert row.lease_owner is None, about
        # A write landed at most once, and then under the fence that is still on the row.
        landed = arena.landed[row.id]
        if row.result_text is None:
            assert landed == [], about
            assert row.state in {"cancelled", "failed"}, about
        else:
            assert landed == [row.fence], about
            assert row.result_text.endswith(f"/{row.fence}"), about
        # Each claim had a fence of its own, and every counter adds up.
        fences = arena.fences[row.id]
        assert len(set(fences)) == len(fences) == arena.claims[row.id], about
        assert all(fence <= row.fence for fence in fences), about
        assert row.attempt + row.deferrals + row.crashes == arena.claims[row.id], about
        swept = row.fence - arena.claims[row.id]  # the sweeper fences off what it takes away
        assert swept == row.crashes <= sweeping.MAX_CRASHES, about
        assert row.unknown_calls == row.crashes, about
        assert row.paid == row.calls, about
        if row.crashes == sweeping.MAX_CRASHES and row.state == "failed":
            assert row.result_text is None, about
