"""Holds what became of the jobs against what was promised; pure, so that it can be tested."""

from __future__ import annotations

import collections
import dataclasses
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal

from tests.faults.orders import FREE_CALLS, METERED, SPENDER, Ask, Fate
from tests.faults.recorder import Cancel, Entry, Reading
from tests.faults.witness import Changed, Exceeded

FINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})
AFTER_DEADLINE_S = 60.0
"""A job ends by its deadline and so many seconds."""
NO_CALL_AFTER_CANCEL_S = 5.0
SLACK_S = 1.5
"""What a busy machine may add between a worker's decision to call and the provider's notice."""
SETTLES_WITHIN_S = 60.0
"""Once all is healed, nothing keeps a job for so long: not a whole round of retries."""
HOLD_S = 60.0
"""A job of a worker that is lost counts for its bounds for so long."""
AFTER_LOSS_S = 30.0
"""Bounds may be exceeded for so long after Valkey has lost what it knew of who is in flight."""
RESERVATION_USD = Decimal("0.0001")
"""More than any metered prompt reserves: 24 tokens of answer, and some hundred of prompt."""
MOST_LISTED = 12

# Codes of failures that faults can lead to, by what must be true of the job.
_TRIED_ENOUGH = frozenset(
    {
        *("http_500", "http_502", "http_503", "http_429", "server_error", "rate_limit_exceeded"),
        *("timeout", "connection_lost", "connect_error", "truncated", "bad_response"),
        *("invalid_encoding", "transport", "error_500", "internal_server_error"),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the run's fleet.toml says."""

    max_calls: int
    retry_attempts: int
    max_crashes: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobRow:
    """A job with all that is written about it; instants are seconds of this machine's clock.

    Attributes:
        results: How many rows it has in `results`; the fields that follow are that row's.
        paid: Calls by the ledger, `paid_unknown` the unknown ones of them.
        callbacks: For each of its callbacks the id, and whether it was delivered or exhausted.
        by_batch: True for one that a provider's batch has answered.
        leaks: Whether an error's text holds a canary.
    """

    id: uuid.UUID
    name: str | None
    state: str
    fence: int
    attempt: int
    deferrals: int
    crashes: int
    calls: int
    unknown_calls: int
    held: bool
    deadline: float
    finished_at: float | None
    error: str | None
    results: int
    result_state: str | None
    result_text: str | None
    result_error: str | None
    result_attempts: int | None
    result_calls: int | None
    paid: int
    paid_unknown: int
    callbacks: Sequence[tuple[uuid.UUID, bool, bool]]
    event: str | None
    by_batch: bool = False
    leaks: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What a receiver heard of a job."""

    message_id: str
    job_id: uuid.UUID
    state: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A turn that a conversation remembers, of which job, and which one it is."""

    talk: tuple[str, str]
    n: int
    job_id: uuid.UUID


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that is known after a run.

    Attributes:
        calls: How often the provider saw each prompt, by its text.
        last_calls: When it saw it last, by `time.monotonic`.
        pauses: When workers stood still: from, to; by `time.monotonic`.
        losses: When Valkey began to lose its data; by `time.monotonic`.
        parked: Doorbells that waited for their turns when no job was left.
        exceeded: When more was in flight than may be.
        batches: How often the provider made each of our batches.
        lines: How often it was given each of their lines, by their ids: job and fence.
        turns: Of all conversations, in order.
        spent_usd: What the spender has spent, by the ledger; of `hard_usd`.
        limited: Jobs that waited for a limit.
        throttled: Refusals of the metered provider; `metered` is what it did not refuse.
        clock_offset: `time.time` less `time.monotonic`.
        healed_at: When all was made whole, by `time.time`; None if that is not looked at.
        heard: Callbacks that a receiver took.
    """

    limits: Limits
    entries: Mapping[str, Entry]
    jobs: Sequence[JobRow]
    cancels: Sequence[Cancel] = ()
    tried_cancels: Collection[uuid.UUID] = ()
    readings: Sequence[Reading] = ()
    changed: Sequence[Changed] = ()
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    last_calls: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pauses: Sequence[tuple[float, float]] = ()
    losses: Sequence[float] = ()
    parked: int = 0
    exceeded: Sequence[Exceeded] = ()
    batches: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)
    turns: Sequence[Turn] = ()
    spent_usd: Decimal = Decimal(0)
    hard_usd: Decimal = Decimal(0)
    throttled: int = 0
    limited: int = 0
    metered: int = 0
    clock_offset: float = 0.0
    healed_at: float | None = None
    heard: Sequence[Heard] = ()
    calls_back: bool = True
    leaks: Collection[str] = ()
    oddities: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A promise that was not kept."""

    kind: str
    about: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a run has shown; green without violations."""

    violations: Sequence[Violation]
    excused: Mapping[str, int]

    def count(self, kind: str) -> int:
        return sum(violation.kind == kind for violation in self.violations)


class Judge:
    """Goes through the promises one by one."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._jobs = {job.id: job for job in evidence.jobs}
        self._by_name: dict[str, list[JobRow]] = collections.defaultdict(list)
        for job in evidence.jobs:
            self._by_name[job.name or ""].append(job)
        self._excused: collections.Counter[str] = collections.Counter()

    def verdict(self) -> Verdict:
        """All violations."""
        found: list[Violation] = []
        for promise in (
            self._accepted_exist,
            self._refused_do_not,
            self._ends_are_whole,
            self._counters_add_up,
            self._ends_are_expected,
            self._rows_stay,
            self._calls_are_counted,
            self._calls_stop,
            self._lines_are_sent_once,
            self._nobody_is_left_waiting,
            self._bounds_hold,
            self._budget_holds,
            self._turns_are_whole,
            self._callbacks_arrive,
            self._prompts_stay_inside,
        ):
            found.extend(promise())
        return Verdict(violations=found, excused=dict(self._excused))

    # -- lost, doubled -----------------------------------------------------------------------

    def _accepted_exist(self) -> Iterator[Violation]:
        for name, entry in self._evidence.entries.items():
            if len(entry.ids) > 1:
                yield Violation(kind="doubled", about=f"{name} got the ids {sorted(entry.ids)}")
            for job_id in entry.ids:
                if job_id not in self._jobs:
                    yield Violation(kind="lost", about=f"{name}, accepted as {job_id}, has no row")
            rows = self._by_name.get(name, [])
            if len(rows) > 1:
                yield Violation(kind="doubled", about=f"{name} has {len(rows)} jobs")

    def _refused_do_not(self) -> Iterator[Violation]:
        for name, rows in self._by_name.items():
            entry = self._evidence.entries.get(name)
            if entry is None:
                yield Violation(kind="unexpected", about=f"nobody submitted {name!r} ({rows[0]})")
            elif not entry.may_exist:
                yield Violation(kind="unexpected", about=f"{name} was refused, and has a row")

    def _ends_are_whole(self) -> Iterator[Violation]:
        for job in self._evidence.jobs:
            if job.state not in FINAL or job.finished_at is None:
                yield Violation(kind="lost", about=f"is not final: {job}")
            elif job.results == 0:
                yield Violation(kind="lost", about=f"has no result: {job}")
            elif job.results > 1:
                yield Violation(kind="doubled", about=f"has {job.results} results: {job}")
            elif (job.state, job.attempt, job.calls) != (
                job.result_state,
                job.result_attempts,
                job.result_calls,
            ):
                yield Violation(kind="unexpected", about=f"job and result differ: {job}")
            elif job.finished_at > job.deadline + AFTER_DEADLINE_S:
                yield Violation(kind="unexpected", about=f"ended too late: {job}")
            elif self._was_stuck(job, job.finished_at):
                yield Violation(kind="unexpected", about=f"was stuck though all was well: {job}")

    def _was_stuck(self, job: JobRow, finished_at: float) -> bool:
        healed_at, entry = self._evidence.healed_at, self._evidence.entries.get(job.name or "")
        is_bounded = entry is not None and entry.ask.concurrency_key is not None
        after_s = SETTLES_WITHIN_S + (HOLD_S if is_bounded else 0.0)
        return healed_at is not None and finished_at > healed_at + after_s

    def _rows_stay(self) -> Iterator[Violation]:
        for change in self._evidence.changed:
            yield Violation(kind="doubled", about=f"a final row was changed: {change}")
        for reading in self._evidence.readings:
            job = self._jobs.get(reading.job_id)
            if job is None:
                yield Violation(kind="lost", about=f"a client had read {reading}")
            elif (job.result_state, job.result_text) != (reading.state, reading.text):
                yield Violation(kind="doubled", about=f"a client had read {reading}: {job}")

    # -- counters ----------------------------------------------------------------------------

    def _counters_add_up(self) -> Iterator[Violation]:
        for job in self._evidence.jobs:
            # Each claim was an attempt, a deferral or a crash; a sweeper fences off each crash.
            # So does who takes a line back from a provider's batch, once: then it goes alone.
            entry = self._evidence.entries.get(job.name or "")
            taken_back = job.fence - job.attempt - job.deferrals - 2 * job.crashes
            if taken_back not in range(2 if entry is not None and entry.ask.service else 1):
                yield Violation(kind="unexpected", about=f"claims do not add up: {job}")
            if (job.paid, job.paid_unknown) != (job.calls, job.unknown_calls):
                yield Violation(kind="unexpected", about=f"the ledger does not add up: {job}")
            if job.unknown_calls > job.calls:
                yield Violation(kind="unexpected", about=f"more unknown calls than calls: {job}")
            if job.calls > self._evidence.limits.max_calls:
                yield Violation(kind="unexpected", about=f"too many calls: {job}")
            if job.held and job.state in FINAL:
                yield Violation(kind="unexpected", about=f"is final and still held: {job}")

    # -- ends --------------------------------------------------------------------------------

    def _ends_are_expected(self) -> Iterator[Violation]:
        asked = {c.job_id for c in self._evidence.cancels} | set(self._evidence.tried_cancels)
        for job in self._evidence.jobs:
            entry = self._evidence.entries.get(job.name or "")
            if entry is None or job.state not in FINAL:
                continue
            why = self._why_unexpected(job, entry.ask, cancelled=job.id in asked)
            if why is not None:
                yield Violation(kind="unexpected", about=f"{why}: {entry.ask} became {job}")

    def _why_unexpected(self, job: JobRow, ask: Ask, *, cancelled: bool) -> str | None:
        if job.state == "succeeded":
            return _why_no_success(job, ask)
        if job.state == "cancelled":
            # Whoever did not get an id can't have cancelled it.
            return None if cancelled else "nobody cancelled it"
        if job.state == "expired":
            late = job.finished_at is not None and job.finished_at >= job.deadline - 0.01
            # Its next try would have come too late.
            return (
                None if late or job.error not in {None, "expired"} else "its deadline was to come"
            )
        return self._why_no_failure(job, ask)

    def _why_no_failure(self, job: JobRow, ask: Ask) -> str | None:
        limits, code = self._evidence.limits, job.error
        tried = job.attempt > limits.retry_attempts or job.calls >= limits.max_calls
        allowed = {
            "poison": job.crashes >= limits.max_crashes,
            "max_calls": job.calls >= limits.max_calls,
            "unknown_outcome": ask.on_unknown == "fail" and job.unknown_calls > 0,
            "budget_exceeded": self._is_spent(ask),
        }
        if code in allowed:
            return None if allowed[code] else f"{code} without its reason"
        if ask.fate is Fate.REFUSED:
            return None
        if code in _TRIED_ENOUGH:
            return None if tried else f"gave up with {code} before it had tried enough"
        return f"failed with {code}"

    # -- calls -------------------------------------------------------------------------------

    def _calls_are_counted(self) -> Iterator[Violation]:
        by_text: dict[str, list[JobRow]] = collections.defaultdict(list)
        asks: dict[str, Ask] = {}
        for name, rows in self._by_name.items():
            entry = self._evidence.entries.get(name)
            if entry is not None:
                by_text[entry.ask.text] += rows
                asks[entry.ask.text] = entry.ask
        for text, rows in by_text.items():
            ask, seen = asks[text], self._evidence.calls.get(text, 0)
            if ask.memory_id is not None:
                continue  # what the provider sees is the whole conversation
            paid = seen - min(seen, FREE_CALLS.get(ask.fate, 0))
            counted = sum(row.calls for row in rows)
            if paid > counted:
                yield Violation(
                    kind="uncounted",
                    about=f"{paid} calls were made and {counted} counted: {ask}, {rows}",
                )
            known = counted - sum(row.unknown_calls for row in rows)
            # A try that reached nobody counts as a call, too: one of each deployment, at most.
            failed = sum(row.attempt - (row.state == "succeeded") for row in rows)
            if known > seen + 2 * failed:
                yield Violation(
                    kind="uncounted",
                    about=f"{known} calls are known, and {seen} were made: {ask}, {rows}",
                )
            if paid > self._evidence.limits.max_calls * len(rows):
                yield Violation(kind="uncounted", about=f"{paid} calls were made: {ask}, {rows}")
            if ask.on_unknown == "fail" and len(rows) == 1 and rows[0].unknown_calls > 1:
                yield Violation(kind="uncounted", about=f"was called again: {ask}, {rows}")

    def _calls_stop(self) -> Iterator[Violation]:
        """No call starts long after a cancellation, or after the deadline."""
        for cancel in self._evidence.cancels:
            job = self._jobs.get(cancel.job_id)
            entry = self._evidence.entries.get(job.name or "") if job else None
            if job is None or entry is None or entry.ask.twin or not cancel.effective:
                continue
            if entry.ask.service:
                continue  # a provider goes on with the lines that it has
            if job.fence == 0 and (job.state != "cancelled" or job.calls):
                yield Violation(kind="unexpected", about=f"cancelled before its claim: {job}")
            limit = cancel.answered_at + NO_CALL_AFTER_CANCEL_S
            yield from self._call_after(limit, entry.ask, job, "its cancellation")
        for job in self._evidence.jobs:
            entry = self._evidence.entries.get(job.name or "")
            if entry is not None and not entry.ask.twin and not entry.ask.service:
                limit = job.deadline - self._evidence.clock_offset
                yield from self._call_after(limit, entry.ask, job, "its deadline")

    def _call_after(self, limit: float, ask: Ask, job: JobRow, what: str) -> Iterator[Violation]:
        last = self._evidence.last_calls.get(ask.text)
        if last is None or last <= limit + SLACK_S:
            return
        # A process that is stopped between looking and calling can't look again.
        if any(begin < last and end > limit - SLACK_S for begin, end in self._evidence.pauses):
            self._excused["calls by a worker that had been stopped"] += 1
            return
        yield Violation(
            kind="unexpected", about=f"called {last - limit:.1f} s too long after {what}: {job}"
        )

    # -- batches, bounds, budgets, conversations ---------------------------------------------

    def _lines_are_sent_once(self) -> Iterator[Violation]:
        for name, times in self._evidence.batches.items():
            if times > 1:
                yield Violation(kind="doubled", about=f"the batch {name} was made {times} times")
        for line, times in self._evidence.lines.items():
            job_id, _, fence = line.partition("-")
            job = self._jobs.get(uuid.UUID(job_id))
            if times > 1:
                yield Violation(kind="doubled", about=f"the line {line} was sent {times} times")
            if job is None or job.fence < int(fence):
                yield Violation(kind="unexpected", about=f"{line} is the line of no claim: {job}")

    def _nobody_is_left_waiting(self) -> Iterator[Violation]:
        if self._evidence.parked:
            yield Violation(kind="unexpected", about=f"{self._evidence.parked} are still parked")

    def _bounds_hold(self) -> Iterator[Violation]:
        for one in self._evidence.exceeded:
            if any(at - 1 < one.at < at + AFTER_LOSS_S for at in self._evidence.losses):
                self._excused["bounds that were exceeded after Valkey's loss"] += 1
            else:
                yield Violation(kind="unexpected", about=f"a bound was exceeded: {one}")

    def _budget_holds(self) -> Iterator[Violation]:
        spent, hard = self._evidence.spent_usd, self._evidence.hard_usd
        if spent > hard + RESERVATION_USD:
            yield Violation(kind="unexpected", about=f"{spent} USD of {hard} were spent")

    def _is_spent(self, ask: Ask) -> bool:
        """True of a job for which the budget may have had no room."""
        is_metered = (ask.tenant, ask.model) == (SPENDER, METERED)
        return is_metered and self._evidence.spent_usd * 2 > self._evidence.hard_usd

    def _turns_are_whole(self) -> Iterator[Violation]:
        """Each answer of a conversation is remembered once, in the order of submission."""
        talks: dict[tuple[str, str], list[Turn]] = collections.defaultdict(list)
        for turn in self._evidence.turns:
            talks[turn.talk].append(turn)
        answered: dict[tuple[str, str], set[uuid.UUID]] = collections.defaultdict(set)
        for name, rows in self._by_name.items():
            entry = self._evidence.entries.get(name)
            if entry is not None and entry.ask.memory_id is not None:
                talk = (entry.ask.tenant, entry.ask.memory_id)
                answered[talk] |= {row.id for row in rows if row.state == "succeeded"}
        for talk in talks.keys() | answered.keys():
            jobs = [turn.job_id for turn in talks[talk]]
            if len(jobs) != len(set(jobs)) or [t.n for t in talks[talk]] != [
                *range(1, len(jobs) + 1)
            ]:
                yield Violation(kind="doubled", about=f"turns of {talk}: {talks[talk]}")
            if set(jobs) != answered[talk]:
                odd = set(jobs) ^ answered[talk]
                yield Violation(kind="lost", about=f"{talk} and its answers differ: {odd}")
            if jobs != sorted(jobs):
                yield Violation(kind="unexpected", about=f"{talk} is out of order: {jobs}")

    # -- the rest ----------------------------------------------------------------------------

    def _callbacks_arrive(self) -> Iterator[Violation]:
        if not self._evidence.calls_back:
            return
        heard: dict[uuid.UUID, list[Heard]] = collections.defaultdict(list)
        for one in self._evidence.heard:
            heard[one.job_id].append(one)
        for job in self._evidence.jobs:
            entry = self._evidence.entries.get(job.name or "")
            if entry is not None:
                wanted = entry.ask.calls_back is not None
                yield from _callback_trouble(job, heard.pop(job.id, []), wanted=wanted)
        for job_id, ones in heard.items():
            yield Violation(kind="callback", about=f"of a job that is not there, {job_id}: {ones}")

    def _prompts_stay_inside(self) -> Iterator[Violation]:
        for where in self._evidence.leaks:
            yield Violation(kind="leaked", about=where)
        for job in self._evidence.jobs:
            if job.leaks:
                yield Violation(kind="leaked", about=f"an error of job {job.id}")
        for oddity in self._evidence.oddities:
            yield Violation(kind="unexpected", about=oddity)


def judge(evidence: Evidence) -> Verdict:
    """What the evidence shows."""
    return Judge(evidence).verdict()


def listed(violations: Iterable[Violation]) -> Iterator[str]:
    """Some of them, for people: the first of each kind, and how many more there are."""
    by_kind: dict[str, list[Violation]] = collections.defaultdict(list)
    for violation in violations:
        by_kind[violation.kind].append(violation)
    for kind, ones in by_kind.items():
        yield from (f"{kind}: {one.about}" for one in ones[:MOST_LISTED])
        if len(ones) > MOST_LISTED:
            yield f"{kind}: and {len(ones) - MOST_LISTED} more"


def _why_no_success(job: JobRow, ask: Ask) -> str | None:
    if ask.fate in {Fate.REFUSED, Fate.BROKEN}:
        return "no call of it was ever answered in full"
    if ask.token not in (job.result_text or ""):
        return "the answer is not its own"
    return None


def _callback_trouble(job: JobRow, heard: Sequence[Heard], *, wanted: bool) -> Iterator[Violation]:
    if not wanted:
        if job.callbacks or heard:
            yield Violation(kind="callback", about=f"nobody asked for it: {job}")
        return
    if job.state not in FINAL:
        return  # told elsewhere
    if len(job.callbacks) != 1:
        yield Violation(kind="callback", about=f"has {len(job.callbacks)} callbacks: {job}")
        return
    ((callback_id, delivered, exhausted),) = job.callbacks
    message_ids = {one.message_id for one in heard}
    if not delivered and not exhausted:
        yield Violation(kind="callback", about=f"is neither delivered nor exhausted: {job}")
    if delivered and not heard:
        yield Violation(kind="callback", about=f"is said to be delivered, and was not: {job}")
    if message_ids - {f"msg_{callback_id.hex}"}:
        yield Violation(kind="callback", about=f"came under several ids, {message_ids}: {job}")
    if any(one.state != job.state for one in heard) or job.event != f"prompt.{job.state}":
        yield Violation(kind="callback", about=f"told another end, {heard}: {job}")
