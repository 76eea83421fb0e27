"""What an attempt to deliver a callback means: for it, and for the endpoint it went to."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.store.deliveries import Attempt, Delivery, Verdict
from promptfleet_workers.egress import DeliveryError, Reply

SLOW_DOWN_S: Final = 10.0
"""How long an endpoint is left alone that is overloaded and does not tell for how long."""
_OVERLOADED: Final = frozenset(
    {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT}
)


def judge_reply(
    delivery: Delivery, reply: Reply, *, delays_s: tuple[float, ...], jitter: float
) -> Attempt:
    """What an answer means: 2xx alone is a success, and no redirect is followed.

    Args:
        delivery: What was posted.
        reply: What came back.
        delays_s: Seconds before each attempt, counted from the one before.
        jitter: About 1: what delays of our own are multiplied with.
    """
    if reply.status // 100 == 2:  # noqa: PLR2004 - HTTP's successes
        return Attempt(
            callback_id=delivery.id,
            held=delivery.lease_until,
            verdict=Verdict.DELIVERED,
            status=reply.status,
        )
    if reply.status == HTTPStatus.GONE:
        return Attempt(
            callback_id=delivery.id,
            held=delivery.lease_until,
            verdict=Verdict.DISABLED,
            status=reply.status,
            error="gone: the receiver answered 410 and wants no more callbacks",
        )
    told_s = reply.retry_after_s or 0.0
    slow_s = SLOW_DOWN_S * jitter if reply.status in _OVERLOADED and not told_s else 0.0
    return _failed(
        delivery,
        delays_s=delays_s,
        jitter=jitter,
        pause_s=max(told_s, slow_s),
        status=reply.status,
        error=_explain(reply.status),
    )


def judge_failure(
    delivery: Delivery,
    error: DeliveryError | InvalidRequestError,
    *,
    delays_s: tuple[float, ...],
    jitter: float,
) -> Attempt:
    """What it means that there was no answer, or that the URL may not be called (now)."""
    text = f"{error.code}: {error.message}"
    return _failed(delivery, delays_s=delays_s, jitter=jitter, error=text)


def _failed(
    delivery: Delivery,
    *,
    delays_s: tuple[float, ...],
    jitter: float,
    error: str,
    pause_s: float = 0.0,
    status: int | None = None,
) -> Attempt:
    exhausted = delivery.attempt >= len(delays_s)
    return Attempt(
        callback_id=delivery.id,
        held=delivery.lease_until,
        verdict=Verdict.EXHAUSTED if exhausted else Verdict.FAILED,
        delay_s=0.0 if exhausted else max(pause_s, delays_s[delivery.attempt] * jitter),
        pause_s=pause_s,
        status=status,
        error=error,
    )


def _explain(status: int) -> str:
    if status // 100 == 3:  # noqa: PLR2004 - HTTP's redirects
        return f"redirect: the receiver answered {status}, and redirects are not followed"
    return f"http_{status}: the receiver answered {status}"
