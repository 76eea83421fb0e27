"""Verdicts on failures, and how long to wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import RetryOptions
from promptfleet_workers.retries import Verdict, classify, delay_s

RETRY, DEFER, NEXT, FINAL = Verdict.RETRY, Verdict.DEFER, Verdict.NEXT, Verdict.FINAL


@pytest.mark.parametrize(
    ("code", "status", "verdict", "otherwise"),
    [
        # a code says more than the status it came with
        ("rate_limit_exceeded", 429, DEFER, DEFER),
        ("rate_limit_exceeded", 400, DEFER, DEFER),
        ("insufficient_quota", 429, NEXT, DEFER),
        ("overloaded_error", 529, DEFER, DEFER),
        ("overloaded", 200, DEFER, DEFER),
        ("context_length_exceeded", 400, NEXT, FINAL),
        ("content_filter", 400, FINAL, FINAL),
        ("invalid_api_key", 401, NEXT, FINAL),
        ("model_not_found", 404, NEXT, FINAL),
        ("deadline_exceeded", 504, RETRY, RETRY),
        # ours
        ("connect_error", None, NEXT, RETRY),
        ("unsupported", None, NEXT, FINAL),
        ("timeout", None, RETRY, RETRY),
        ("connection_lost", None, RETRY, RETRY),
        ("truncated", None, RETRY, RETRY),
        ("bad_response", 200, RETRY, RETRY),
        ("response_too_large", None, FINAL, FINAL),
        # vague codes leave it to the status
        ("invalid_request_error", 400, FINAL, FINAL),
        ("invalid_request_error", 401, NEXT, FINAL),
        ("invalid_request_error", 413, NEXT, FINAL),
        ("server_error", 500, RETRY, RETRY),
        ("server_error", 503, DEFER, DEFER),
        ("something_new", 500, RETRY, RETRY),
        ("something_new", 503, DEFER, DEFER),
        ("something_new", 200, RETRY, RETRY),
        ("something_new", None, RETRY, RETRY),
    ],
)
def test_verdicts(code: str, status: int | None, verdict: Verdict, otherwise: Verdict) -> None:
    judgement = classify(ProviderError(code=code, status=status))

    assert (judgement.verdict, judgement.otherwise) == (verdict, otherwise)


@pytest.mark.parametrize(
    ("verdict", "statuses"),
    [
        (RETRY, [408, 409, 425, 500, 501, 502, 504, 520, 524, 599]),
        (DEFER, [429, 503, 529]),
        (NEXT, [401, 402, 403, 404, 413]),
        (FINAL, [301, 307, 400, 405, 418, 422, 451]),
    ],
)
def test_verdicts_by_status(verdict: Verdict, statuses: list[int]) -> None:
    for status in statuses:
        error = ProviderError(code=f"http_{status}", status=status)
        assert (status, classify(error).verdict) == (status, verdict)


@given(code=st.text(), status=st.none() | st.integers(100, 599))
def test_there_is_always_something_to_do_where_nothing_else_is_left(
    code: str, status: int | None
) -> None:
    judgement = classify(ProviderError(code=code, status=status, retry_after_s=4.5))

    assert judgement.otherwise is not NEXT
    assert judgement.verdict in {NEXT, judgement.otherwise}
    assert judgement.retry_after_s == 4.5


fractions = st.floats(0, 1, exclude_max=True)


@given(
    delay_ms=st.floats(0, 10_000),
    max_ms=st.floats(0, 100_000),
    attempt=st.integers(0, 10_000),
    told_s=st.none() | st.floats(0, 1_000_000),
    fraction=fractions,
)
def test_a_delay_is_bounded_and_never_earlier_than_told(
    delay_ms: float, max_ms: float, attempt: int, told_s: float | None, fraction: float
) -> None:
    options = RetryOptions(retry_delay_ms=delay_ms, max_retry_delay_ms=max_ms)

    delay = delay_s(options, attempt, told_s, lambda: fraction)

    assert (told_s or 0) <= delay <= (told_s or 0) + max_ms / 1000 + 1e-6


@given(attempt=st.integers(1, 7), fraction=fractions)
def test_the_bound_doubles_with_each_attempt(attempt: int, fraction: float) -> None:
    options = RetryOptions(retry_delay_ms=500, max_retry_delay_ms=60_000)

    delay = delay_s(options, attempt, None, lambda: fraction)

    assert delay == pytest.approx(fraction * 0.5 * 2 ** (attempt - 1))


def test_the_jitter_is_full() -> None:
    options = RetryOptions(retry_delay_ms=500)

    assert delay_s(options, 3, None, lambda: 0.0) == 0
    assert delay_s(options, 3, None, lambda: 0.5) == 1.0
    assert delay_s(options, 3, 2.0, lambda: 0.5) == 3.0
