"""`tokens()` and `stream()` without servers."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from promptfleet import (
    AsyncClient,
    Client,
    InvalidRequestError,
    JobExpiredError,
    JobFailedError,
    JobNotFoundError,
    PromptFleetError,
    Result,
    Token,
    WaitTimeoutError,
    enqueue_prompt,
)
from promptfleet.backends import Lookup
from promptfleet.streaming import Tokens, follow
from promptfleet.testing import FakeFleet, fake_fleet
from promptfleet.transcripts import Transcript
from promptfleet.waiting import Watch
from promptfleet_shared.jobs import JobState
from promptfleet_shared.token_stream import Entry, Take


@pytest.fixture
def fleet() -> Iterator[FakeFleet]:
    with fake_fleet("Four words  are\nhere.") as running:
        yield running


def test_a_streamed_answer_comes_in_words(fleet: FakeFleet) -> None:
    job = enqueue_prompt("Say them.", stream=True)

    tokens = list(job.tokens())

    assert tokens == ["Four ", "words  ", "are\n", "here."]
    assert not any(token.restarts for token in tokens)
    assert fleet.enqueued[0].stream


def test_without_stream_it_comes_once(fleet: FakeFleet) -> None:
    assert list(enqueue_prompt("Say them.").tokens()) == ["Four words  are\nhere."]
    assert not fleet.enqueued[0].stream


async def test_asynchronously(fleet: FakeFleet) -> None:
    async with AsyncClient() as client:
        job = await client.enqueue_prompt("Say them.", stream=True)

        assert len([token async for token in job.tokens()]) == 4


def test_a_reader_waits_for_an_answer_that_comes_later(fleet: FakeFleet) -> None:
    """It looks again and again, and not only at the end of its time."""
    fleet.answers = None
    job = enqueue_prompt("Say it.", stream=True)
    answering = threading.Timer(0.1, fleet.answer, (job, "It."))
    answering.start()

    began = time.monotonic()
    assert list(job.tokens(20)) == ["It."]
    assert time.monotonic() - began < 10
    answering.join()


def test_ends_raise_as_result_does(fleet: FakeFleet) -> None:
    fleet.answers = None
    failed, expired = enqueue_prompt("a", stream=True), enqueue_prompt("b", stream=True)
    fleet.fail(failed, code="no")
    fleet.expire(expired)

    with pytest.raises(JobFailedError):
        list(failed.tokens())
    with pytest.raises(JobExpiredError):
        list(expired.tokens())
    with pytest.raises(WaitTimeoutError):
        list(enqueue_prompt("c", stream=True).tokens(0.02))
    with Client() as client, pytest.raises(JobNotFoundError):
        list(client.tokens(uuid.uuid4()))
    with pytest.raises(InvalidRequestError, match="timeout"):
        failed.tokens(-1)


def test_callbacks(fleet: FakeFleet) -> None:
    heard: list[Token] = []
    done: list[Result] = []
    job = enqueue_prompt("Say them.", stream=True)

    result = job.stream(on_token=heard.append, on_complete=done.append)

    assert result is not None
    assert done == [result]
    assert "".join(heard) == result.text
    assert job.stream() == result
    fleet.answers = None
    failed = enqueue_prompt("No.", stream=True)
    fleet.fail(failed)
    errors: list[PromptFleetError] = []
    assert failed.stream(on_complete=done.append, on_error=errors.append) is None
    assert [type(error) for error in errors] == [JobFailedError]
    assert len(done) == 1


def test_what_a_callback_raises_is_its_owners(fleet: FakeFleet) -> None:
    errors: list[PromptFleetError] = []

    def refuse(token: Token) -> None:
        raise InvalidRequestError(f"not {len(token)} characters")

    job = enqueue_prompt("Say them.", stream=True)
    with pytest.raises(InvalidRequestError, match="not 5 characters"):
        job.stream(on_token=refuse, on_error=errors.append)
    assert errors == []


async def test_callbacks_may_be_awaited(fleet: FakeFleet) -> None:
    heard: list[str] = []

    async def on_token(token: Token) -> None:
        heard.append(token)

    async with AsyncClient() as client:
        job = await client.enqueue_prompt("Say them.", stream=True)
        result = await job.stream(on_token=on_token, on_complete=lambda done: heard.append("!"))

    assert result is not None
    assert "".join(heard) == f"{result.text}!"


@pytest.mark.parametrize("value", ["yes", 1, []])
def test_stream_is_true_or_false(fleet: FakeFleet, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        enqueue_prompt("x", stream=value)  # type: ignore[arg-type]
    assert caught.value.field == "stream"


def test_vectors_have_no_tokens(fleet: FakeFleet) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        enqueue_prompt("x", kind="embedding", stream=True)
    assert caught.value.field == "stream"


class Scripted:
    """A backend whose job streams these entries, one a read; time goes on with each read."""

    def __init__(self, fleet: FakeFleet, entries: list[Entry], *, ends_after: int) -> None:
        self._fleet = fleet
        self._entries = iter(entries)
        self._ends_after = ends_after
        self._job = enqueue_prompt("x", stream=True)
        self.transcript = Transcript()
        self.now = 0.0
        self.looks = 0

    def events(self, timeout: float | None = None) -> Tokens:
        watch = Watch([self._job.id], timeout, clock=self.clock)
        return Tokens(follow(self, watch.pending[0], watch, self.clock))  # type: ignore[arg-type]

    def clock(self) -> float:
        return self.now

    def look_up(self, ids: list[uuid.UUID], *, with_states: bool) -> Lookup:
        self.looks += 1
        if self.looks > self._ends_after:
            return self._fleet.backend.look_up([self._job.id], with_states=with_states)
        return Lookup(results={}, states={self._job.id: JobState.RUNNING})

    def token_source(self, job_id: uuid.UUID) -> contextlib.AbstractContextManager[Scripted]:
        return contextlib.nullcontext(self)

    def read(self, wait_s: float) -> bool:
        entry = next(self._entries, None)
        if entry is None:
            self.now += wait_s
            return False
        self.now += min(wait_s, 0.001)
        self.transcript.add(entry)
        return True


def entry(text: str, at: int, fence: int = 1, state: JobState | None = None) -> Entry:
    return Entry(take=Take(fence, 1), at=at, text=text, state=state)


def test_a_second_try_restarts_and_the_end_of_the_stream_ends_the_waiting(
    fleet: FakeFleet,
) -> None:
    script = [
        entry("Five", 0),
        entry("Four ", 0, fence=2),
        entry("words  are\nhere.", 5, fence=2, state=JobState.SUCCEEDED),
    ]
    backend = Scripted(fleet, script, ends_after=1)

    tokens = list(backend.events())

    assert tokens == ["Five", "Four ", "words  are\nhere."]
    assert [token.restarts for token in tokens] == [False, True, False]
    assert backend.looks == 2
    assert backend.now < 1


def test_a_lost_piece_comes_with_the_result(fleet: FakeFleet) -> None:
    backend = Scripted(fleet, [entry("Four ", 0), entry("here.", 16)], ends_after=2)

    assert list(backend.events()) == ["Four ", "words  are\nhere."]


def test_while_tokens_come_looks_are_few(fleet: FakeFleet) -> None:
    script = [entry("x", n) for n in range(10_000)]
    backend = Scripted(fleet, script, ends_after=10)

    tokens = list(backend.events())

    assert tokens[-1].restarts  # the fake's answer is another one
    assert backend.looks == 11
    assert backend.now < 30


def test_a_timeout_is_kept_while_tokens_come(fleet: FakeFleet) -> None:
    script = [entry("x", n) for n in range(100_000)]
    backend = Scripted(fleet, script, ends_after=1_000_000)

    with pytest.raises(WaitTimeoutError):
        list(backend.events(5.0))

    assert 5 <= backend.now < 8
