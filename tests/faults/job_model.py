"""What the job table should do, told in plain Python: the model of the state machine's test."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from promptfleet_shared.errors import IdempotencyConflictError
from promptfleet_shared.jobs import JobSpec, JobState, OnUnknown, Outcome, Release

MAX_CRASHES = 3
DEADLINE_GRACE_S = 15.0
RING_GRACE_S = 30.0
SILENCE_S = 5.0
RINGING = frozenset({"ring", "lost", "spill"})
"""Verdicts after which a doorbell is rung."""

Claim = tuple[uuid.UUID, int]
"""A job and the fence that it was claimed under."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelJob:
    """A row of `jobs`, and what no row tells: how often it was claimed and written.

    Instants are seconds of the test's clock.
    """

    spec: JobSpec
    created_at: float
    run_at: float
    rung_at: float
    sweep_at: float
    deadline: float
    state: JobState = JobState.QUEUED
    fence: int = 0
    attempt: int = 0
    crashes: int = 0
    deferrals: int = 0
    calls: int = 0
    unknown_calls: int = 0
    claim_calls: int = 0
    rings: int = 0
    lease_owner: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    error_code: str | None = None
    finished_at: float | None = None
    result_code: str | None = None
    service: str | None = None
    claims: int = 0
    landed: int = 0
    taken_back: int = 0
    parked_at: float = 0.0

    @property
    def is_unsent(self) -> bool:
        """True of a line that its provider can't have yet."""
        return self.state is JobState.SUBMITTED and not self.claim_calls

    @property
    def lapsed_since(self) -> float:
        """When the lease is over."""
        assert self.lease_until is not None
        return self.lease_until

    def is_held(self, fence: int) -> bool:
        """True where a worker has it under this fence."""
        return self.state is JobState.RUNNING and self.fence == fence

    def is_given(self, fence: int) -> bool:
        """True where a provider's batch has it under this fence."""
        return self.state is JobState.SUBMITTED and self.fence == fence

    def takes(self, fence: int) -> bool:
        """True where an end under this fence still lands."""
        return self.is_held(fence) or self.is_given(fence)

    def may_start(self, now: float) -> bool:
        """True if a worker can claim it."""
        return self.is_due(now) and self.deadline > now

    def is_due(self, now: float) -> bool:
        """True if its turn has come."""
        due = self.state is JobState.QUEUED and self.run_at <= now
        return due and not self.cancel_requested

    def end(self, state: JobState, now: float, code: str | None) -> None:
        """It is final: nothing changes from now on."""
        self.state = state
        self.finished_at = now
        self.result_code = code
        self._let_go()

    def queue(self) -> None:
        """It waits again."""
        self.state = JobState.QUEUED
        self._let_go()

    def _let_go(self) -> None:
        self.lease_owner = self.lease_until = None
        self.claim_calls = 0


