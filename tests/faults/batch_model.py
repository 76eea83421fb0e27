"""What the tables of providers' batches should do, in plain Python."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Sequence

from tests.faults.job_model import Claim, Model, ModelJob, pay

from promptfleet_shared.jobs import JobState
from promptfleet_shared.store.provider_batches import Held, NewLine, Return, Room

OPEN_STATES = ("gathering", "preparing", "submitting", "unknown", "submitted")


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelBatch:
    """A row of `provider_batches`, and its lines: whether each is what the provider gets.

    Instants are seconds of the test's clock.
    """

    id: uuid.UUID
    tenant: str
    lease_until: float
    state: str = "gathering"
    lines: int = 0
    bytes: int = 0
    sent: int = 0
    tries: int = 0
    file_id: str | None = None
    provider_id: str | None = None
    cancel_sent: bool = False
    lease_owner: str | None = None
    submitting_at: float | None = None
    unknown_at: float | None = None
    submitted_at: float | None = None
    ended_at: float | None = None
    marks: dict[Claim, bool] = dataclasses.field(default_factory=dict)

    def lease(self, until: float, owner: str | None) -> None:
        """Whose it is, and until when; nobody's until then."""
        self.lease_until = until
        self.lease_owner = owner


class Batches:
    """All batches, and the statements about them as they are meant."""

    def __init__(self, jobs: Model) -> None:
        self._jobs = jobs
        self.all: dict[uuid.UUID, ModelBatch] = {}

    # -- lines -------------------------------------------------------------------------------

    def attach(
        self, tenant: str, lines: Sequence[NewLine], new_id: uuid.UUID, room: Room, now: float
    ) -> set[uuid.UUID] | None:
        """The jobs that became lines; None where there is no room."""
        size = sum(line.bytes for line in lines)
        batch = next(
            (b for b in self.all.values() if b.tenant == tenant and b.state == "gathering"), None
        )
        if batch is None:
            batch = ModelBatch(id=new_id, tenant=tenant, lease_until=now + room.gather_s)
            self.all[new_id] = batch
        elif batch.lines + len(lines) > room.max_lines or batch.bytes + size > room.max_bytes:
            return None
        batch.lines += len(lines)
        batch.bytes += size
        given = set()
        for line in lines:
            job = self._jobs.jobs.get(line.job_id)
            if job is not None and job.is_held(line.fence):
                self._give(job, room.spill_before_s, now)
                batch.marks[line.job_id, line.fence] = False
                given.add(line.job_id)
        if batch.lines >= room.max_lines:
            self.seal(tenant, now, room.max_lines)
        return given

    @staticmethod
    def _give(job: ModelJob, spill_s: float, now: float) -> None:
        job.state = JobState.SUBMITTED
        job.lease_owner = job.lease_until = None
        job.claim_calls = 0
        job.run_at = job.deadline - spill_s
        job.sweep_at = now if job.cancel_requested else job.run_at

    def seal(self, tenant: str, now: float, lines: int = 0) -> None:
        """What gathers and has so many lines is due."""
        for batch in self.all.values():
            if (batch.tenant, batch.state) == (tenant, "gathering") and batch.lines >= lines:
                batch.state, batch.lease_until = "preparing", now

    def mark(self, held: Held, now: float) -> int | None:
        """How many lines are to be sent; None for a batch that is not in this worker's hands."""
        batch = self._held(held, now, "preparing")
        if batch is None:
            return None
        batch.lease_until = now + held.lease_s
        for key in batch.marks:
            job = self._waiting(key)
            wanted = job is not None and not job.cancel_requested
            batch.marks[key] = wanted
            if job is not None and wanted:
                job.claim_calls = 1
        return sum(batch.marks.values())

    def sent_lines(self, held: Held) -> list[Claim]:
        """What the provider gets, in order."""
        batch = self.all[held.id]
        return sorted(k for k, sent in batch.marks.items() if sent and k[0] in self._jobs.jobs)

    def waiting(self, held: Held, keys: Iterable[Claim]) -> set[Claim]:
        """Those of the lines whose job nothing has ended yet."""
        marks = self.all[held.id].marks
        return {key for key in keys if key in marks and self._waiting(key)}

    def left(self, held: Held) -> list[Claim]:
        """All lines whose job waits."""
        return sorted(self.waiting(held, self.all[held.id].marks))

    def is_wanted(self, held: Held) -> bool:
        """True while somebody waits who has not asked for a cancellation."""
        return any(not self._jobs.jobs[job].cancel_requested for job, _ in self.left(held))

    def return_lines(self, held: Held, returns: Iterable[Return], now: float) -> set[uuid.UUID]:
        """Those that were queued again, under a new fence."""
        returned = set()
        for item in returns:
            job = self._waiting((item.key.job_id, item.key.fence))
            if job is None or job.spec.tenant != held.tenant:
                continue
            pay(job, item.calls, item.unknown_calls)
            job.fence += 1
            job.taken_back += 1
            job.attempt -= 0 if item.counts else 1
            job.deferrals += 0 if item.counts else 1
            job.run_at = now + item.delay_s
            job.rung_at = now
            job.sweep_at = now if job.cancel_requested else min(job.deadline, job.run_at)
            job.error_code = item.error.code if item.error else job.error_code
            job.service = (item.policy or {}).get("service", job.service)
            job.queue()
            returned.add(item.key.job_id)
        return returned

    def _waiting(self, key: Claim) -> ModelJob | None:
        job = self._jobs.jobs.get(key[0])
        return job if job is not None and job.is_given(key[1]) else None

    # -- batches -----------------------------------------------------------------------------

    def claim_due(self, owner: str, lease_s: float, now: float) -> set[uuid.UUID]:
        """Those that somebody should look at now."""
        due = [b for b in self.all.values() if b.state != "ended" and b.lease_until <= now]
        for batch in due:
            batch.lease(now + lease_s, owner)
            if batch.state == "submitting":
                batch.unknown_at = now
            moved = {"gathering": "preparing", "submitting": "unknown"}
            batch.state = moved.get(batch.state, batch.state)
        return {batch.id for batch in due}

    def hold(self, held: Held, now: float) -> bool:
        return self._extend(held, now, *OPEN_STATES) is not None

    def pause(self, held: Held, pause_s: float, now: float, *, failed: bool) -> None:
        batch = self._held(held, now, *OPEN_STATES)
        if batch is not None:
            batch.lease(now + pause_s, None)
            batch.tries += failed

    def note_file(self, held: Held, file_id: str, sent: int, now: float) -> bool:
        batch = self._extend(held, now, "preparing")
        if batch is not None:
            batch.file_id, batch.sent = file_id, sent
        return batch is not None

    def begin_submitting(self, held: Held, sent: int, now: float) -> bool:
        batch = self._extend(held, now, "preparing")
        if batch is not None:
            batch.state, batch.sent, batch.submitting_at = "submitting", sent, now
        return batch is not None

    def note_submitted(self, held: Held, provider_id: str, pause_s: float, now: float) -> bool:
        """Whoever knows the name may tell it, as long as nobody has told another one."""
        batch = self.all.get(held.id)
        if batch is None:
            return False
        untold = batch.state in {"submitting", "unknown"} and batch.provider_id is None
        if not untold and (batch.state, batch.provider_id) != ("submitted", provider_id):
            return False
        batch.state, batch.provider_id = "submitted", provider_id
        batch.tries, batch.submitted_at = 0, now
        batch.lease(now + pause_s, None)
        return True

    def note_unknown(self, held: Held, pause_s: float, now: float) -> None:
        batch = self._held(held, now, "submitting")
        if batch is not None:
            batch.state, batch.unknown_at = "unknown", now
            batch.lease(now + pause_s, None)

    def prepare_again(self, held: Held, pause_s: float, now: float) -> None:
        batch = self._held(held, now, "submitting", "unknown")
        if batch is not None:
            batch.state, batch.unknown_at = "preparing", None
            batch.tries += 1
            batch.lease(now + pause_s, None)

    def note_cancel(self, held: Held, now: float) -> None:
        batch = self._extend(held, now, *OPEN_STATES)
        if batch is not None:
            batch.cancel_sent = True

    def end(self, held: Held, now: float) -> None:
        batch = self._held(held, now, *OPEN_STATES)
        if batch is not None:
            batch.state, batch.ended_at, batch.lease_owner = "ended", now, None
            batch.marks.clear()

    def _held(self, held: Held, now: float, *states: str) -> ModelBatch | None:
        batch = self.all.get(held.id)
        if batch is None or batch.lease_owner != held.owner or batch.lease_until <= now:
            return None
        return batch if batch.state in states else None

    def _extend(self, held: Held, now: float, *states: str) -> ModelBatch | None:
        batch = self._held(held, now, *states)
        if batch is not None:
            batch.lease_until = now + held.lease_s
        return batch
