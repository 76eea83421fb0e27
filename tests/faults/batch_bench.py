"""Providers' batches and their model side by side, on the bench of the job table."""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.faults.batch_model import Batches, ModelBatch
from tests.faults.job_bench import Bench
from tests.faults.job_model import Claim, ModelJob
from tests.faults.job_table import JobTable, Row

from promptfleet_shared.jobs import JobError, JobKind, JobState
from promptfleet_shared.store import provider_batches as store
from promptfleet_shared.store.provider_batches import (
    NO_ROW,
    Destination,
    Held,
    LineKey,
    NewLine,
    Return,
    Room,
)

ROOM = Room(max_lines=6, max_bytes=1000, gather_s=20.0, spill_before_s=40.0)
DEPLOYMENT = "d"
PAGE = 2
"""Lines of one statement: so few that batches have several pages."""
_FACTS = ("tenant", "state", "lines", "bytes", "sent", "tries", "file_id", "provider_id")
_MORE_FACTS = ("cancel_sent", "lease_owner")
_INSTANTS = ("lease_until", "submitting_at", "unknown_at", "submitted_at", "ended_at")


class BatchBench(Bench):
    """The bench with batches: who moves one on does so by the steps of a worker."""

    def __init__(self, table: JobTable) -> None:
        super().__init__(table)
        self.batches = Batches(self.model)
        self._names = itertools.count(1)

    # -- lines -------------------------------------------------------------------------------

    def attach(self, held: Sequence[Claim], room: Room = ROOM) -> set[uuid.UUID]:
        """Hand claims over, those of each tenant to its own batch; the jobs that were given."""
        given: set[uuid.UUID] = set()
        tenants = {job: self.model.jobs[job].spec.tenant for job, _ in held}
        for tenant in sorted(set(tenants.values())):
            lines = [
                NewLine(job_id=job, fence=fence, bytes=10)
                for job, fence in held
                if tenants[job] == tenant
            ]
            given |= self._attach(tenant, lines, room)
        return given

    def _attach(self, tenant: str, lines: Sequence[NewLine], room: Room) -> set[uuid.UUID]:
        destination = Destination(
            tenant=tenant, deployment=DEPLOYMENT, kind=JobKind.CHAT, model="m"
        )
        while True:
            new_id = self.table.new_id()
            expected = self.batches.attach(tenant, lines, new_id, room, self.now)
            given = self.table.run(
                lambda c: store.attach(c, destination, lines, new_id=new_id, room=room)  # noqa: B023
            )
            assert given == expected
            self.check("attach")
            if given is not None:
                return given
            self.batches.seal(tenant, self.now)
            self.table.run(lambda c: store.seal(c, destination))
            self.check("seal")

    def mark(self, held: Held) -> int | None:
        expected = self.batches.mark(held, self.now)
        marked, after = 0, NO_ROW
        while True:
            page = self.table.run(
                lambda c: store.mark_lines(c, held, after=after, limit=PAGE)  # noqa: B023
            )
            if page is None:
                break
            marked += page.marked
            if page.last is None:
                break
            after = page.last
        assert (None if page is None else marked) == expected
        self.check("mark")
        return expected

    def sent_lines(self, held: Held) -> list[Claim]:
        """As they are written for the provider, page by page."""
        found: list[Claim] = []
        while True:
            after = found[-1][0] if found else NO_ROW
            page = self.table.run(
                lambda c: store.sent_lines(c, held, after=after, limit=PAGE)  # noqa: B023
            )
            found += [(line.key.job_id, line.key.fence) for line in page]
            if len(page) < PAGE:
                break
        assert found == self.batches.sent_lines(held)
        return found

    def waiting(self, held: Held, keys: Sequence[Claim]) -> list[Claim]:
        waiting = self.table.run(lambda c: store.waiting_jobs(c, held, _line_keys(keys)))
        found = {(item.job.id, item.job.fence) for item in waiting}
        assert found == self.batches.waiting(held, keys)
        return sorted(found)

    def left(self, held: Held) -> list[Claim]:
        left = self.table.run(lambda c: store.left_lines(c, held, after=NO_ROW, limit=500))
        found = [(key.job_id, key.fence) for key in left]
        assert found == self.batches.left(held)
        return found

    def is_wanted(self, held: Held) -> bool:
        wanted = self.table.run(lambda c: store.is_wanted(c, held))
        assert wanted == self.batches.is_wanted(held)
        return wanted

    def return_lines(self, held: Held, returns: Sequence[Return]) -> set[uuid.UUID]:
        expected = self.batches.return_lines(held, returns, self.now)
        bells = self.table.run(lambda c: store.return_lines(c, held, returns))
        assert {bell.job_id for bell in bells} == expected
        self.check("return")
        return expected

    # -- batches -----------------------------------------------------------------------------

    def claim_due(self, owner: str, lease_s: float) -> list[Held]:
        expected = self.batches.claim_due(owner, lease_s, self.now)
        held = self.table.run(
            lambda c: store.claim_due(c, [DEPLOYMENT], owner=owner, lease_s=lease_s, limit=500)
        )
        assert {each.id for each in held} == expected
        self.check("claim_due")
        for each in held:
            known = self.batches.all[each.id]
            assert (each.state, each.file_id, each.provider_id, each.sent) == (
                known.state,
                known.file_id,
                known.provider_id,
                known.sent,
            )
            unknown_for_s = None if known.unknown_at is None else self.now - known.unknown_at
            assert each.unknown_for_s == unknown_for_s
        return sorted(held, key=lambda each: each.id)

    def hold(self, held: Held) -> bool:
        expected = self.batches.hold(held, self.now)
        assert self.table.run(lambda c: store.hold(c, held)) == expected
        self.check("hold")
        return expected

    def pause(self, held: Held, pause_s: float, *, failed: bool = False) -> None:
        self.batches.pause(held, pause_s, self.now, failed=failed)
        self.table.run(lambda c: store.pause(c, held, pause_s, failed=failed))
        self.check("pause")

    def note_file(self, held: Held, sent: int) -> bool:
        file_id = f"file-{next(self._names)}"
        expected = self.batches.note_file(held, file_id, sent, self.now)
        told = self.table.run(lambda c: store.note_file(c, held, file_id, sent=sent))
        assert told == expected
        self.check("note_file")
        return expected

    def begin_submitting(self, held: Held, sent: int) -> bool:
        expected = self.batches.begin_submitting(held, sent, self.now)
        assert self.table.run(lambda c: store.begin_submitting(c, held, sent=sent)) == expected
        self.check("begin_submitting")
        return expected

    def note_submitted(self, held: Held, provider_id: str, pause_s: float) -> bool:
        expected = self.batches.note_submitted(held, provider_id, pause_s, self.now)
        told = self.table.run(lambda c: store.note_submitted(c, held, provider_id, pause_s=pause_s))
        assert told == expected
        self.check("note_submitted")
        return expected

    def note_unknown(self, held: Held, pause_s: float) -> None:
        self.batches.note_unknown(held, pause_s, self.now)
        self.table.run(lambda c: store.note_unknown(c, held, pause_s=pause_s))
        self.check("note_unknown")

    def prepare_again(self, held: Held, pause_s: float) -> None:
        self.batches.prepare_again(held, pause_s, self.now)
        self.table.run(lambda c: store.prepare_again(c, held, pause_s=pause_s))
        self.check("prepare_again")

    def note_cancel(self, held: Held) -> None:
        self.batches.note_cancel(held, self.now)
        self.table.run(lambda c: store.note_cancel(c, held))
        self.check("note_cancel")

    def end(self, held: Held) -> None:
        self.batches.end(held, self.now)
        self.table.run(lambda c: store.end(c, held))
        self.check("end")

    # -- what must always be true --------------------------------------------------------------

    def check(self, statement: str) -> None:
        super().check(statement)
        if self.batches.all:
            self._check_batches()

    def _check_batches(self) -> None:
        rows, lines = self.table.batches()
        assert rows.keys() == self.batches.all.keys()
        for batch_id, batch in self.batches.all.items():
            _check_batch(rows[batch_id], batch)
        marks = {(r["job_id"], r["fence"]): (r["batch_id"], r["sent"]) for r in lines}
        assert len(marks) == len(lines)
        assert marks == {
            key: (batch.id, sent)
            for batch in self.batches.all.values()
            for key, sent in batch.marks.items()
        }
        held = Counter(key for key in marks if self._is_given(key))
        for job_id, job in self.model.jobs.items():
            _check_line(job, held[job_id, job.fence], marks.get((job_id, job.fence)))

    def _is_given(self, key: Claim) -> bool:
        job = self.model.jobs.get(key[0])
        return job is not None and job.is_given(key[1])


