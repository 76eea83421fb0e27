"""Random histories of providers' batches: workers that die between any two steps, late answers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, multiple, rule
from tests.faults.batch_bench import ROOM, BatchBench, return_of
from tests.faults.job_bench import outcome_of, release_of
from tests.faults.job_model import Claim

from promptfleet_shared.jobs import JobState
from promptfleet_shared.store.provider_batches import Held

LEASE_S = 30.0
SETTLE_S = 30.0
POLL_S = 10.0
LOST_AFTER = ("claimed", "marked", "noted", "begun", "asked", "told")
"""After which of its steps a worker is lost; after the last one it is not."""
ANSWERS = ("succeeded", "failed", "refused", "nothing")


class SimulatedBatches:
    """What the provider has made: each of our batches by its name, with the lines that it got."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[uuid.UUID, list[Claim]]] = {}

    def make(self, batch: uuid.UUID, lines: list[Claim]) -> str:
        name = f"there-{len(self.made) + 1}"
        self.made[name] = (batch, lines)
        return name

    def find(self, batch: uuid.UUID) -> str | None:
        return next((name for name, (ours, _) in self.made.items() if ours == batch), None)


class BatchWorker:
    """What workers do about batches, step by step, and the provider that they ask."""

    def __init__(self, bench: BatchBench) -> None:
        self.bench = bench
        self.provider = SimulatedBatches()

    def move_all_on(
        self, lost_after: str, *, is_made: bool, answers: Sequence[str], lands: int = 9
    ) -> None:
        """As a worker does it, lost after one of its steps, or in the middle of landing."""
        for held in self.bench.claim_due("w1", LEASE_S):
            self.move_on(held, lost_after, is_made=is_made, answers=answers, lands=lands)

    def stand_still(self, late_s: float) -> None:
        """Between asking the provider and writing down what it said: another one adopts it."""
        for held in self.bench.claim_due("late", LEASE_S):
            if held.state != "preparing" or not self.prepare(held, "begun"):
                continue
            name = self.provider.make(held.id, self.bench.sent_lines(held))
            self.bench.pass_time(late_s)
            for other in self.bench.claim_due("w2", LEASE_S):
                if other.state == "unknown":
                    self.search(other)
            assert self.bench.note_submitted(held, name, POLL_S), "it was made twice"

    def see_through(
        self,
        held: Sequence[Claim],
        lost_after: str,
        *,
        cancelled: str | None,
        late_s: float,
        answers: Sequence[str],
    ) -> None:
        """From claims to answers, with a lost worker, a cancellation or a sweep in between."""
        tenants = {job: self.bench.model.jobs[job].spec.tenant for job, _ in held}
        self.bench.attach(held)
        for moment in ("gathering", "submitted"):
            if cancelled == moment:
                for job, tenant in tenants.items():
                    self.bench.cancel([job], tenant)
            if moment == "gathering":
                self.bench.pass_time(ROOM.gather_s)
                self.move_all_on(lost_after, is_made=lost_after != "begun", answers=answers)
        self.bench.pass_time(late_s)
        self.bench.sweep()
        for _ in range(3):
            self.bench.pass_time(LEASE_S + 1)
            self.move_all_on("told", is_made=True, answers=answers)

    def move_on(
        self, held: Held, lost_after: str, *, is_made: bool, answers: Sequence[str], lands: int
    ) -> None:
        if lost_after == "claimed":
            return
        if held.state == "preparing" and self.prepare(held, lost_after):
            self._ask(held, lost_after, is_made=is_made)
        elif held.state == "unknown":
            self.search(held)
        elif held.state == "submitted":
            self._land(held, answers, lands)

    def prepare(self, held: Held, lost_after: str) -> bool:
        """From its lines to the moment before it is asked for; false if it does not come there."""
        sent = held.sent
        if held.file_id is None:
            marked = self.bench.mark(held)
            if marked == 0:
                self.bench.end(held)
            if not marked or lost_after == "marked":
                return False
            sent = marked
            if not self.bench.note_file(held, sent) or lost_after == "noted":
                return False
        return self.bench.begin_submitting(held, sent)

    def _ask(self, held: Held, lost_after: str, *, is_made: bool) -> None:
        if lost_after == "begun":
            return
        name = self.provider.make(held.id, self.bench.sent_lines(held)) if is_made else None
        if lost_after == "asked":
            self.bench.note_unknown(held, 0.0)
        elif name is not None:
            assert self.bench.note_submitted(held, name, POLL_S)
        else:
            self.bench.prepare_again(held, POLL_S)

    def search(self, held: Held) -> None:
        name = self.provider.find(held.id)
        if name is not None:
            assert self.bench.note_submitted(held, name, 0.0)
        elif not self.bench.is_wanted(held):
            self.bench.end(held)
        elif (held.unknown_for_s or 0.0) < SETTLE_S:
            self.bench.pause(held, SETTLE_S - (held.unknown_for_s or 0.0))
        else:
            self.bench.prepare_again(held, 0.0)

    def _land(self, held: Held, answers: Sequence[str], lands: int) -> None:
        """`lands` answers, and then the worker is lost; else all, and the batch is over."""
        assert held.provider_id is not None
        if not self.bench.is_wanted(held) and not held.cancel_sent:
            self.bench.note_cancel(held)
        there = self.provider.made[held.provider_id][1]
        told = {line: answers[n % len(answers)] for n, line in enumerate(there)}
        waiting = self.bench.waiting(held, there)
        for line in waiting[:lands]:
            if told[line] in {"succeeded", "failed"}:
                self.bench.finish([outcome_of(line, JobState(told[line]), 1, 0)])
            elif told[line] == "refused":
                returns = [return_of(line, calls=0, counts=False, service="standard")]
                self.bench.return_lines(held, returns)
        if len(waiting) > lands:
            return
        self.bench.return_lines(held, [return_of(k, counts=True) for k in self.bench.left(held)])
        self.bench.end(held)

    def check(self) -> None:
        """No batch was made twice, and so no line was given to the provider twice."""
        made = [batch for batch, _ in self.provider.made.values()]
        assert len(made) == len(set(made))
        lines = [line for _, there in self.provider.made.values() for line in there]
        assert len(lines) == len(set(lines))