class Model:
    """All jobs, and the statements of the store as they are meant."""

    def __init__(self) -> None:
        self.jobs: dict[uuid.UUID, ModelJob] = {}

    def insert(self, specs: Sequence[JobSpec], now: float) -> list[uuid.UUID]:
        """The ids that the caller is told; raises for a key that was used otherwise."""
        accepted: dict[tuple[str, str], JobSpec] = {
            (job.spec.tenant, job.spec.idempotency_key): job.spec
            for job in self.jobs.values()
            if job.spec.idempotency_key is not None
        }
        told, fresh = [], []
        for spec in specs:
            known = spec
            if spec.idempotency_key is not None:
                known = accepted.setdefault((spec.tenant, spec.idempotency_key), spec)
            if not _is_same_request(known, spec):
                raise IdempotencyConflictError(field="idempotency_key")
            told.append(known.id)
            if known is spec and spec.id not in self.jobs:
                fresh.append(spec)
        for spec in fresh:
            self.jobs[spec.id] = ModelJob(
                spec=spec,
                created_at=now,
                run_at=now,
                rung_at=now,
                deadline=now + spec.deadline_s,
                sweep_at=now + min(spec.deadline_s, RING_GRACE_S),
            )
        return told

    def claim(
        self, ids: Iterable[uuid.UUID], worker: str, lease_s: float, now: float
    ) -> dict[uuid.UUID, int]:
        """The fences of those that were claimed."""
        claimed = {}
        for job in self._known(ids):
            if job.may_start(now):
                job.state = JobState.RUNNING
                job.fence += 1
                job.attempt += 1
                job.claims += 1
                job.claim_calls = 0 if job.spec.on_unknown is OnUnknown.FAIL else 1
                job.lease_owner = worker
                job.lease_until = now + lease_s
                job.sweep_at = min(job.sweep_at, job.lease_until)
                claimed[job.spec.id] = job.fence
        return claimed

    def heartbeat(
        self, held: Mapping[uuid.UUID, int], lease_s: float, now: float
    ) -> dict[uuid.UUID, bool]:
        """Whether their cancellation was asked for, of those that are still held."""
        alive = {}
        for job_id, fence in held.items():
            job = self.jobs.get(job_id)
            if job is None or not job.is_held(fence):
                continue
            alive[job_id] = job.cancel_requested
            if job.lapsed_since < now + lease_s * 2 / 3:
                longest = max(job.lapsed_since, job.deadline + DEADLINE_GRACE_S)
                job.lease_until = min(now + lease_s, longest)
        return alive

    def begin_calls(
        self, begun: Mapping[uuid.UUID, tuple[int, int]], now: float
    ) -> dict[uuid.UUID, bool]:
        """As a heartbeat answers; what may be called is noted on the row."""
        held = {}
        for job_id, (fence, calls) in begun.items():
            job = self.jobs.get(job_id)
            if job is None or not job.is_held(fence) or job.lapsed_since <= now:
                continue
            held[job_id] = job.cancel_requested
            if not job.cancel_requested:
                job.claim_calls = max(job.claim_calls, calls)
        return held

    def finish(self, outcomes: Iterable[Outcome], now: float) -> set[uuid.UUID]:
        """Those that were written."""
        written = set()
        for outcome in outcomes:
            job = self.jobs.get(outcome.job_id)
            if job is None or not job.takes(outcome.fence):
                continue
            job.landed += 1
            pay(job, outcome.calls, outcome.unknown_calls)
            code = outcome.error.code if outcome.error else None
            job.error_code = code or job.error_code
            job.end(outcome.state, now, code)
            written.add(outcome.job_id)
        return written

    def release(self, releases: Iterable[Release], now: float) -> set[uuid.UUID]:
        """Those that were queued again."""
        released = set()
        for item in releases:
            job = self.jobs.get(item.job_id)
            if job is None or not job.takes(item.fence):
                continue
            pay(job, item.calls, item.unknown_calls)
            job.attempt -= 0 if item.counts else 1
            job.deferrals += 0 if item.counts else 1
            job.run_at = now + item.delay_s
            job.sweep_at = now if job.cancel_requested else min(job.deadline, job.run_at)
            job.error_code = item.error.code if item.error else job.error_code
            job.queue()
            released.add(item.job_id)
        return released

    def cancel(self, ids: Iterable[uuid.UUID], tenant: str, now: float) -> set[uuid.UUID]:
        """Those that were not final yet."""
        asked = set()
        for job in self._known(ids):
            if job.spec.tenant != tenant or job.finished_at is not None:
                continue
            job.cancel_requested = True
            ends_now = job.state is JobState.QUEUED or job.is_unsent
            if job.state is JobState.SUBMITTED:
                job.sweep_at = min(job.sweep_at, now)
            if ends_now:
                job.end(JobState.CANCELLED, now, None)
            asked.add(job.spec.id)
        return asked

    def due(self, now: float) -> list[ModelJob]:
        """Those that a sweeper looks at, the longest overdue first."""
        open_jobs = (job for job in self.jobs.values() if job.finished_at is None)
        return sorted((j for j in open_jobs if j.sweep_at <= now), key=lambda job: job.sweep_at)

    def sweep(
        self, now: float, limit: int, parked: Collection[uuid.UUID] = ()
    ) -> list[tuple[uuid.UUID, str]]:
        """Each judged job with its verdict."""
        due = self.due(now)[:limit]
        return [(job.spec.id, self._judge(job, now, parked=job.spec.id in parked)) for job in due]

    def silent(self, tier: str, now: float) -> set[uuid.UUID]:
        """Those that are rung for because their tier's queue is empty."""
        silent = {
            job.spec.id
            for job in self.jobs.values()
            if job.is_due(now) and job.spec.tier == tier and job.rung_at < now - SILENCE_S
        }
        for job in self._known(silent):
            job.rings += 1
            job.rung_at = now
        return silent

    def prune(self, age_s: float, now: float) -> int:
        """How many ended jobs are forgotten."""
        old = [
            job_id
            for job_id, job in self.jobs.items()
            # Nobody delivers callbacks here, so what has one stays.
            if job.finished_at is not None
            and job.finished_at < now - age_s
            and job.spec.callback_url is None
        ]
        for job_id in old:
            del self.jobs[job_id]
        return len(old)

    def _known(self, ids: Iterable[uuid.UUID]) -> list[ModelJob]:
        return [self.jobs[job_id] for job_id in sorted(set(ids)) if job_id in self.jobs]

    def _judge(self, job: ModelJob, now: float, *, parked: bool) -> str:
        lapsed = job.state is JobState.RUNNING and job.lapsed_since < now
        if job.state is JobState.RUNNING and not lapsed:
            job.sweep_at = job.lapsed_since
            return "alive"
        verdict = self._verdict(job, now, lapsed=lapsed)
        if verdict == "alive":
            job.sweep_at = min(job.run_at, job.deadline) if job.run_at > now else job.deadline
            return verdict
        if verdict == "ring" and parked:
            job.parked_at = now
            job.sweep_at = min(job.deadline, now + 300.0)
            return "parked"
        self._take_from_whoever_has_it(job, verdict, lapsed=lapsed)
        back_off_s = min(300.0, 30.0 * 2 ** min(job.rings, 10))
        job.sweep_at = min(job.deadline, now + back_off_s)
        if verdict in RINGING:
            job.rings += 1
            job.rung_at = now
            job.queue()
            return verdict
        code = {"poison": "poison", "unknown": "unknown_outcome", "expired": "expired"}.get(verdict)
        job.error_code = code or job.error_code
        failed = verdict in {"poison", "unknown"}
        job.end(JobState.FAILED if failed else JobState(verdict), now, code)
        return verdict

    @staticmethod
    def _take_from_whoever_has_it(job: ModelJob, verdict: str, *, lapsed: bool) -> None:
        """What a lost worker, or a provider's batch, may have called is counted."""
        if lapsed or job.state is JobState.SUBMITTED:
            pay(job, job.claim_calls, job.claim_calls)
        if lapsed:
            job.crashes += 1
        if verdict == "spill":
            job.taken_back += 1
            job.deferrals += 1
            job.service = "standard"
        if lapsed or verdict == "spill":
            job.attempt -= 1
            job.fence += 1

    @staticmethod
    def _verdict(job: ModelJob, now: float, *, lapsed: bool) -> str:
        if job.cancel_requested or job.deadline <= now:
            return "cancelled" if job.cancel_requested else "expired"
        if job.state is JobState.SUBMITTED:
            once = job.spec.on_unknown is OnUnknown.FAIL and not job.is_unsent
            return "alive" if job.run_at > now or once else "spill"
        if not lapsed:
            return "ring"
        if job.crashes + 1 >= MAX_CRASHES:
            return "poison"
        if job.spec.on_unknown is OnUnknown.FAIL and job.claim_calls:
            return "unknown"
        return "lost"


def pay(job: ModelJob, calls: int, unknown_calls: int) -> None:
    """Count calls on a job, as the ledger does."""
    job.calls += calls
    job.unknown_calls += unknown_calls


def _is_same_request(one: JobSpec, other: JobSpec) -> bool:
    return _request(one) == _request(other)


def _request(spec: JobSpec) -> tuple[Any, ...]:
    facts = (spec.tier, spec.kind, spec.model, spec.callback_url, spec.metadata)
    return (*facts, spec.request, spec.on_unknown)
