"""Event streams, as the WHATWG defines them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promptfleet_shared.errors import ProviderError
from promptfleet_workers.providers.sse import Event, EventStream


def events(*pieces: bytes) -> list[Event]:
    stream = EventStream()
    return [event for piece in pieces for event in stream.feed(piece)]


def datas(*pieces: bytes) -> list[bytes]:
    return [event.data for event in events(*pieces)]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_the_three_ends_of_a_line(end: bytes) -> None:
    stream = end.join([b"event: e", b"data: 1", b"data: 2", b"", b"data: 3", b"", b""])

    assert events(stream) == [Event(b"1\n2", b"e"), Event(b"3")]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # the standard's own examples
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),
        (b": test stream\n\ndata: first event\nid: 1\n\n", [b"first event"]),
        (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
        (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
        # and what else it says
        (b"data:  two spaces\n\n", [b" two spaces"]),
        (b"data: a:b: c\n\n", [b"a:b: c"]),
        (b"Data: x\nunknown: y\n data: z\n\n", []),
        (b"event: lonely\n\ndata: x\n\n", [b"x"]),
        (b"data: never ended\n", []),
        (b"\n\n\n", []),
        (b"", []),
        (b"\xef\xbb\xbfdata: after a BOM\n\n", [b"after a BOM"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: x\n\n", []),
        (b"\xef\xbbdata: x\n\n", []),
        (b"data: \xff\xfe\0\n\n", [b"\xff\xfe\0"]),
    ],
)
def test_data(stream: bytes, expected: list[bytes]) -> None:
    assert datas(stream) == expected


def test_a_name_holds_for_one_event() -> None:
    stream = b"event: a\ndata: 1\n\ndata: 2\n\nevent: b\n\ndata: 3\n\n"

    assert [event.name for event in events(stream)] == [b"a", b"", b""]


def test_an_id_stays_until_the_next_one() -> None:
    stream = b"id: 1\ndata\n\ndata\n\nid: a\0b\ndata\n\nid\ndata\n\n"

    assert [event.last_id for event in events(stream)] == [b"1", b"1", b"1", b""]


@pytest.mark.parametrize(
    ("line", "retry_ms"), [(b"retry: 1500", 1500), (b"retry: 1.5", None), (b"retry:", None)]
)
def test_the_time_to_reconnect_is_a_number(line: bytes, retry_ms: int | None) -> None:
    stream = EventStream()
    list(stream.feed(line + b"\n"))

    assert stream.retry_ms == retry_ms


@pytest.mark.parametrize(
    ("pieces", "pending"),
    [
        ([b"data: x\n\n"], b""),
        ([b"data: x\n\ndata: [DONE]\n"], b"[DONE]"),
        ([b"data: x\n\ndata: [DO", b"NE]"], b"[DONE]"),
        ([b"data: a\ndata: b"], b"a\nb"),
        ([b"data: a\n: comment"], b"a"),
    ],
)
def test_what_was_not_ended_is_there_for_who_wants_it(pieces: list[bytes], pending: bytes) -> None:
    stream = EventStream()
    for piece in pieces:
        list(stream.feed(piece))

    assert stream.pending == pending


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 100,
        b": a comment" + b"x" * 100,
        b"data: 0123456789\n" * 11,
        b"data:\n" * 200,
    ],
    ids=["one line", "a comment", "many lines", "empty lines"],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_event_has_a_cap(stream: bytes, size: int) -> None:
    reader = EventStream(max_event_bytes=100)

    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    with pytest.raises(ProviderError) as caught:
        _ = [event for piece in pieces for event in reader.feed(piece)]

    assert (caught.value.code, caught.value.unknown_outcome) == ("response_too_large", True)


def test_the_cap_is_an_events_and_not_the_streams() -> None:
    reader = EventStream(max_event_bytes=100)

    assert len([*reader.feed((b"data: " + b"x" * 90 + b"\n\n: " + b"y" * 90 + b"\n") * 50)]) == 50


FRAGMENTS = st.sampled_from(
    [b"data", b"event", b"id", b"retry", b":", b" ", b"\n", b"\r", b"\r\n", b"\xef\xbb\xbf", b"7"]
)
STREAMS = st.lists(FRAGMENTS | st.binary(max_size=4), max_size=60).map(b"".join)


@given(stream=STREAMS, cuts=st.sets(st.integers(0, 120)))
@example(stream=b"data: a\r\n\r\ndata: b\r\r", cuts={8, 10})
@example(stream=b"data: a\r\ndata: b\r\n\r\n", cuts={8})
@example(stream=b"\xef\xbb\xbfdata: a\n\n", cuts={1, 2})
def test_it_does_not_matter_how_a_stream_is_cut(stream: bytes, cuts: set[int]) -> None:
    whole, cut = EventStream(max_event_bytes=40), EventStream(max_event_bytes=40)

    found, is_capped = _all(whole, [stream])

    assert _all(cut, _pieces(stream, cuts)) == (found, is_capped)
    if not is_capped:
        assert (cut.pending, cut.retry_ms) == (whole.pending, whole.retry_ms)


def _pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    return [stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _all(reader: EventStream, pieces: list[bytes]) -> tuple[list[Event], bool]:
    """The events, and whether it ended at the cap."""
    found: list[Event] = []
    try:
        for piece in pieces:
            found.extend(reader.feed(piece))
    except ProviderError as error:
        assert error.code == "response_too_large"  # noqa: PT017 - either end is fine
        return found, True
    return found, False
