"""Conversations in the database: whose turn it is, and that a turn is added exactly once."""

from __future__ import annotations

import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from tests.rows import change, claim_one, claim_some, insert, outcome, spec

from promptfleet_shared.jobs import (
    ClaimedJob,
    Conversation,
    JobError,
    JobSpec,
    JobState,
    Release,
    TurnTaken,
)
from promptfleet_shared.store.claims import release
from promptfleet_shared.store.conversations import (
    Ask,
    NewSummary,
    Recollection,
    delete_conversation,
    prune_conversations,
    read_conversation,
    summarise_conversations,
    take_conversations,
)
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.sweeping import sweep


def turn_of(memory_id: str, text: str = "hello", **fields: Any) -> JobSpec:
    return spec(text, policy={"memory_id": memory_id}, **fields)


def take(database: sa.Engine, *jobs: ClaimedJob, max_bytes: int = 10**6) -> dict[Any, Recollection]:
    asks = [Ask(j.id, j.fence, j.tenant, j.policy["memory_id"], max_bytes) for j in jobs]
    with database.begin() as connection:
        return take_conversations(connection, asks)


def end(database: sa.Engine, job: ClaimedJob, said: str = "hello", **fields: Any) -> bool:
    """End a job whose turn says `said` and has the answer `said!`."""
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said}!"}]
    turn = TurnTaken(job.policy["memory_id"], orjson.dumps(messages))
    with database.begin() as connection:
        return finish(connection, [outcome(job, turn=turn, **fields)]) == {job.id}


def read(database: sa.Engine, memory_id: str, tenant: str = "default") -> Conversation | None:
    with database.begin() as connection:
        return read_conversation(connection, memory_id, tenant=tenant)


def texts(conversation: Conversation | None) -> list[str]:
    assert conversation is not None
    return [message["content"] for message in conversation.messages]


def taken(database: sa.Engine, memory_id: str, text: str = "hello") -> ClaimedJob:
    """A claimed job that holds its conversation."""
    job = turn_of(memory_id, text)
    insert(database, job)
    claimed = claim_one(database, job.id)
    assert claimed.id in take(database, claimed)
    return claimed


def test_turns_are_remembered_in_order(database: sa.Engine) -> None:
    for text in ("one", "two", "three"):
        assert end(database, taken(database, "chat", text), text)

    found = read(database, "chat")

    assert texts(found) == ["one", "one!", "two", "two!", "three", "three!"]
    assert found is not None
    assert [turn.number for turn in found.turns] == [1, 2, 3]
    assert found.turns[0].created_at <= found.updated_at


def test_the_next_job_is_told_what_was_said(database: sa.Engine) -> None:
    end(database, taken(database, "chat", "one"), "one")
    job = turn_of("chat", "two")
    insert(database, job)

    (recollection,) = take(database, claim_one(database, job.id)).values()

    assert recollection.turns == 1
    (said,) = orjson.loads(recollection.said)
    assert said[0] == 1
    assert [message["content"] for message in said[1]] == ["one", "one!"]


def test_only_the_newest_turns_are_read(database: sa.Engine) -> None:
    for n in range(5):
        end(database, taken(database, "chat"), f"turn {n}")
    job = turn_of("chat")
    insert(database, job)
    (recollection,) = take(database, claim_one(database, job.id), max_bytes=100).values()
    assert [n for n, _ in orjson.loads(recollection.said)] == [4, 5]


def test_turns_are_taken_in_the_order_of_submission(database: sa.Engine) -> None:
    first, second, third = (turn_of("chat") for _ in range(3))
    insert(database, first, second, third)
    claims = [claim_one(database, job.id) for job in (third, first, second)]

    assert list(take(database, *claims)) == [first.id]  # asked for in one statement
    assert list(take(database, claims[0])) == []
    end(database, claims[1])
    assert list(take(database, claims[0], claims[2])) == [second.id]


def test_a_job_that_was_committed_late_waits_for_who_holds(database: sa.Engine) -> None:
    late = turn_of("chat")  # its id is the smaller one
    holder = taken(database, "chat")
    insert(database, late)
    claimed = claim_one(database, late.id)

    assert take(database, claimed) == {}
    end(database, holder)
    assert list(take(database, claimed)) == [late.id]


