"""Readers of token streams: whatever is lost, doubled or late, they end with the whole text."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet.transcripts import Reader, Transcript
from promptfleet_shared.jobs import NO_USAGE, CacheStatus, JobState, Result
from promptfleet_shared.token_stream import Entry, EventKind, Position, StreamEvent, Take

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def result(text: str | None, state: JobState = JobState.SUCCEEDED) -> Result:
    return Result(
        job_id=uuid.UUID(int=1),
        state=state,
        tier="basic",
        text=text,
        response=None,
        finish_reason=None,
        error=None,
        model=None,
        provider=None,
        deployment=None,
        usage=NO_USAGE,
        cost_usd=None,
        cache=CacheStatus.OFF,
        attempts=1,
        calls=1,
        batch_id=None,
        batch_size=1,
        queued_ms=0,
        provider_ms=None,
        total_ms=0,
        metadata={},
        created_at=NOW,
        finished_at=NOW,
    )


def entry(text: str, at: int, fence: int = 1, call: int = 1) -> Entry:
    return Entry(take=Take(fence, call), at=at, text=text)


class Screen:
    """What a client shows that obeys the events."""

    def __init__(self) -> None:
        self.text = ""
        self.last_id: str | None = None
        self.kinds: list[EventKind] = []

    def show(self, events: list[StreamEvent]) -> None:
        for event in events:
            self.last_id = event.id
            self.kinds.append(event.kind)
            self.text = "" if event.kind is EventKind.RESET else self.text + event.text


def shown(*entries: Entry, screen: Screen | None = None) -> tuple[Screen, Reader, Transcript]:
    transcript, reader, screen = Transcript(), Reader(), screen or Screen()
    for each in entries:
        transcript.add(each)
        screen.show(reader.read(transcript))
    return screen, reader, transcript


def test_pieces_come_as_they_are() -> None:
    screen, reader, _ = shown(entry("Hel", 0), entry("lo", 3))

    screen.show(reader.settle(result("Hello")))

    assert screen.text == "Hello"
    assert screen.kinds == [EventKind.TOKEN, EventKind.TOKEN, EventKind.END]


def test_what_was_written_twice_is_seen_once() -> None:
    screen, _, _ = shown(entry("Hel", 0), entry("Hel", 0), entry("ello", 1))

    assert screen.text == "Hello"


def test_after_a_gap_the_rest_comes_with_the_result() -> None:
    screen, reader, _ = shown(entry("Hel", 0), entry("wor", 6), entry("ld", 9))
    assert screen.text == "Hel"

    screen.show(reader.settle(result("Hello world")))

    assert screen.text == "Hello world"
    assert EventKind.RESET not in screen.kinds


def test_a_new_take_resets_with_its_first_text_and_not_before() -> None:
    screen, reader, transcript = shown(entry("Hal", 0))
    transcript.add(entry("", 0, fence=2))
    screen.show(reader.read(transcript))
    assert screen.text == "Hal"

    transcript.add(entry("Hello", 0, fence=2))
    screen.show(reader.read(transcript))

    assert screen.text == "Hello"
    assert screen.kinds == [EventKind.TOKEN, EventKind.RESET, EventKind.TOKEN]


def test_a_zombies_text_is_not_mixed_in() -> None:
    screen, _, _ = shown(
        entry("Hel", 0, fence=2), entry("!!!", 3, fence=1), entry("lo", 3, fence=2)
    )

    assert screen.text == "Hello"


def test_another_text_than_was_shown_resets() -> None:
    screen, reader, _ = shown(entry("Hal", 0))

    screen.show(reader.settle(result("Hello")))

    assert screen.text == "Hello"
    assert screen.kinds == [EventKind.TOKEN, EventKind.RESET, EventKind.TOKEN, EventKind.END]


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
def test_what_was_shown_of_a_failure_stays(state: JobState) -> None:
    screen, reader, _ = shown(entry("Hal", 0))

    screen.show(reader.settle(result(None, state)))

    assert screen.text == "Hal"
    assert screen.kinds[-1] is EventKind.END


def test_a_reader_goes_on_elsewhere_with_nothing_but_the_result() -> None:
    screen, _, _ = shown(entry("Hel", 0))

    screen.show(Reader(screen.last_id).settle(result("Hello")))

    assert screen.text == "Hello"


def test_a_reader_goes_on_in_another_transcript() -> None:
    screen, _, transcript = shown(entry("Hel", 0))
    transcript.add(entry("lo", 3))

    screen.show(Reader(screen.last_id).read(transcript))

    assert screen.text == "Hello"


def test_a_reader_who_comes_back_to_a_new_take_drops_the_old_one() -> None:
    screen, _, _ = shown(entry("Hal", 0))
    _, _, transcript = shown(entry("Hello", 0, fence=2))

    screen.show(Reader(screen.last_id).read(transcript))

    assert screen.text == "Hello"


@pytest.mark.parametrize("after", ["", "nonsense", "1-1-3", "1-1-3-zz", "9" * 40 + "-1-1-1"])
def test_with_an_unknown_id_all_comes_again(after: str) -> None:
    _, _, transcript = shown(entry("Hello", 0))
    screen = Screen()
    screen.text = "something"

    screen.show(Reader(after).read(transcript))

    assert screen.text == "Hello"


def test_a_position_is_the_same_after_its_text() -> None:
    position = Position(take=Take(3, 2)).after("Grüße, ").after("\N{GRINNING FACE}")

    assert Position.parse(str(position)) == position
    assert position.at == 8


def test_fields_of_another_release_are_no_entry() -> None:
    fields = {b"f": b"1", b"c": b"2", b"a": b"3", b"t": b"x", b"s": b""}

    assert Entry.of(fields) == Entry(take=Take(1, 2), at=3, text="x")
    assert Entry.of({**fields, b"s": b"odd"}) is None
    assert Entry.of({}) is None


@dataclasses.dataclass(frozen=True)
class Run:
    """A take's text, and how it was cut into entries."""

    text: str
    cuts: list[int]


takes = st.builds(
    Run,
    text=st.text(alphabet="ab\N{GRINNING FACE}\0", min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 4), max_size=6),
)


@given(st.lists(takes, min_size=1, max_size=3), st.data())
def test_any_client_ends_with_the_whole_text(runs: list[Run], data: st.DataObject) -> None:
    """Entries get lost, are doubled and come late; the client is cut off and comes back."""
    stream = []
    for fence, run in enumerate(runs, 1):
        at = 0
        for cut in [*run.cuts, len(run.text)]:
            piece = run.text[at : at + cut]
            stream.append(entry(piece, at, fence))
            at += len(piece)
    screen, transcript, reader = Screen(), Transcript(), Reader()
    for each in stream:
        for _ in range(data.draw(st.integers(0, 2), label="copies")):
            transcript.add(each)
        match data.draw(st.sampled_from(["read", "idle", "move", "late"]), label="then"):
            case "read":
                screen.show(reader.read(transcript))
            case "move":
                reader = Reader(screen.last_id)
            case "late":
                transcript.add(data.draw(st.sampled_from(stream[: stream.index(each) + 1])))
            case _:
                pass

    screen.show(reader.settle(result(runs[-1].text)))

    assert screen.text == runs[-1].text
    assert screen.kinds[-1] is EventKind.END
    again = Screen()
    again.show(Reader(screen.last_id).settle(result(runs[-1].text)))
    assert again.kinds == [EventKind.END]
