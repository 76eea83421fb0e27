"""The job table against a model, through random histories and at boundaries of time.

One connection runs the store's own statements one after the other, under a clock that the test
turns; tests/integration/test_races.py has them run at once. PROMPTFLEET_TEST_EXAMPLES=5000 runs
that many histories.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)
from tests.faults.batch_bench import ROOM, BatchBench, return_of
from tests.faults.batch_rules import ANSWERS, LEASE_S, LOST_AFTER, BatchRules, BatchWorker
from tests.faults.job_bench import (
    LEASES_S,
    Move,
    documented_moves,
    outcome_of,
    release_of,
)
from tests.faults.job_model import MAX_CRASHES, Claim
from tests.faults.job_table import JobTable

from promptfleet_shared.jobs import FINAL_STATES, JobState, OnUnknown

EXAMPLES = int(os.environ.get("PROMPTFLEET_TEST_EXAMPLES") or 40)
STEPS = 40
TENANTS = ("a", "b")
TIERS = ("basic", "advanced")
WORKERS = ("w1", "w2", "w3")
LAPSED_S = max(LEASES_S) + 1
LONG_S = 10_000.0


class JobTableMachine(BatchRules):
    """Random histories of jobs, workers that die or dawdle, batches, sweepers and cancellers."""

    table: ClassVar[JobTable]
    documented: ClassVar[set[Move]]

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @initialize()
    def start(self) -> None:
        self.table.open()
        self.bench = BatchBench(self.table)
        self.worker = BatchWorker(self.bench)

    @rule(
        target=jobs,
        fields=st.lists(
            st.fixed_dictionaries(
                {
                    "tenant": st.sampled_from(TENANTS),
                    "tier": st.sampled_from(TIERS),
                    "text": st.sampled_from(["x", "y"]),
                    "deadline_s": st.sampled_from([5.0, 45.0, 120.0, 1000.0, 5000.0]),
                    "priority": st.integers(0, 9),
                    "idempotency_key": st.sampled_from([None, None, "k", "l"]),
                    "on_unknown": st.sampled_from(OnUnknown),
                    "callback_url": st.sampled_from([None, "https://h/?q"]),
                }
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def enqueue(self, fields: list[dict[str, Any]]) -> Any:
        return multiple(*self.bench.insert(*(self.table.spec(**each) for each in fields)))

    @rule(ids=st.lists(jobs, min_size=1, max_size=3))
    def enqueue_again(self, ids: list[uuid.UUID]) -> None:
        """As a producer does whose connection broke before the reply to its commit."""
        known = self.bench.model.jobs
        self.bench.insert(*(known[job].spec for job in ids if job in known))

    @rule(
        target=claims,
        ids=st.lists(jobs, min_size=1, max_size=4),
        worker=st.sampled_from(WORKERS),
        lease_s=st.sampled_from(LEASES_S),
    )
    def claim(self, ids: list[uuid.UUID], worker: str, lease_s: float) -> Any:
        return multiple(*self.bench.claim(ids, worker=worker, lease_s=lease_s))

    @rule(held=st.lists(claims, min_size=1, max_size=4), lease_s=st.sampled_from(LEASES_S))
    def heartbeat(self, held: list[Claim], lease_s: float) -> None:
        self.bench.heartbeat(held, lease_s)

    @rule(held=st.lists(claims, min_size=1, max_size=3), calls=st.integers(1, 4))
    def begin_calls(self, held: list[Claim], calls: int) -> None:
        self.bench.begin_calls(held, calls)

    @rule(
        held=st.lists(claims, min_size=1, max_size=3, unique=True),
        state=st.sampled_from(sorted(FINAL_STATES)),
        calls=st.integers(0, 3),
        unknown_calls=st.integers(0, 3),
    )
    def finish(self, held: list[Claim], state: JobState, calls: int, unknown_calls: int) -> None:
        """By whoever thinks that it holds the jobs, under fences old and new."""
        self.bench.finish([outcome_of(claim, state, calls, unknown_calls) for claim in held])

    @rule(
        held=st.lists(claims, min_size=1, max_size=3, unique=True),
        delay_s=st.sampled_from([0.0, 5.0, 60.0, 2000.0]),
        calls=st.integers(0, 3),
        counts=st.booleans(),
    )
    def release(self, held: list[Claim], delay_s: float, calls: int, counts: bool) -> None:
        self.bench.release([release_of(claim, delay_s, calls, counts=counts) for claim in held])

    @rule(claim=claims, calls=st.integers(0, 3))
    def zombie(self, claim: Claim, calls: int) -> None:
        """Whatever somebody does under an old fence, not a single column changes."""
        job = self.bench.model.jobs.get(claim[0])
        if job is not None and job.takes(claim[1]):
            return
        before = self.table.snapshot()
        assert self.bench.finish([outcome_of(claim, JobState.SUCCEEDED, calls, calls)]) == set()
        assert self.bench.release([release_of(claim, 0.0, calls, counts=True)]) == set()
        self.bench.heartbeat([claim])
        self.bench.begin_calls([claim], calls + 1)
        assert self.table.snapshot() == before

    @rule(limit=st.sampled_from([1, 2, 500, 500]))
    def sweep(self, limit: int) -> None:
        self.bench.sweep(limit)

    @rule(parked=st.lists(jobs, min_size=1, max_size=3))
    def sweep_while_doorbells_wait(self, parked: list[uuid.UUID]) -> None:
        """What is parked is not rung for, and ends like any other."""
        verdicts = self.bench.sweep(parked=parked)
        assert not {job for job, told in verdicts.items() if told == "ring"} & set(parked)

    @rule(tier=st.sampled_from(TIERS))
    def ring_silent(self, tier: str) -> None:
        self.bench.ring_silent(tier)

    @rule(ids=st.lists(jobs, min_size=1, max_size=2), tenant=st.sampled_from(TENANTS))
    def cancel(self, ids: list[uuid.UUID], tenant: str) -> None:
        self.bench.cancel(ids, tenant)

    @rule(age_s=st.sampled_from([0.0, 60.0, 3000.0]))
    def prune(self, age_s: float) -> None:
        self.bench.prune(age_s)

    @rule(seconds=st.sampled_from(["to the next timer", "past it", 4.0, 31.0, 46.0, 300.0]))
    def time_passes(self, seconds: float | str) -> None:
        """Often to the very instant of a lease's end, a deadline or a retry, or just past it."""
        if isinstance(seconds, float):
            self.table.turn_to(self.table.now + seconds)
        elif timers := self._timers():
            self.table.turn_to(min(timers) + (seconds == "past it"))

    def _timers(self) -> list[float]:
        return [
            instant
            for job in self.bench.model.jobs.values()
            if job.finished_at is None
            for instant in (job.lease_until, job.deadline, job.run_at, job.sweep_at)
            if instant is not None and instant > self.table.now
        ]

    @rule(
        target=claims,
        job=jobs,
        state=st.sampled_from([None, *sorted(FINAL_STATES)]),
        cancelled=st.booleans(),
        late_s=st.sampled_from([0.0, 1.0, 31.0]),
        calls=st.integers(0, 3),
    )
    def a_worker_works(
        self, job: uuid.UUID, state: JobState | None, cancelled: bool, late_s: float, calls: int
    ) -> Any:
        """From a claim to an end or (None) a release, perhaps too late."""
        held = self.bench.claim([job], lease_s=LEASES_S[0])
        if cancelled:
            self.bench.cancel([job], TENANTS[0])
        self.table.turn_to(self.table.now + late_s)
        self.bench.sweep()
        if state is None:
            self.bench.release([release_of(claim, late_s, calls, counts=True) for claim in held])
        else:
            self.bench.finish([outcome_of(claim, state, calls, 1) for claim in held])
        return multiple(*held)

    @rule(target=claims, job=jobs, times=st.integers(1, MAX_CRASHES))
    def its_workers_die(self, job: uuid.UUID, times: int) -> Any:
        """A job that may be the cause; its dead workers' claims are a zombie's from then on."""
        held = []
        for _ in range(times):
            held += self.bench.claim([job], lease_s=LEASES_S[0])
            self.table.turn_to(self.table.now + LEASES_S[0] + 1)
            self.bench.sweep()
        return multiple(*held)

    def teardown(self) -> None:
        self.worker.check()
        assert self.bench.moves - self.documented == set()