def test_a_failed_turn_is_not_remembered_and_blocks_nobody(database: sa.Engine) -> None:
    failing = taken(database, "chat")
    with database.begin() as connection:
        error = JobError(code="x", message="x")
        assert finish(connection, [outcome(failing, state=JobState.FAILED, error=error)])
    end(database, taken(database, "chat", "next"), "next")
    assert texts(read(database, "chat")) == ["next", "next!"]


def test_who_is_given_back_holds_no_more(database: sa.Engine) -> None:
    first = taken(database, "chat")
    with database.begin() as connection:
        release(connection, [Release(job_id=first.id, fence=first.fence)])
    second = turn_of("chat")
    insert(database, second)
    claimed = claim_one(database, second.id)
    assert take(database, claimed) == {}  # the first one is still to be answered first

    change(database, first.id, state="'cancelled'", finished_at="clock_timestamp()")
    assert list(take(database, claimed)) == [second.id]


def test_a_lost_claim_holds_no_more_and_its_late_end_adds_nothing(database: sa.Engine) -> None:
    job = turn_of("chat")
    insert(database, job)
    lost = claim_one(database, job.id)
    take(database, lost)
    change(database, job.id, lease_until="clock_timestamp()", sweep_at="clock_timestamp()")
    with database.begin() as connection:
        assert sweep(connection).verdicts == {"lost": 1}
    again = claim_one(database, job.id)
    assert list(take(database, again)) == [job.id]

    assert end(database, again, "mine")
    assert not end(database, lost, "a zombie's")
    assert texts(read(database, "chat")) == ["mine", "mine!"]


def test_a_repeated_take_is_the_same(database: sa.Engine) -> None:
    """The reply of the first one may have been lost."""
    job = taken(database, "chat")
    assert list(take(database, job)) == [job.id]


def test_takes_at_the_same_time_let_one_through(database: sa.Engine) -> None:
    """The second statement begins before the first one has committed."""
    first, second = turn_of("chat"), turn_of("chat")
    insert(database, second)
    later = claim_one(database, second.id)
    end(database, taken(database, "other"))
    with database.connect() as one, database.connect() as two:
        two.execute(sa.text("SET statement_timeout = '5s'"))
        insert(database, first)
        earlier = claim_one(database, first.id)
        assert take_conversations(one, [Ask(earlier.id, earlier.fence, "default", "chat", 9)])
        one.commit()
        assert not take_conversations(two, [Ask(later.id, later.fence, "default", "chat", 9)])
        two.commit()


class Racer:
    """Workers that claim, take, end and give back at random, all at the same few conversations."""

    def __init__(self, database: sa.Engine, jobs: list[JobSpec]) -> None:
        self.database = database
        self.left = {job.id for job in jobs}
        self.holders: dict[str, int] = {}
        self.mistakes: list[str] = []
        self.lock = threading.Lock()

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while self.left and not self.mistakes:
            with self.lock:
                wanted = rng.sample(sorted(self.left), min(6, len(self.left)))
            claims = claim_some(self.database, wanted)
            if claims:
                self.work(claims, rng)

    def work(self, claims: list[ClaimedJob], rng: random.Random) -> None:
        told = take(self.database, *claims)
        held = [job for job in claims if job.id in told]
        for job in held:
            self.check(job, told[job.id])
        ending = [job for job in held if rng.random() < 0.7]
        with self.lock:
            for job in held:
                self.holders[job.policy["memory_id"]] -= 1
        for job in ending:
            assert end(self.database, job, text_of(job))
        with self.database.begin() as connection:
            given = [j for j in claims if j not in ending]
            release(connection, [Release(job_id=j.id, fence=j.fence, counts=False) for j in given])
        with self.lock:
            self.left -= {job.id for job in ending}

    def check(self, job: ClaimedJob, told: Recollection) -> None:
        memory_id = job.policy["memory_id"]
        with self.lock:
            self.holders[memory_id] = self.holders.get(memory_id, 0) + 1
            if self.holders[memory_id] > 1:
                self.mistakes.append(f"two hold {memory_id}")
            if told.turns != int(text_of(job)):
                self.mistakes.append(f"turn {text_of(job)} of {memory_id} after {told.turns}")


def text_of(job: ClaimedJob) -> str:
    text: str = orjson.loads(job.request)["messages"][0]["content"]
    return text


def test_whoever_races_for_conversations_each_turn_comes_once_and_in_order(
    database: sa.Engine,
) -> None:
    chats = ("a", "b", "c")
    jobs = [turn_of(chat, f"{n}") for n in range(8) for chat in chats]
    insert(database, *jobs)
    racer = Racer(database, jobs)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(racer.run, range(4)))

    assert racer.mistakes == []
    for chat in chats:
        found = read(database, chat)
        assert texts(found)[::2] == [f"{n}" for n in range(8)]


