"""The nemesis' judge finds what is wrong: each promise broken once, by doctored evidence."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from tests.faults.orders import METERED, SPENDER, Ask, Fate
from tests.faults.recorder import Cancel, Entry, Reading, Reply
from tests.faults.verdict import (
    Evidence,
    Heard,
    JobRow,
    Limits,
    Turn,
    Violation,
    judge,
    listed,
)
from tests.faults.witness import Changed, Exceeded

ID = uuid.UUID(int=1)
OTHER = uuid.UUID(int=2)
CALLBACK = uuid.UUID(int=3)
DEADLINE = 1_000.0
TEXT = "token-1-end hello"
ASK = Ask(
    name="1",
    text=TEXT,
    token="token-1-end",
    tier="basic",
    priority=5,
    deadline_s=75.0,
    fate=Fate.ANSWERED,
    calls_back="/hook/0",
)
JOB = JobRow(
    id=ID,
    name="1",
    state="succeeded",
    fence=1,
    attempt=1,
    deferrals=0,
    crashes=0,
    calls=1,
    unknown_calls=0,
    held=False,
    deadline=DEADLINE,
    finished_at=DEADLINE - 70,
    error=None,
    results=1,
    result_state="succeeded",
    result_text=f"Simulated answer to: {TEXT}",
    result_error=None,
    result_attempts=1,
    result_calls=1,
    paid=1,
    paid_unknown=0,
    callbacks=[(CALLBACK, True, False)],
    event="prompt.succeeded",
)
MESSAGE = Heard(message_id=f"msg_{CALLBACK.hex}", job_id=ID, state="succeeded")


LINE = f"{ID.hex}-1"
METERED_ASK = {"tenant": SPENDER, "model": METERED}
SPENT = {"spent_usd": Decimal("0.9"), "hard_usd": Decimal(1)}
TOO_MANY = Exceeded(at=500.0, of="a key", running=4, bound=3)
TALKING = dataclasses.replace(ASK, memory_id="talk")
TURN = Turn(talk=(ASK.tenant, "talk"), n=1, job_id=ID)


def job(**changes: Any) -> JobRow:
    """The job with changes; what is written twice is changed in both places."""
    twins = {"state": "result_state", "attempt": "result_attempts", "calls": "result_calls"}
    both = {twins[name]: value for name, value in changes.items() if name in twins}
    return dataclasses.replace(JOB, **{**both, **changes})


def evidence(ask: Ask = ASK, *jobs: JobRow, **changes: Any) -> Evidence:
    entry = Entry(ask=ask, ids={ID}, replies=[Reply.ACCEPTED])
    good = Evidence(
        limits=Limits(max_calls=6, retry_attempts=4),
        entries={"1": entry},
        jobs=jobs or (JOB,),
        calls={TEXT: 1},
        last_calls={TEXT: DEADLINE - 71},
        heard=[MESSAGE],
    )
    return dataclasses.replace(good, **changes)


def kinds(found: Evidence) -> set[str]:
    return {violation.kind for violation in judge(found).violations}


def ended(state: str, **changes: Any) -> Evidence:
    """A run whose job ended so, its callback included."""
    ask, run = dataclasses.replace(ASK, **changes.pop("ask", {})), changes.pop("run", {})
    done = job(state=state, event=f"prompt.{state}", **changes)
    return evidence(ask, done, heard=[dataclasses.replace(MESSAGE, state=state)], **run)


def cancel(**changes: Any) -> Cancel:
    good = Cancel(job_id=ID, asked_at=900.0, answered_at=900.1, effective=True)
    return dataclasses.replace(good, **changes)


def test_a_good_run_is_green() -> None:
    assert judge(evidence()).violations == []


GOOD: dict[str, Callable[[], Evidence]] = {
    "expired in time": lambda: ended("expired", finished_at=DEADLINE + 1, error="expired"),
    "its next try would come too late": lambda: ended("expired", error="http_500"),
    "tried enough": lambda: ended(
        "failed",
        attempt=5,
        fence=5,
        calls=5,
        paid=5,
        error="http_500",
        result_error="http_500",
        run={"calls": {TEXT: 1}},
    ),
    "poison": lambda: ended("failed", attempt=0, crashes=3, fence=6, error="poison"),
    "may not be repeated": lambda: ended(
        "failed",
        unknown_calls=1,
        paid_unknown=1,
        error="unknown_outcome",
        ask={"on_unknown": "fail"},
    ),
    "refused by the provider": lambda: ended(
        "failed", error="content_filter", ask={"fate": Fate.REFUSED}
    ),
    "called twice, and counted": lambda: evidence(
        ASK,
        job(attempt=1, crashes=1, fence=3, calls=2, unknown_calls=1, paid=2, paid_unknown=1),
        calls={TEXT: 2},
    ),
    "called by a worker that had been stopped": lambda: evidence(
        last_calls={TEXT: DEADLINE + 30}, pauses=[(DEADLINE - 5, DEADLINE + 31)]
    ),
    "an unknown submission that failed": lambda: evidence(
        entries={
            "1": Entry(ask=ASK, ids={ID}, replies=[Reply.ACCEPTED]),
            "2": Entry(ask=dataclasses.replace(ASK, name="2"), replies=[Reply.UNKNOWN]),
        }
    ),
    "an exhausted callback": lambda: evidence(
        ASK, job(callbacks=[(CALLBACK, False, True)]), heard=[]
    ),
    "taken back from a provider's batch": lambda: evidence(
        dataclasses.replace(ASK, service="batch"),
        job(fence=3, attempt=1, deferrals=1, calls=2, unknown_calls=1, paid=2, paid_unknown=1),
        calls={TEXT: 2},
        lines={LINE: 1},
        batches={"ours": 1},
    ),
    "a line that was answered late": lambda: evidence(
        dataclasses.replace(ASK, service="batch"), last_calls={TEXT: DEADLINE + 30}
    ),
    "a budget that is spent": lambda: ended(
        "failed", error="budget_exceeded", ask=METERED_ASK, run=SPENT
    ),
    "a bound that was exceeded when Valkey had lost its data": lambda: evidence(
        exceeded=[TOO_MANY], losses=[TOO_MANY.at - 3]
    ),
    "a turn that is remembered": lambda: evidence(TALKING, turns=[TURN]),
    "a bounded job that waited for a lost one's hold": lambda: evidence(
        dataclasses.replace(ASK, concurrency_key="a"), healed_at=DEADLINE - 131
    ),
    "a callback that came twice": lambda: evidence(heard=[MESSAGE, MESSAGE]),
}

BAD: dict[str, tuple[str, Callable[[], Evidence]]] = {
    "no row": ("lost", lambda: evidence(jobs=())),
    "not final": (
        "lost",
        lambda: evidence(ASK, job(state="running", finished_at=None, results=0)),
    ),
    "no result": ("lost", lambda: evidence(ASK, job(results=0))),
    "two results": ("doubled", lambda: evidence(ASK, job(results=2))),
    "two jobs": ("doubled", lambda: evidence(ASK, JOB, job(id=OTHER))),
    "two ids for a key": (
        "doubled",
        lambda: evidence(entries={"1": Entry(ask=ASK, ids={ID, OTHER}, replies=[Reply.ACCEPTED])}),
    ),
    "a changed row": (
        "doubled",
        lambda: evidence(changed=[Changed(job_id=ID, before="result 1 a", after="result 2 b")]),
    ),
    "another answer than a client had read": (
        "doubled",
        lambda: evidence(readings=[Reading(job_id=ID, state="succeeded", text="other")]),
    ),
    "state and row differ": ("unexpected", lambda: evidence(ASK, job(result_state="failed"))),
    "a refused submission exists": (
        "unexpected",
        lambda: evidence(entries={"1": Entry(ask=ASK, ids=set(), replies=[Reply.REFUSED])}),
    ),
    "nobody submitted it": ("unexpected", lambda: evidence(entries={})),
    "ended too late": ("unexpected", lambda: evidence(ASK, job(finished_at=DEADLINE + 61))),
    "stuck though all was well": ("unexpected", lambda: evidence(healed_at=DEADLINE - 131)),
    "somebody else's answer": (
        "unexpected",
        lambda: evidence(ASK, job(result_text="Simulated answer to: token-2-end")),
    ),
    "half an answer": (
        "unexpected",
        lambda: evidence(dataclasses.replace(ASK, fate=Fate.BROKEN), JOB),
    ),
    "nobody cancelled it": ("unexpected", lambda: ended("cancelled")),
    "expired too early": ("unexpected", lambda: ended("expired", error="expired")),
    "gave up too early": ("unexpected", lambda: ended("failed", error="http_500")),
    "a bug": ("unexpected", lambda: ended("failed", error="internal")),
    "poison without crashes": ("unexpected", lambda: ended("failed", error="poison")),
    "a claim that nothing tells of": ("unexpected", lambda: evidence(ASK, job(fence=2))),
    "a call that is not in the ledger": ("unexpected", lambda: evidence(ASK, job(paid=0))),
    "more than max_calls": ("unexpected", lambda: evidence(ASK, job(calls=7, paid=7))),
    "still held": ("unexpected", lambda: evidence(ASK, job(held=True))),
    "a line that was sent twice": ("doubled", lambda: evidence(lines={LINE: 2})),
    "a batch that was made twice": ("doubled", lambda: evidence(batches={"ours": 2})),
    "a line of no claim": ("unexpected", lambda: evidence(lines={f"{ID.hex}-2": 1})),
    "taken back though no batch had it": (
        "unexpected",
        lambda: evidence(ASK, job(fence=3, attempt=1, deferrals=1)),
    ),
    "a known call that nobody made": ("uncounted", lambda: evidence(calls={TEXT: 0})),
    "a doorbell that is still parked": ("unexpected", lambda: evidence(parked=1)),
    "a bound that was exceeded": ("unexpected", lambda: evidence(exceeded=[TOO_MANY])),
    "a bound that was exceeded long after a loss": (
        "unexpected",
        lambda: evidence(exceeded=[TOO_MANY], losses=[TOO_MANY.at - 31]),
    ),
    "more than the budget": (
        "unexpected",
        lambda: evidence(spent_usd=Decimal("1.01"), hard_usd=Decimal(1)),
    ),
    "a budget that stops others": (
        "unexpected",
        lambda: ended("failed", error="budget_exceeded", run=SPENT),
    ),
    "a budget that stops while it is not spent": (
        "unexpected",
        lambda: ended("failed", error="budget_exceeded", ask=METERED_ASK),
    ),
    "a turn that is not remembered": ("lost", lambda: evidence(TALKING)),
    "a turn that is remembered twice": (
        "doubled",
        lambda: evidence(TALKING, turns=[TURN, dataclasses.replace(TURN, n=2)]),
    ),
    "a turn of a job that was not answered": (
        "lost",
        lambda: evidence(
            dataclasses.replace(TALKING, fate=Fate.REFUSED),
            job(state="failed", error="content_filter", event="prompt.failed"),
            turns=[TURN],
        ),
    ),
    "turns out of order": (
        "unexpected",
        lambda: evidence(
            TALKING,
            turns=[dataclasses.replace(TURN, job_id=OTHER), dataclasses.replace(TURN, n=2)],
        ),
    ),
    "a call that nobody counted": ("uncounted", lambda: evidence(calls={TEXT: 2})),
    "called again though it must not be": (
        "uncounted",
        lambda: evidence(
            dataclasses.replace(ASK, on_unknown="fail"),
            job(calls=2, paid=2, unknown_calls=2, paid_unknown=2),
            calls={TEXT: 2},
        ),
    ),
    "called after its cancellation": (
        "unexpected",
        lambda: evidence(cancels=[cancel()], last_calls={TEXT: 907.0}),
    ),
    "answered though it was cancelled before its claim": (
        "unexpected",
        lambda: evidence(ASK, job(fence=0), cancels=[cancel()]),
    ),
    "called after its deadline": (
        "unexpected",
        lambda: evidence(last_calls={TEXT: DEADLINE + 2}),
    ),
    "no callback": ("callback", lambda: evidence(ASK, job(callbacks=[]), heard=[])),
    "two callbacks": (
        "callback",
        lambda: evidence(ASK, job(callbacks=[(CALLBACK, True, False), (OTHER, True, False)])),
    ),
    "a callback that is forgotten": (
        "callback",
        lambda: evidence(ASK, job(callbacks=[(CALLBACK, False, False)])),
    ),
    "a callback that never came": ("callback", lambda: evidence(heard=[])),
    "a callback under two ids": (
        "callback",
        lambda: evidence(heard=[MESSAGE, dataclasses.replace(MESSAGE, message_id="msg_other")]),
    ),
    "a callback of another end": (
        "callback",
        lambda: evidence(heard=[dataclasses.replace(MESSAGE, state="failed")]),
    ),
    "a callback that nobody asked for": (
        "callback",
        lambda: evidence(dataclasses.replace(ASK, calls_back=None)),
    ),
    "a prompt in a log": ("leaked", lambda: evidence(leaks=["the log workers.log"])),
    "a prompt in an error": ("leaked", lambda: evidence(ASK, job(leaks=True))),
    "an error that no producer should get": (
        "unexpected",
        lambda: evidence(oddities=["a producer got KeyError"]),
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_faults_may_lead_to_is_no_violation(case: str) -> None:
    assert judge(GOOD[case]()).violations == []


@pytest.mark.parametrize("case", BAD)
def test_a_broken_promise_is_found(case: str) -> None:
    kind, make = BAD[case]
    assert kinds(make()) >= {kind}


def test_what_a_stopped_worker_called_is_excused_by_name() -> None:
    found = judge(GOOD["called by a worker that had been stopped"]())
    assert found.excused == {"calls by a worker that had been stopped": 1}


def test_a_report_shows_the_first_of_each_kind() -> None:
    lines = list(listed([Violation(kind="lost", about=str(n)) for n in range(20)]))
    assert lines[0] == "lost: 0"
    assert lines[-1] == "lost: and 8 more"