@pytest.fixture
def table(database: sa.Engine) -> Iterator[JobTable]:
    JobTable.prepare(database)
    table = JobTable(database)
    yield table
    table.close()


def test_the_table_does_what_the_model_says(table: JobTable) -> None:
    members = {"table": table, "documented": documented_moves()}
    run_state_machine_as_test(
        type("Machine", (JobTableMachine,), members),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            phases=set(Phase) - {Phase.explain},  # it takes minutes, and the steps say enough
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


class Script:
    """A history that leads jobs through moves of one's choice."""

    def __init__(self, table: JobTable) -> None:
        table.open()
        self.table = table
        self.bench = BatchBench(table)

    def queued(self, **fields: Any) -> uuid.UUID:
        (job,) = self.bench.insert(self.table.spec(**fields))
        return job

    def running(self, **fields: Any) -> Claim:
        return self.claimed(self.queued(**fields))

    def given(self, **fields: Any) -> Claim:
        """Claimed, and a line of its provider's next batch."""
        claim = self.running(**fields)
        assert self.bench.attach([claim]) == {claim[0]}
        return claim

    def claimed(self, job: uuid.UUID) -> Claim:
        (claim,) = self.bench.claim([job])
        return claim

    def state(self, job: uuid.UUID) -> JobState:
        return self.bench.model.jobs[job].state

    def sweep_after(self, seconds: float) -> None:
        self.table.turn_to(self.table.now + seconds)
        self.bench.sweep()


@pytest.fixture
def script(table: JobTable) -> Script:
    return Script(table)


def test_every_documented_move_can_be_made(script: Script) -> None:
    bench = script.bench
    for state in sorted(FINAL_STATES):
        bench.finish([outcome_of(script.running(deadline_s=LONG_S), state, 1, 0)])
    bench.release([release_of(script.running(deadline_s=LONG_S), 0.0, 1, counts=True)])
    bench.cancel([script.queued(tenant="a", deadline_s=LONG_S)], "a")
    given_back = script.running(tenant="a", deadline_s=LONG_S)
    bench.cancel([given_back[0]], "a")
    bench.release([release_of(given_back, 60.0, 0, counts=False)])
    bench.sweep()
    killer = script.queued(deadline_s=LONG_S)
    for _ in range(MAX_CRASHES):
        script.claimed(killer)
        script.sweep_after(LAPSED_S)
    cancelled = script.running(tenant="a", deadline_s=LONG_S)
    bench.cancel([cancelled[0]], "a")
    _go_through_batches(script)
    script.running(deadline_s=40.0)
    script.queued(deadline_s=40.0)
    script.sweep_after(LAPSED_S)
    script.sweep_after(LONG_S)
    bench.prune(0.0)

    script.sweep_after(1.0)
    bench.prune(0.0)

    assert bench.model.jobs == {}
    assert bench.moves == documented_moves()  # the other test has seen no other


def _go_through_batches(script: Script) -> None:
    bench = script.bench
    for state in sorted(FINAL_STATES):
        bench.finish([outcome_of(script.given(deadline_s=LONG_S), state, 1, 0)])
    bench.release([release_of(script.given(deadline_s=LONG_S), 0.0, 1, counts=True)])
    unsent = script.given(tenant="a", deadline_s=LONG_S)
    bench.cancel([unsent[0]], "a")
    script.given(tenant="b", deadline_s=LONG_S)
    script.table.turn_to(script.table.now + ROOM.gather_s)
    for held in bench.claim_due("w1", LAPSED_S):
        if bench.mark(held):
            bench.return_lines(held, [return_of(key) for key in bench.left(held)])
        bench.end(held)
    spilt = script.given(tenant="a", deadline_s=ROOM.spill_before_s + 1)
    sent = [script.given(tenant="a", deadline_s=seconds) for seconds in (LONG_S, 3 * LAPSED_S)]
    script.sweep_after(1.0)
    assert script.state(spilt[0]) is JobState.QUEUED
    script.table.turn_to(script.table.now + ROOM.gather_s)
    (held,) = bench.claim_due("w1", 10 * LAPSED_S)
    assert bench.mark(held) == 2
    bench.cancel([sent[0][0]], "a")
    script.sweep_after(0.0)
    assert script.state(sent[0][0]) is JobState.CANCELLED
    script.sweep_after(3 * LAPSED_S)  # too late to be taken back
    bench.end(held)


def test_the_third_lost_lease_is_poison_and_attempts_are_not_burnt(script: Script) -> None:
    job = script.queued(deadline_s=LONG_S)
    for crashes in (1, 2, 3):
        script.claimed(job)
        script.sweep_after(LAPSED_S)
        row = script.table.snapshot().jobs[job]
        assert (row["crashes"], row["attempt"], row["unknown_calls"]) == (crashes, 0, crashes)
        assert row["state"] == ("failed" if crashes == MAX_CRASHES else "queued")
    (result,) = script.table.snapshot().results[job]
    assert result["error"]["code"] == "poison"


@pytest.mark.parametrize(
    ("calls", "state"), [(0, JobState.QUEUED), (1, JobState.FAILED), (2, JobState.FAILED)]
)
def test_a_lost_job_that_must_not_be_called_twice(
    script: Script, calls: int, state: JobState
) -> None:
    claim = script.running(deadline_s=LONG_S, on_unknown=OnUnknown.FAIL)
    if calls:
        script.bench.begin_calls([claim], calls)

    script.sweep_after(LAPSED_S)

    snapshot = script.table.snapshot()
    row = snapshot.jobs[claim[0]]
    assert (row["state"], row["calls"], row["unknown_calls"]) == (state, calls, calls)
    codes = [result["error"]["code"] for result in snapshot.results.get(claim[0], [])]
    assert codes == ["unknown_outcome"] * bool(calls)


def test_a_lease_can_not_outlive_the_deadline_by_much(script: Script) -> None:
    """A worker that hangs and yet beats does not keep the job from its end."""
    claim = script.running(deadline_s=100.0)
    for _ in range(50):
        script.table.turn_to(script.table.now + 10)
        script.bench.heartbeat([claim])
    script.bench.sweep()
    assert script.state(claim[0]) is JobState.EXPIRED


def test_time_stands_still_at_the_boundaries(script: Script) -> None:
    """At the very instant a lease still holds, a deadline has passed and a retry is due."""
    held = script.running(deadline_s=LONG_S)
    overdue = script.queued(deadline_s=45.0)
    later = script.running(deadline_s=LONG_S)
    script.bench.release([release_of(later, 45.0, 0, counts=False)])
    script.table.turn_to(script.table.now + 45)

    assert script.bench.claim([held[0], overdue]) == []
    verdicts = script.bench.sweep()

    assert verdicts == {held[0]: "alive", overdue: "expired", later[0]: "ring"}
    assert script.bench.claim([held[0], overdue, later[0]]) == [(later[0], 2)]


@pytest.mark.parametrize("lost_after", LOST_AFTER)
@pytest.mark.parametrize(
    ("cancelled", "late_s"), [("gathering", 0.0), ("submitted", 0.0), (None, 0.0), (None, 500.0)]
)
def test_a_worker_lost_at_any_step_gives_no_line_away_twice(
    script: Script, lost_after: str, cancelled: str | None, late_s: float
) -> None:
    """With a cancellation before or after it may be paid for, or with no time left."""
    held = [
        script.running(deadline_s=deadline_s, on_unknown=on_unknown, tenant=tenant)
        for on_unknown in OnUnknown
        for tenant, deadline_s in (("a", 600.0), ("b", 400.0))
        for _ in range(2)
    ]
    worker = BatchWorker(script.bench)

    worker.see_through(held, lost_after, cancelled=cancelled, late_s=late_s, answers=ANSWERS)

    worker.check()
    left = [job.state for job in script.bench.model.jobs.values() if job.finished_at is None]
    assert JobState.RUNNING not in left
    sent = {line for _, lines in worker.provider.made.values() for line in lines}
    rows = script.table.snapshot().jobs
    charged = [rows[job]["calls"] + rows[job]["claim_calls"] for job, _ in sent]
    refused = sum(job.service == "standard" for job in script.bench.model.jobs.values())
    assert charged.count(0) <= refused  # those that the provider said it has not done


@pytest.mark.parametrize("late_s", [0.0, LEASE_S, 2 * LEASE_S - 1])
def test_a_worker_that_stands_still_is_told_the_same_name(script: Script, late_s: float) -> None:
    held = [script.given(deadline_s=LONG_S) for _ in range(3)]
    script.bench.pass_time(ROOM.gather_s)
    worker = BatchWorker(script.bench)
    worker.stand_still(late_s)
    script.bench.pass_time(LEASE_S + 1)
    worker.move_all_on("told", is_made=True, answers=["succeeded"])
    worker.check()
    assert {script.state(job) for job, _ in held} == {JobState.SUCCEEDED}


def test_what_was_cancelled_while_it_was_handed_over_is_not_sent(script: Script) -> None:
    claim, other = script.running(tenant="a", deadline_s=LONG_S), script.running(tenant="a")
    script.bench.cancel([claim[0]], "a")
    script.bench.attach([claim, other])
    script.bench.pass_time(ROOM.gather_s)
    (held,) = script.bench.claim_due("w1", LEASE_S)
    assert script.bench.mark(held) == 1
    assert script.bench.sent_lines(held) == [other]
    script.bench.sweep()
    row = script.table.snapshot().jobs[claim[0]]
    assert (row["state"], row["calls"]) == ("cancelled", 0)


def test_a_batch_has_one_name(script: Script) -> None:
    script.given(deadline_s=LONG_S)
    script.bench.pass_time(ROOM.gather_s)
    (held,) = script.bench.claim_due("w1", LEASE_S)
    script.bench.begin_submitting(held, 1)
    assert script.bench.note_submitted(held, "one", 0.0)
    assert not script.bench.note_submitted(held, "two", 0.0)
    (held,) = script.bench.claim_due("w1", LEASE_S)
    assert held.provider_id == "one"
    assert not script.bench.begin_submitting(held, 1)


@pytest.mark.parametrize("on_unknown", OnUnknown)
@pytest.mark.parametrize("is_sent", [False, True])
def test_a_line_near_its_deadline_is_taken_back_and_its_call_counted(
    script: Script, on_unknown: OnUnknown, is_sent: bool
) -> None:
    claim = script.given(deadline_s=500.0, on_unknown=on_unknown)
    script.table.turn_to(script.table.now + ROOM.gather_s)
    (held,) = script.bench.claim_due("w1", 1000.0)
    if is_sent:
        script.bench.mark(held)

    script.sweep_after(500.0 - ROOM.spill_before_s - ROOM.gather_s)

    row = script.table.snapshot().jobs[claim[0]]
    waits_on = is_sent and on_unknown is OnUnknown.FAIL
    assert row["state"] == ("submitted" if waits_on else "queued")
    assert (row["attempt"], row["unknown_calls"]) == (int(waits_on), int(is_sent and not waits_on))
    late = script.bench.finish([outcome_of(claim, JobState.SUCCEEDED, 1, 0)])
    assert late == ({claim[0]} if waits_on else set())


def test_who_waits_for_its_turn_is_not_rung_for_but_ends_in_time(script: Script) -> None:
    job = script.queued(deadline_s=1000.0)
    script.table.turn_to(script.table.now + 31)
    assert script.bench.sweep(parked=[job]) == {job: "parked"}
    script.table.turn_to(script.table.now + 299)
    assert script.bench.sweep(parked=[job]) == {}
    script.table.turn_to(script.table.now + 1)
    assert script.bench.sweep() == {job: "ring"}
    script.table.turn_to(script.table.now + 1000)
    assert script.bench.sweep(parked=[job]) == {job: "expired"}