class BatchRules(RuleBasedStateMachine):
    """What the job table's machine can do with batches."""

    bench: BatchBench
    worker: BatchWorker

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @rule(held=st.lists(claims, min_size=1, max_size=4, unique=True))
    def hand_over(self, held: list[Claim]) -> None:
        """Claims old and new: what the fence does not hold is no line."""
        known = [claim for claim in held if claim[0] in self.bench.model.jobs]
        if known:
            self.bench.attach(known)

    @rule(
        lost_after=st.sampled_from([*LOST_AFTER, *["told"] * 6]),
        is_made=st.sampled_from([True, True, False]),
        answers=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=4),
        lands=st.sampled_from([0, 1, 9, 9, 9]),
    )
    def move_batches_on(
        self, lost_after: str, is_made: bool, answers: list[str], lands: int
    ) -> None:
        """As a worker does it, lost after one of its steps, or in the middle of landing."""
        self.worker.move_all_on(lost_after, is_made=is_made, answers=answers, lands=lands)

    @rule(
        target=claims,
        job=jobs,
        lost_after=st.sampled_from(LOST_AFTER),
        cancelled=st.sampled_from([None, None, None, "gathering", "submitted"]),
        late_s=st.sampled_from([0.0, LEASE_S + 1, 200.0]),
        answers=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=3),
    )
    def a_batch_goes_its_way(
        self, job: uuid.UUID, lost_after: str, cancelled: str | None, late_s: float, answers: Any
    ) -> Any:
        """From a claim to its answer, with a lost worker, a cancellation or a sweep in between."""
        held = self.bench.claim([job], lease_s=LEASE_S)
        if not held:
            return multiple()
        self.worker.see_through(
            held, lost_after, cancelled=cancelled, late_s=late_s, answers=answers
        )
        return multiple(*held)

    @rule(late_s=st.sampled_from([0.0, LEASE_S, SETTLE_S + LEASE_S - 1]))
    def a_worker_stands_still(self, late_s: float) -> None:
        """Between asking the provider and writing down what it said: the other one adopts it."""
        self.worker.stand_still(late_s)

    @rule(held=claims, delay_s=st.sampled_from([0.0, 60.0]))
    def put_off(self, held: Claim, delay_s: float) -> None:
        """Limits, a budget or a bound have no room for the job, again and again."""
        for _ in range(3):
            known = self.bench.model.jobs.get(held[0])
            if known is None or not known.is_held(held[1]):
                return
            before = (known.attempt, known.calls, known.crashes)
            self.bench.release([release_of(held, delay_s, 0, counts=False)])
            self.bench.pass_time(delay_s)
            assert (known.attempt + 1, known.calls, known.crashes) == before
            again = self.bench.claim([held[0]], lease_s=LEASE_S)
            if not again:
                return
            (held,) = again
