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


class FailureKind(enum.StrEnum):
    """What kind of failure it was, for metrics, breakers and people; see provider-errors.md."""

    RATE_LIMIT = "rate_limit"  # too fast for our limits there
    QUOTA = "quota"  # the account behind the key is used up, or not paid for
    OVERLOAD = "overload"  # too many for the provider, whoever they are
    PERMANENT = "permanent"  # this request, or this key, will not do there
    TRUNCATED = "truncated"  # an answer without its end
    BAD_OUTPUT = "bad_output"  # an answer that can't be used
    UNKNOWN_OUTCOME = "unknown_outcome"  # nobody knows whether it was answered, and billed
    TRANSPORT = "transport"  # no connection: nothing was sent
    SERVER_ERROR = "server_error"  # the provider says that it failed
    NOT_CALLED = "not_called"  # ours: the breaker is open, the retry budget or a limit used up


LIMIT_REACHED = "limit_reached"
"""The code of a call that was not made because a limit of our own has no room for it yet."""
QUOTA_REACHED = "quota_reached"
"""The same for what the deployment allows: another one of the model may have room."""
DAY_IS_OVER = "daily_quota_exceeded"
"""The code of a refusal that names the quota of a day, of this model only."""
KEY_STOP_S = 300.0
"""How long a deployment whose key is used up is left alone; then one call looks again."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A verdict with what it needs to be carried out.

    Attributes:
        otherwise: The verdict where there is no other deployment or model left to try; never NEXT.
        kind: What kind of failure it was.
        stops_key: True if every other call with the same key would fail alike: its deployment is
            to be left alone for `KEY_STOP_S`, and somebody has to be told.
        alone: True if that is so for this deployment only, whatever others have the same key.
        retry_after_s: Seconds that the provider told us to wait, if it did.
    """

    verdict: Verdict
    otherwise: Verdict
    kind: FailureKind
    stops_key: bool = False
    alone: bool = False
    retry_after_s: float | None = None


def _rule(
    kind: FailureKind, verdict: Verdict, otherwise: Verdict, *, stops_key: bool = False
) -> Judgement:
    return Judgement(verdict=verdict, otherwise=otherwise, kind=kind, stops_key=stops_key)


_RATE_LIMIT = _rule(FailureKind.RATE_LIMIT, Verdict.DEFER, Verdict.DEFER)
_OVERLOAD = _rule(FailureKind.OVERLOAD, Verdict.DEFER, Verdict.DEFER)
# A job whose only key is used up waits until its deadline: somebody may pay the bill before.
_QUOTA = _rule(FailureKind.QUOTA, Verdict.NEXT, Verdict.DEFER, stops_key=True)
_DAY_OVER = dataclasses.replace(_QUOTA, alone=True)
_TRANSPORT = _rule(FailureKind.TRANSPORT, Verdict.NEXT, Verdict.RETRY)
_NOT_HERE = _rule(FailureKind.PERMANENT, Verdict.NEXT, Verdict.FINAL)
_NOWHERE = _rule(FailureKind.PERMANENT, Verdict.FINAL, Verdict.FINAL)
_TRUNCATED = _rule(FailureKind.TRUNCATED, Verdict.RETRY, Verdict.RETRY)
_BAD_OUTPUT = _rule(FailureKind.BAD_OUTPUT, Verdict.RETRY, Verdict.RETRY)
_TOO_LONG = _rule(FailureKind.BAD_OUTPUT, Verdict.FINAL, Verdict.FINAL)
_UNKNOWN = _rule(FailureKind.UNKNOWN_OUTCOME, Verdict.RETRY, Verdict.RETRY)
_SERVER_ERROR = _rule(FailureKind.SERVER_ERROR, Verdict.RETRY, Verdict.RETRY)
_NOT_CALLED = _rule(FailureKind.NOT_CALLED, Verdict.NEXT, Verdict.DEFER)
_NO_ROOM = _rule(FailureKind.NOT_CALLED, Verdict.DEFER, Verdict.DEFER)


def _table(*rows: tuple[Judgement, Iterable[str]]) -> dict[str, Judgement]:
    return {code: rule for rule, codes in rows for code in codes}


