"""Keys and values of the response cache."""

from __future__ import annotations

import re
import struct
import zlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_workers.caching.keys import cache_key
from promptfleet_workers.caching.values import decode_completion, encode_completion
from promptfleet_workers.providers.protocol import Completion

counts = st.integers(0, 2**31 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]))
completions = st.builds(
    Completion,
    text=st.none() | texts,
    response=st.binary(),
    finish_reason=st.none() | texts,
    model=st.none() | texts,
    usage=st.builds(Usage, input=counts, cached=counts, output=counts, reasoning=counts),
)
parts = st.tuples(texts, texts, texts, st.sampled_from(JobKind), texts)

ANSWER = Completion(
    text="Four.",
    response=b'{"choices": [{"message": {"content": "Four."}}]}',
    finish_reason="stop",
    model="m",
    usage=Usage(input=1, cached=2, output=3, reasoning=4),
)


@given(completions)
def test_a_completion_comes_back_as_it_was(completion: Completion) -> None:
    assert decode_completion(encode_completion(completion, stored_at=7)) == (completion, 7)


def test_a_long_answer_takes_less_room_than_itself() -> None:
    text = "All work and no play makes Jack a dull boy. " * 2_000
    completion = Completion(text=text, response=orjson.dumps(text), finish_reason="stop")

    value = encode_completion(completion)

    assert len(value) < len(text) / 10
    assert decode_completion(value) == (completion, None)
    assert len(encode_completion(completion, compress=False)) > len(text)


def test_a_value_of_an_earlier_release_does_not_tell_its_age() -> None:
    facts = orjson.dumps(("Four.", "stop", "m", 1, 2, 3, 4))
    body = facts + ANSWER.response
    value = struct.pack(">BBII", 1, 0, len(facts), zlib.crc32(body, len(facts))) + body

    assert decode_completion(value) == (ANSWER, None)


@given(completions, st.data())
def test_a_damaged_value_is_a_miss(completion: Completion, data: st.DataObject) -> None:
    value = bytearray(encode_completion(completion))
    place = data.draw(st.integers(0, len(value) - 1))
    value[place] ^= data.draw(st.integers(1, 255))

    assert decode_completion(bytes(value)) is None


@given(completions, st.data())
def test_a_cut_value_is_a_miss(completion: Completion, data: st.DataObject) -> None:
    value = encode_completion(completion)

    assert decode_completion(value[: data.draw(st.integers(0, len(value) - 1))]) is None


@pytest.mark.parametrize("value", [b"", b"{}", b"\x01", b"\x02" + encode_completion(ANSWER)[1:]])
def test_what_another_program_or_version_wrote_is_a_miss(value: bytes) -> None:
    assert decode_completion(value) is None


@given(parts, parts)
def test_keys_are_equal_only_if_all_parts_are(
    one: tuple[str, str, str, JobKind, str], other: tuple[str, str, str, JobKind, str]
) -> None:
    assert (cache_key(*one) == cache_key(*other)) == (one == other)


def test_no_two_lists_of_parts_join_to_the_same_text() -> None:
    keys = {
        cache_key(namespace, tenant, model, JobKind.CHAT, "{}")
        for namespace, tenant, model in [
            ("a", "bc", "d"),
            ("ab", "c", "d"),
            ("a", "b", "cd"),
            ("", "abc", "d"),
            ("1:a", "bc", "d"),
            ("a2:bc", "", "d"),
            ("a", "2:bc", "d"),
        ]
    }

    assert len(keys) == 7


def test_a_key_shows_nothing_of_the_request() -> None:
    key = cache_key("default", "acme", "openai/gpt-4o", JobKind.CHAT, '{"prompt":"SECRET"}')

    assert re.fullmatch(r"promptfleet:cache:[0-9a-f]{64}", key)
