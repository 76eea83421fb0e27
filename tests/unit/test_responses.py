"""Reading bodies and headers of providers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.jobs import Usage
from promptfleet_workers.providers.responses import (
    estimate_tokens,
    name,
    read_json,
    storable,
    write_json,
)
from promptfleet_workers.providers.waits import retry_after_s

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "later"}, None),
        ({"retry-after": "1e99"}, 7 * 86_400),
        ({"retry-after": "Tue, 14 Nov 2023 22:14:00 GMT"}, 40),
        (
            {
                "retry-after": "Tue, 14 Nov 2023 22:14:00 GMT",
                "date": "Tue, 14 Nov 2023 22:13:50 GMT",
            },
            10,
        ),
        ({"retry-after": DATE, "date": "nonsense"}, 0),
        ({"retry-after": "Mon, 13 Nov 2023 22:13:20 GMT"}, 0),
        ({"retry-after": "Tue, 99 Nov 2023 22:13:20 GMT"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, NOW) == seconds


@given(st.text() | st.text(alphabet=st.characters(categories=["Cs", "L"])))
def test_what_is_storable_can_be_encoded_and_differs_in_surrogates_only(text: str) -> None:
    stored = storable(text)

    stored.encode()
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert stored == text


def test_names_are_short_texts() -> None:
    assert name("gpt-4o") == "gpt-4o"
    assert name("é" * 201) == "é" * 200
    assert name("a\0b\ud800") == "a\ufffdb\ufffd"
    assert [name(value) for value in ("", None, 3, ["a"])] == [None] * 4


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.just("\ud800"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_whatever_is_read_can_be_written_and_read_again(value: object) -> None:
    data = read_json(json.dumps(value).encode())

    assert read_json(write_json(data)) == data


def test_estimates_of_tokens() -> None:
    assert [estimate_tokens(text) for text in (None, "", "a", "four", "fünf")] == [0, 0, 1, 1, 2]
    assert Usage(output=estimate_tokens("\ud800")).output == 1