def test_a_row_that_somebody_has_locked_is_passed_over(database: sa.Engine) -> None:
    end(database, taken(database, "chat"))
    job = turn_of("chat")
    insert(database, job)
    claimed = claim_one(database, job.id)
    with database.begin() as other:
        other.execute(sa.text("SELECT * FROM conversations FOR UPDATE"))
        with database.begin() as connection:
            connection.execute(sa.text("SET LOCAL statement_timeout = '10s'"))  # else it would hang
            ask = Ask(claimed.id, claimed.fence, claimed.tenant, "chat", 10**6)
            assert take_conversations(connection, [ask]) == {}
    assert list(take(database, claimed)) == [job.id]


def test_a_conversation_is_its_tenants(database: sa.Engine) -> None:
    end(database, taken(database, "chat"))
    job = turn_of("chat", tenant="other")
    insert(database, job)
    (recollection,) = take(database, claim_one(database, job.id)).values()
    assert (recollection.turns, recollection.said) == (0, "[]")
    assert read(database, "chat", "nobody") is None
    with database.begin() as connection:
        assert not delete_conversation(connection, "chat", tenant="nobody")
    assert read(database, "chat") is not None


def test_forgetting_takes_all_and_a_job_under_way_adds_nothing(database: sa.Engine) -> None:
    end(database, taken(database, "chat", "one"), "one")
    under_way = taken(database, "chat", "two")
    with database.begin() as connection:
        assert delete_conversation(connection, "chat", tenant="default")

    assert end(database, under_way, "two")
    assert read(database, "chat") is None
    end(database, taken(database, "chat", "three"), "three")
    assert texts(read(database, "chat")) == ["three", "three!"]


def test_what_was_forgotten_does_not_come_back_into_the_next_one(database: sa.Engine) -> None:
    under_way = taken(database, "chat", "secret")
    with database.begin() as connection:
        assert delete_conversation(connection, "chat", tenant="default")
    change(database, under_way.id, state="'queued'")  # given back; the next one is let through
    change(database, under_way.id, policy="'{}'")
    end(database, taken(database, "chat", "new"), "new")
    change(database, under_way.id, state="'running'")

    assert end(database, under_way, "secret")
    assert texts(read(database, "chat")) == ["new", "new!"]


def test_a_summary_is_kept_while_its_job_holds(database: sa.Engine) -> None:
    for n in range(3):
        end(database, taken(database, "chat"), f"{n}")
    holder = taken(database, "chat")

    def keep(job_id: uuid.UUID, text: str, known: int) -> int:
        summary = NewSummary(job_id, "default", "chat", text, known, 2)
        with database.begin() as connection:
            return summarise_conversations(connection, [summary])

    assert keep(uuid.uuid4(), "a stranger's", 0) == 0
    assert keep(holder.id, "two turns\0", 0) == 1
    assert keep(holder.id, "once more", 0) == 0
    (recollection,) = take(database, holder).values()
    assert (recollection.summary, recollection.summarised) == ("two turns\ufffd", 2)
    assert [n for n, _ in orjson.loads(recollection.said)] == [3]


def test_jobs_without_a_conversation_pay_nothing(database: sa.Engine) -> None:
    """Neither of the statements touches what they have no use for."""
    plain = spec()
    insert(database, plain)
    with database.begin() as connection:
        connection.execute(sa.text("DROP TABLE conversations, conversation_turns"))
    claimed = claim_one(database, plain.id)
    with database.begin() as connection:
        assert finish(connection, [outcome(claimed)]) == {plain.id}


@pytest.mark.parametrize("busy", [False, True])
def test_old_conversations_are_pruned(database: sa.Engine, busy: bool) -> None:
    end(database, taken(database, "old"))
    end(database, taken(database, "new"))
    if busy:
        insert(database, turn_of("old"))
    with database.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE conversations SET updated_at = updated_at - interval '1 h'"
                " WHERE memory_id = 'old'"
            )
        )
        assert prune_conversations(connection, age_s=1800) == (0 if busy else 1)
    assert (read(database, "old") is not None) == busy
    assert read(database, "new") is not None
    with database.begin() as connection:
        left = connection.execute(sa.text("SELECT count(*) FROM conversation_turns")).scalar_one()
    assert left == (2 if busy else 1)
