"""Whether, where and when a failed call is tried again: decided here and nowhere else."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import RetryOptions


class Verdict(enum.Enum):
    """What becomes of a job whose call failed."""

    RETRY = "retry"  # later, and the attempt counts
    DEFER = "defer"  # later, and the attempt does not count: there was no room for the job
    NEXT = "next"  # at once, at another deployment or model; this one won't do
    FINAL = "final"  # never


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A verdict with what it needs to be carried out.

    Attributes:
        otherwise: The verdict where there is no other deployment or model left to try; never NEXT.
        retry_after_s: Seconds that the provider told us to wait, if it did.
    """

    verdict: Verdict
    otherwise: Verdict
    retry_after_s: float | None = None


_Pair = tuple[Verdict, Verdict]
_RETRY: _Pair = (Verdict.RETRY, Verdict.RETRY)
_DEFER: _Pair = (Verdict.DEFER, Verdict.DEFER)
_NEXT_OR_RETRY: _Pair = (Verdict.NEXT, Verdict.RETRY)
_NEXT_OR_FINAL: _Pair = (Verdict.NEXT, Verdict.FINAL)
_FINAL: _Pair = (Verdict.FINAL, Verdict.FINAL)


def _table(*rows: tuple[_Pair, Iterable[str]]) -> dict[str, _Pair]:
    return {code: pair for pair, codes in rows for code in codes}


# Codes come lower-cased. Ours are marked; the others are OpenAI's, Anthropic's, Google's,
# llama.cpp's, vLLM's, TGI's and OpenRouter's. Vague ones ("invalid_request_error", "server_error")
# are left out: their status says more.
_BY_CODE = _table(
    (
        _DEFER,
        (
            "rate_limit_exceeded",
            "rate_limit_error",
            "rate_limited",
            "rate_limit",
            "too_many_requests",
            "resource_exhausted",
            "requests",
            "tokens",
            "overloaded",
            "overloaded_error",
            "engine_overloaded",
            "model_overloaded",
            "slow_down",
            "unavailable",
            "unavailable_error",
            "service_unavailable",
        ),
    ),
    (
        _NEXT_OR_RETRY,
        ("connect_error",),  # ours
    ),
    (
        _NEXT_OR_FINAL,
        (
            "unsupported",  # ours
            "context_length_exceeded",  # ours, too
            "exceed_context_size_error",
            "string_above_max_length",
            "request_too_large",
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "billing_error",
            "invalid_api_key",
            "authentication_error",
            "permission_error",
            "permission_denied",
            "unauthenticated",
            "account_deactivated",
            "model_not_found",
            "deploymentnotfound",
            "not_found_error",
        ),
    ),
    (
        _FINAL,
        (
            "content_filter",
            "content_policy_violation",
            "responsibleaipolicyviolation",
            "invalid_prompt",
            "response_too_large",  # ours: it would be as long the next time
        ),
    ),
    (
        _RETRY,
        (
            "truncated",  # ours, as the next three
            "bad_response",
            "timeout",
            "connection_lost",
            "internal",
            "timeout_error",
            "deadline_exceeded",
        ),
    ),
)
_BY_STATUS = {
    401: _NEXT_OR_FINAL,
    402: _NEXT_OR_FINAL,
    403: _NEXT_OR_FINAL,
    404: _NEXT_OR_FINAL,
    408: _RETRY,
    409: _RETRY,
    413: _NEXT_OR_FINAL,
    425: _RETRY,
    429: _DEFER,
    503: _DEFER,
    529: _DEFER,
}
_MAX_DOUBLINGS = 32


def classify(error: ProviderError) -> Judgement:
    """Judge a failed call: by the code first, as a body knows more than a status does.

    Example:
        >>> classify(ProviderError(code="http_503", status=503)).verdict
        <Verdict.DEFER: 'defer'>
    """
    pair = _BY_CODE.get(error.code) or _of_status(error.status)
    return Judgement(verdict=pair[0], otherwise=pair[1], retry_after_s=error.retry_after_s)


def delay_s(
    options: RetryOptions,
    attempt: int,
    retry_after_s: float | None,
    random: Callable[[], float],
) -> float:
    """Seconds until the next try: full jitter below a bound that doubles, after what we were told.

    The jitter is added to what the provider told us, so that jobs that were told the same do not
    come back at the same moment. Formula: "Full Jitter" of
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    Args:
        options: The first bound and the largest one.
        attempt: The attempt that failed, from 1.
        retry_after_s: Seconds that the provider told us to wait, if it did.
        random: Gives numbers from 0 to 1, as `random.random` does.
    """
    doublings = min(max(attempt - 1, 0), _MAX_DOUBLINGS)
    bound_ms = min(options.retry_delay_ms * (1 << doublings), options.max_retry_delay_ms)
    return random() * bound_ms / 1000 + (retry_after_s or 0.0)


def _of_status(status: int | None) -> _Pair:
    """What a status means by itself; a failure without one came before any answer."""
    if status is None:
        return _RETRY
    known = _BY_STATUS.get(status)
    if known is not None:
        return known
    return _FINAL if 300 <= status < 500 else _RETRY  # noqa: PLR2004 - HTTP's numbers