# Codes come lower-cased. Ours are marked; the others are OpenAI's, Anthropic's, Google's,
# llama.cpp's, vLLM's, TGI's, OpenRouter's, Moonshot's and Alibaba's. Vague ones
# ("invalid_request_error", "server_error") are left out: their status says more.
_BY_CODE = _table(
    (
        _RATE_LIMIT,
        (
            "rate_limit_exceeded",
            "rate_limit_error",
            "rate_limited",
            "rate_limit",
            "rate_limit_reached_error",
            "too_many_requests",
            "resource_exhausted",
            "requests",
            "tokens",
            "slow_down",
        ),
    ),
    (
        _OVERLOAD,
        (
            "overloaded",
            "overloaded_error",
            "engine_overloaded",
            "engine_overloaded_error",
            "model_overloaded",
            "unavailable",
            "unavailable_error",
            "service_unavailable",
        ),
    ),
    (
        _QUOTA,
        (
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "billing_error",
            "exceeded_current_quota_error",
            "insufficient_balance",
            "insufficient_credits",
            "credit_limit",
            "payment_required",
            "arrearage",
        ),
    ),
    (
        _DAY_OVER,
        (DAY_IS_OVER,),  # ours
    ),
    (
        _TRANSPORT,
        ("connect_error",),  # ours
    ),
    (
        _NOT_HERE,
        (
            "unsupported",  # ours
            "context_length_exceeded",  # ours, too
            "exceed_context_size_error",
            "string_above_max_length",
            "request_too_large",  # ours, too
            "invalid_api_key",  # ours, too
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
        _NOWHERE,
        (
            "content_filter",
            "content_policy_violation",
            "responsibleaipolicyviolation",
            "invalid_prompt",
        ),
    ),
    (
        _TOO_LONG,
        ("response_too_large",),  # ours: it would be as long the next time
    ),
    (
        _TRUNCATED,
        ("truncated",),  # ours
    ),
    (
        _BAD_OUTPUT,
        ("bad_response",),  # ours
    ),
    (
        _UNKNOWN,
        (
            "timeout",  # ours, as the next
            "connection_lost",
            "timeout_error",
            "deadline_exceeded",
        ),
    ),
    (
        _SERVER_ERROR,
        ("internal",),
    ),
    (
        _NO_ROOM,
        (LIMIT_REACHED,),  # ours
    ),
    (
        _NOT_CALLED,
        ("circuit_open", "key_stopped", "retry_budget", QUOTA_REACHED),  # ours
    ),
)
_BY_STATUS = {
    401: _NOT_HERE,
    402: _QUOTA,
    403: _NOT_HERE,
    404: _NOT_HERE,
    408: _UNKNOWN,
    409: _SERVER_ERROR,
    413: _NOT_HERE,
    425: _SERVER_ERROR,
    429: _RATE_LIMIT,
    503: _OVERLOAD,
    529: _OVERLOAD,
}
_MAX_DOUBLINGS = 32


def classify(error: ProviderError) -> Judgement:
    """Judge a failed call: by the code first, as a body knows more than a status does.

    Example:
        >>> classify(ProviderError(code="http_503", status=503)).verdict
        <Verdict.DEFER: 'defer'>
    """
    rule = _BY_CODE.get(error.code) or _of_status(error)
    if error.unknown_outcome and rule.otherwise is Verdict.DEFER:
        # A refusal in mid-answer: a part of it may be billed, so it counts.
        verdict = Verdict.RETRY if rule.verdict is Verdict.DEFER else rule.verdict
        rule = dataclasses.replace(rule, verdict=verdict, otherwise=Verdict.RETRY)
    if error.retry_after_s is None:
        return rule
    return dataclasses.replace(rule, retry_after_s=error.retry_after_s)


_ILL = {
    FailureKind.OVERLOAD,
    FailureKind.TRUNCATED,
    FailureKind.UNKNOWN_OUTCOME,
    FailureKind.TRANSPORT,
    FailureKind.SERVER_ERROR,
}


def speaks_of_health(judgement: Judgement) -> bool:
    """True if such a failure says that the deployment is not well; a bad request does not."""
    return judgement.kind in _ILL


def is_telling(code: str) -> bool:
    """True if this code, in lower case, decides by itself what is to be done."""
    return code in _BY_CODE


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


def _of_status(error: ProviderError) -> Judgement:
    """What a status means by itself; a failure without one came before any answer."""
    status = error.status
    known = None if status is None else _BY_STATUS.get(status)
    if known is not None:
        return known
    if status is not None and 300 <= status < 500:  # noqa: PLR2004 - HTTP's numbers
        return _NOWHERE
    return _UNKNOWN if error.unknown_outcome else _SERVER_ERROR
