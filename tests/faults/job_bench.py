"""The job table and its model side by side: run each statement on both, compare everything."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.faults.job_model import MAX_CRASHES, RINGING, Claim, Model, ModelJob
from tests.faults.job_table import JobTable, Row, Snapshot

from promptfleet_shared.errors import IdempotencyConflictError
from promptfleet_shared.jobs import (
    FINAL_STATES,
    JobError,
    JobSpec,
    JobState,
    OnUnknown,
    Outcome,
    Release,
)
from promptfleet_shared.store import claims as claims_store
from promptfleet_shared.store import finishing, results, submissions, sweeping
from promptfleet_workers.sweeper import oldest_id

LEASES_S = (30.0, 45.0)
STATES_PAGE = Path(__file__).parents[2] / "docs/reference/states.md"
COUNTERS = ("attempt", "crashes", "deferrals", "calls", "unknown_calls", "claim_calls")
FACTS = ("state", "fence", *COUNTERS, "rings", "lease_owner", "cancel_requested")
INSTANTS = ("created_at", "run_at", "rung_at", "sweep_at", "deadline", "lease_until", "finished_at")

Move = tuple[str, str, str]
"""A state, the next one, and the statement that led there; `[*]` is nowhere."""


def documented_moves() -> set[Move]:
    """The arrows of the diagrams in docs/reference/states.md, one for each statement."""
    diagrams = re.findall(
        r"```mermaid\nstateDiagram-v2\n(.*?)```", STATES_PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(diagrams) == 2
    diagram = "".join(diagrams)
    arrows = re.findall(r"^ +(\S+) --> (\S+?): (.+)$", diagram, re.MULTILINE)
    assert len(arrows) == diagram.count("-->"), "an arrow says not which statement makes it"
    return {(a, b, name) for a, b, label in arrows for name in label.split(", ")}


class Bench:
    """The table and its model side by side: each statement is run on both and compared."""

    def __init__(self, table: JobTable) -> None:
        self.table = table
        self.model = Model()
        self.moves: set[Move] = set()
        self.last = table.snapshot()

    @property
    def now(self) -> float:
        return self.table.now

    def pass_time(self, seconds: float) -> None:
        self.table.turn_to(self.now + seconds)

    # -- the statements ----------------------------------------------------------------------

    def insert(self, *specs: JobSpec) -> list[uuid.UUID]:
        """Both accept, or both refuse, and then nothing is there."""
        before = set(self.model.jobs)
        try:
            expected = self.model.insert(specs, self.now)
        except IdempotencyConflictError:
            with pytest.raises(IdempotencyConflictError):
                self.table.run(lambda c: submissions.insert_jobs(c, specs))
            self.check("enqueue")
            return []
        told = self.table.run(lambda c: submissions.insert_jobs(c, specs))
        assert told == expected
        self.check("enqueue")
        return sorted(set(self.model.jobs) - before)

    def claim(
        self, ids: Sequence[uuid.UUID], *, worker: str = "w1", lease_s: float = 45.0
    ) -> list[Claim]:
        expected = self.model.claim(ids, worker, lease_s, self.now)
        claimed = self.table.run(
            lambda c: claims_store.claim(c, ids, worker=worker, lease_s=lease_s)
        )
        assert {job.id: job.fence for job in claimed} == expected
        for job in claimed:
            known = self.model.jobs[job.id]
            assert (job.attempt, job.deferrals, job.calls, job.on_unknown) == (
                known.attempt,
                known.deferrals,
                known.calls,
                known.spec.on_unknown,
            )
            assert job.remaining_s == known.deadline - self.now
            assert job.queued_ms == (self.now - known.run_at) * 1000
        self.check("claim")
        return list(expected.items())

    def heartbeat(self, held: Sequence[Claim], lease_s: float = 45.0) -> None:
        expected = self.model.heartbeat(dict(held), lease_s, self.now)
        alive = self.table.run(lambda c: claims_store.heartbeat(c, dict(held), lease_s=lease_s))
        assert alive == expected
        self.check("heartbeat")

    def begin_calls(self, held: Sequence[Claim], calls: int) -> None:
        begun = {job_id: (fence, calls) for job_id, fence in held}
        expected = self.model.begin_calls(begun, self.now)
        assert self.table.run(lambda c: claims_store.begin_calls(c, begun)) == expected
        self.check("begin_calls")

    def finish(self, outcomes: Sequence[Outcome]) -> set[uuid.UUID]:
        expected = self.model.finish(outcomes, self.now)
        assert self.table.run(lambda c: finishing.finish(c, outcomes)) == expected
        self.check("finish")
        return expected

    def release(self, releases: Sequence[Release]) -> set[uuid.UUID]:
        expected = self.model.release(releases, self.now)
        bells = self.table.run(lambda c: claims_store.release(c, releases))
        assert {bell.job_id for bell in bells} == expected
        self.check("release")
        return expected

    def cancel(self, ids: Sequence[uuid.UUID], tenant: str) -> None:
        expected = self.model.cancel(ids, tenant, self.now)
        asked = self.table.run(lambda c: results.request_cancel(c, ids, tenant=tenant))
        assert asked == expected
        self.check("cancel")

    def sweep(
        self, limit: int = 500, *, parked: Collection[uuid.UUID] = ()
    ) -> dict[uuid.UUID, str]:
        due = self.model.due(self.now)
        if len(due) > limit and due[limit - 1].sweep_at == due[limit].sweep_at:
            limit = len(due)  # which of two that are equally late comes first is nobody's promise
        verdicts = dict(self.model.sweep(self.now, limit, parked))
        sweep = self.table.run(lambda c: sweeping.sweep(c, limit=limit, parked=parked))
        told = list(verdicts.values())
        assert sweep.verdicts == {verdict: told.count(verdict) for verdict in told}
        rung = {job_id for job_id, verdict in verdicts.items() if verdict in RINGING}
        assert {bell.job_id for bell in sweep.doorbells} == rung
        self.check("sweep")
        if limit >= len(due):
            self._nothing_is_overdue()
        return verdicts

    def ring_silent(self, tier: str) -> None:
        expected = self.model.silent(tier, self.now)
        bells = self.table.run(lambda c: sweeping.silent_doorbells(c, tier))
        assert {bell.job_id for bell in bells} == expected
        self.check("silent_doorbells")

    def prune(self, age_s: float) -> None:
        expected = self.model.prune(age_s, self.now)
        floor = oldest_id(self.now - age_s)
        pruned = self.table.run(lambda c: sweeping.prune(c, floor=floor, age_s=age_s))
        assert pruned == expected
        self.check("prune")

    # -- what must always be true --------------------------------------------------------------

    def check(self, statement: str) -> None:
        """Compare all rows with the model, and with the rows before."""
        seen = self.table.snapshot()
        assert seen.jobs.keys() == self.model.jobs.keys()
        for job_id, job in self.model.jobs.items():
            row = seen.jobs[job_id]
            _check_row(row, job)
            _check_result(row, seen.results.get(job_id, []), job)
            _check_callbacks(seen.callbacks.get(job_id, []), job)
            _check_counters(row, seen.ledger.get(job_id, []), job)
            _check_timers(row, job, self.now)
        assert seen.results.keys() | seen.callbacks.keys() <= self.model.jobs.keys()
        self._check_against_before(seen, statement)
        self.last = seen

    def _check_against_before(self, seen: Snapshot, statement: str) -> None:
        before = self.last
        for job_id, row in seen.jobs.items():
            old = before.jobs.get(job_id)
            if old is not None:
                assert row["fence"] >= old["fence"]
                if old["state"] in FINAL_STATES:
                    assert row == old, "what is final was changed"
                    assert seen.results[job_id] == before.results[job_id]
                    assert seen.callbacks.get(job_id) == before.callbacks.get(job_id)
                    assert seen.ledger.get(job_id) == before.ledger.get(job_id)
            self._note("[*]" if old is None else old["state"], row["state"], statement)
        for job_id in before.jobs.keys() - seen.jobs.keys():
            assert before.jobs[job_id]["state"] in FINAL_STATES
            self._note(before.jobs[job_id]["state"], "[*]", statement)

    def _note(self, before: str, after: str, statement: str) -> None:
        if before != after:
            self.moves.add((before, after, statement))

    def _nothing_is_overdue(self) -> None:
        """Promised: a final state by the deadline and a minute; a lease is its largest part."""
        for row in self.last.jobs.values():
            if row["finished_at"] is None:
                assert row["sweep_at"].timestamp() >= self.now
                assert row["deadline"].timestamp() + max(LEASES_S) >= self.now


def _check_row(row: Row, job: ModelJob) -> None:
    assert {name: row[name] for name in FACTS} == {name: getattr(job, name) for name in FACTS}
    assert {n: _seconds(row[n]) for n in INSTANTS} == {n: getattr(job, n) for n in INSTANTS}
    assert _code(row["last_error"]) == job.error_code
    assert (row["policy"] or {}).get("service") == job.service


def _check_result(row: Row, found: Sequence[Row], job: ModelJob) -> None:
    """A results row exists exactly when the state is final, and says the same."""
    assert len(found) == (row["state"] in FINAL_STATES) == (row["finished_at"] is not None)
    for result in found:
        assert (result["state"], result["attempts"], result["calls"], result["finished_at"]) == (
            row["state"],
            row["attempt"],
            row["calls"],
            row["finished_at"],
        )
        assert _code(result["error"]) == job.result_code
        assert result["tenant"] == job.spec.tenant
        assert result["total_ms"] == (_seconds(row["finished_at"]) - job.created_at) * 1000


def _check_callbacks(found: Sequence[Row], job: ModelJob) -> None:
    told = job.finished_at is not None and job.spec.callback_url is not None
    assert [row["event"] for row in found] == [f"prompt.{job.state}"] * told


def _check_counters(row: Row, paid: Sequence[Row], job: ModelJob) -> None:
    """Nothing is counted twice or lost: neither claims nor calls."""
    assert row["attempt"] + row["deferrals"] + row["crashes"] == job.claims
    assert row["fence"] == job.claims + row["crashes"] + job.taken_back
    assert sum(entry["calls"] for entry in paid) == row["calls"]
    assert sum(entry["unknown_calls"] for entry in paid) == row["unknown_calls"] <= row["calls"]
    assert job.landed <= 1
    assert row["crashes"] <= MAX_CRASHES
    assert row["crashes"] < MAX_CRASHES or row["state"] in FINAL_STATES
    running = row["state"] == "running"
    assert (row["lease_until"] is not None) == (row["lease_owner"] is not None) == running
    if row["state"] == "submitted":
        assert row["claim_calls"] in {0, 1}
    elif not running or job.spec.on_unknown is OnUnknown.RETRY:
        assert (row["claim_calls"] > 0) == running


def _check_timers(row: Row, job: ModelJob, now: float) -> None:
    """Whatever happens to workers and doorbells, a sweeper looks at the job in time."""
    if row["state"] in FINAL_STATES:
        return
    sweep_at = _seconds(row["sweep_at"])
    if row["state"] == "running":
        assert sweep_at <= _seconds(row["lease_until"]) <= job.deadline + max(LEASES_S)
    elif row["state"] == "submitted":  # `run_at` is when it is taken back, if it may be
        once = job.spec.on_unknown is OnUnknown.FAIL and row["claim_calls"]
        assert sweep_at <= (job.deadline if once else max(_seconds(row["run_at"]), now))
    else:
        assert sweep_at <= job.deadline
        seen_at = max(_seconds(row["rung_at"]), job.parked_at)
        assert sweep_at <= max(_seconds(row["run_at"]), seen_at + 300)
    if row["state"] in {"queued", "submitted"} and row["cancel_requested"]:
        assert sweep_at <= now


def _seconds(instant: Any) -> Any:
    return None if instant is None else instant.timestamp()


def _code(error: dict[str, Any] | None) -> Any:
    return None if error is None else error["code"]


def outcome_of(claim: Claim, state: JobState, calls: int, unknown_calls: int) -> Outcome:
    """How a job ends that was claimed so."""
    failed = state in {JobState.FAILED, JobState.EXPIRED}
    return Outcome(
        job_id=claim[0],
        fence=claim[1],
        state=state,
        text="An answer" if state is JobState.SUCCEEDED else None,
        error=JobError(code="bad", message="it failed") if failed else None,
        calls=calls,
        unknown_calls=min(unknown_calls, calls),
    )


def release_of(claim: Claim, delay_s: float, calls: int, *, counts: bool) -> Release:
    """What gives the claim back."""
    return Release(
        job_id=claim[0],
        fence=claim[1],
        delay_s=delay_s,
        counts=counts,
        calls=calls,
        unknown_calls=calls // 2,
        error=JobError(code="later", message="not now") if counts else None,
    )
