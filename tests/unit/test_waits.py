"""How long providers ask us to wait, in each of their ways to say so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_workers.providers.waits import WEEK_S, duration_s, told_s

NOW = 1_700_000_000.0
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20", 20),
        ("20s", 20),
        ("120ms", 0.12),
        ("1m30.5s", 90.5),
        ("6m0s", 360),
        ("1h2m3s", 3723),
        ("2d", 172_800),
        ("", None),
        ("s", None),
        ("1m soon", None),
        ("-5s", None),
        ("1" * 99 + "s", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert duration_s(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ({"message": "Rate limit reached. Please try again in 1m30.5s. Visit …"}, 90.5),
        ({"message": "Please try again in 6ms."}, 0.006),
        ({"message": "Please retry in 34.07s."}, 34.07),
        ({"message": "Please retry after 2 seconds. To increase …"}, 2),
        ({"message": "Rate limit is exceeded. Try again in 10 seconds."}, 10),
        ({"message": "Try again in 3 minutes"}, 180),
        ({"message": "Try again in 99999 hours"}, 86_400),
        ({"message": "Try again in 5 moons"}, None),
        ({"message": "Try again later"}, None),
        ({"message": ["Try again in 5s"]}, None),
        ({"details": [{"@type": "…RetryInfo", "retryDelay": "34.5s"}]}, 34.5),
        ({"details": [{"retryDelay": 5}, 7, {"other": 1}]}, None),
    ],
)
def test_what_a_body_says(error: dict[str, Any], seconds: float | None) -> None:
    expected = None if seconds is None else pytest.approx(seconds)
    assert told_s(429, {}, error, NOW) == expected


def test_the_longest_of_header_and_body_counts() -> None:
    error = {"message": "Please try again in 30s."}

    assert told_s(429, {"retry-after": "5"}, error, NOW) == 30
    assert told_s(429, {"retry-after": "50"}, error, NOW) == 50


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        # OpenAI: that of the limit which is used up
        (
            {
                "x-ratelimit-remaining-requests": "99",
                "x-ratelimit-reset-requests": "120ms",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            360,
        ),
        # Anthropic: instants, read against the response's own date
        (
            {
                "date": DATE,
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2023-11-14T22:14:00Z",
            },
            40,
        ),
        # OpenRouter: milliseconds since the epoch
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000030000"}, 30),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000030"}, 30),
        # nothing is used up: the longest short one; a day's limit is not what a burst ran into
        ({"x-ratelimit-reset-requests": "20h", "x-ratelimit-reset-tokens": "7s"}, 7),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "7s"}, 7),
        ({"x-ratelimit-reset-requests": "soon"}, None),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1e99"}, WEEK_S),
        # told plainly: no guess
        ({"retry-after": "2", "x-ratelimit-reset-tokens": "7s"}, 2),
    ],
)
def test_when_limits_are_full_again(headers: dict[str, str], seconds: float | None) -> None:
    assert told_s(429, headers, {}, NOW) == seconds


def test_limits_matter_to_nobody_but_a_429() -> None:
    headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "7"}

    assert told_s(500, headers, {}, NOW) is None


NAMES = st.sampled_from(
    [
        "date",
        "retry-after",
        "retry-after-ms",
        "x-ratelimit-reset",
        "x-ratelimit-remaining",
        "x-ratelimit-reset-tokens",
        "anthropic-ratelimit-tokens-reset",
    ]
)
VALUES = (
    st.text(max_size=20)
    | st.floats().map(str)
    | st.from_regex(r"\A\d{1,15}(ms|s|m|h|d)?\Z")
    | st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    | st.datetimes().map(lambda at: at.isoformat() + "+14:00")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
ERRORS = st.dictionaries(
    st.sampled_from(["message", "details"]),
    JSON
    | st.lists(st.dictionaries(st.just("retryDelay"), JSON), max_size=2)
    | VALUES.map(lambda value: f"please retry in {value}"),
)


@given(headers=st.dictionaries(NAMES, VALUES), error=ERRORS)
def test_no_header_and_no_body_breaks_it(headers: dict[str, str], error: dict[str, Any]) -> None:
    seconds = told_s(429, headers, error, NOW)

    assert seconds is None or 0 <= seconds <= WEEK_S
