"""Endless bodies cut into items, wherever the network cuts them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfleet.api.bodies import BodyMemory, check_structure, parse_json
from promptfleet.api.errors import ApiError
from promptfleet.api.splitting import ArraySplitter, Item, LineSplitter, Splitter
from promptfleet_shared.errors import InvalidRequestError

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab"\\[]{},\n\u00e9', max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def cut(splitter: Splitter, body: bytes, cuts: list[int]) -> list[Item]:
    places = [0, *sorted(min(place, len(body)) for place in cuts), len(body)]
    items: list[Item] = []
    for start, stop in itertools.pairwise(places):
        items += splitter.feed(body[start:stop])
    return [*items, *splitter.end()]


@settings(max_examples=200, deadline=None)
@given(st.lists(values, max_size=5), st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_arrays_are_read_as_a_parser_reads_them(
    elements: list[object], cuts: list[int], indent: bool
) -> None:
    body = orjson.dumps(elements, option=orjson.OPT_INDENT_2 if indent else None)

    for places in (cuts, list(range(len(body)))):  # the latter is byte by byte
        items = cut(ArraySplitter(max_bytes=10_000), b" \n" + body + b"\n", places)
        assert [orjson.loads(item.text) for item in items] == elements
        assert [item.index for item in items] == list(range(len(elements)))


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=5), st.lists(st.integers(0, 40), max_size=8))
def test_lines_are_read_wherever_they_are_cut(elements: list[object], cuts: list[int]) -> None:
    body = b"\r\n\n".join(orjson.dumps(element) for element in elements)

    items = cut(LineSplitter(max_bytes=10_000), body, cuts)

    assert [orjson.loads(item.text) for item in items] == elements


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"[1",
        b'["a]',
        b"[1,]",
        b"[,1]",
        b"[1,,2]",
        b"[1]]",
        b"[1] 2",
        b"[1][2]",
        b"{}",
        b"[1}",
    ],
)
def test_what_is_no_array(body: bytes) -> None:
    for size in (1, 2, len(body) or 1):
        with pytest.raises(ApiError) as raised:
            cut(ArraySplitter(max_bytes=100), body, list(range(0, len(body), size)))
        assert raised.value.error_code == "invalid_json"


@pytest.mark.parametrize(
    ("make", "body"),
    [
        (LineSplitter, b'1\n"' + b"x" * 50 + b'"\n2\n'),
        (ArraySplitter, b'[1,"' + b"x" * 50 + b'",2]'),
    ],
)
def test_an_item_that_is_too_large_costs_only_itself(
    make: Callable[..., Splitter], body: bytes
) -> None:
    for size in (1, 7, len(body)):
        items = cut(make(max_bytes=20), body, list(range(0, len(body), size)))
        assert [(item.index, item.text) for item in items] == [(0, b"1"), (1, b""), (2, b"2")]
        assert items[1].error is not None
        assert items[1].error.status == 413


def test_an_element_that_is_too_deep_ends_the_array() -> None:
    deep = b"[" * 128 + b"]" * 128
    assert len(cut(ArraySplitter(max_bytes=1_000), b"[" + deep + b"]", [])) == 1
    with pytest.raises(ApiError, match="128"):
        cut(ArraySplitter(max_bytes=1_000), b"[[" + deep + b"]]", [])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"[" * 129 + b"]" * 129, "too_deep"),
        (b'{"a":' * 129 + b"1" + b"}" * 129, "too_deep"),
        (b"[" + b"0," * 1_000_001 + b"0]", "too_many_values"),
        (b"[" * 10_000, "too_deep"),
    ],
)
def test_what_would_cost_too_much_to_parse(text: bytes, code: str) -> None:
    with pytest.raises(ApiError) as raised:
        check_structure(text)
    assert raised.value.error_code == code


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 128 + b"]" * 128,
        b'"' + b"[" * 1_000 + b'"',
        b'["\\"' + b"[{" * 500 + b'"]',
        b'"' + b'\\"' * 600_000 + b'"',  # no search begins anew at each of its quotes
        b'"' + b'\\"[' * 600_000,
        b"[" + b"[]," * 300_000 + b"1]",
    ],
)
def test_what_costs_little(text: bytes) -> None:
    check_structure(text)


def test_errors_show_nothing_of_the_text() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_json(b'{"prompt": "secret words" oops}')
    assert "secret" not in str(raised.value)
    assert "oops" not in str(raised.value)


def test_bodies_share_their_memory() -> None:
    memory = BodyMemory(100)
    with memory.share() as first, memory.share() as second:
        first.grow(60)
        with pytest.raises(ApiError) as raised:
            second.grow(41)
        second.grow(40)
    assert raised.value.status == 503
    memory.take(100)