def _check_batch(row: Row, batch: ModelBatch) -> None:
    facts = (*_FACTS, *_MORE_FACTS)
    assert {name: row[name] for name in facts} == {name: getattr(batch, name) for name in facts}
    instants = {name: None if row[name] is None else row[name].timestamp() for name in _INSTANTS}
    assert instants == {name: getattr(batch, name) for name in _INSTANTS}


def _check_line(job: ModelJob, lines: int, mark: tuple[uuid.UUID, bool] | None) -> None:
    """A job that a batch has is one line of it; nobody else's claim is a line that could land."""
    if job.state is not JobState.SUBMITTED:
        assert not lines
    elif not (job.cancel_requested and job.is_unsent):  # the next sweep ends that one
        assert lines == 1
        assert mark is not None
        assert mark[1] <= bool(job.claim_calls), "it may be paid for, and would not be counted"


def return_of(
    key: Claim, delay_s: float = 0.0, calls: int = 1, *, counts: bool = False, **fields: Any
) -> Return:
    """What queues a line's job again."""
    return Return(
        key=LineKey(job_id=key[0], fence=key[1]),
        delay_s=delay_s,
        counts=counts,
        calls=calls,
        unknown_calls=calls,
        error=JobError(code="no_answer", message="nothing came"),
        policy=fields or None,
    )


def _line_keys(keys: Sequence[Claim]) -> list[LineKey]:
    return [LineKey(job_id=job, fence=fence) for job, fence in keys]
