"""What providers say when they fail, in their own words, and what we make of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promptfleet_shared.errors import ProviderError
from promptfleet_workers.providers.http import HttpResponse
from promptfleet_workers.providers.responses import read_answer
from promptfleet_workers.retries import FailureKind, Verdict, classify

RATE_LIMIT, QUOTA, OVERLOAD = FailureKind.RATE_LIMIT, FailureKind.QUOTA, FailureKind.OVERLOAD
PERMANENT, SERVER_ERROR = FailureKind.PERMANENT, FailureKind.SERVER_ERROR
UNKNOWN, BAD_OUTPUT = FailureKind.UNKNOWN_OUTCOME, FailureKind.BAD_OUTPUT
CANARY = "canary-3f8a1c"


def error_of(
    status: int, body: Any = b"", headers: dict[str, str] | None = None
) -> ProviderError | None:
    """The failure; None for what is an answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        read_answer(HttpResponse(status, httpx.Headers(headers or {}), raw))
    except ProviderError as error:
        return error
    return None


def openai(message: str, kind: str | None = None, code: Any = None) -> Any:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic(kind: str, message: str) -> Any:
    return {"type": "error", "error": {"type": kind, "message": message}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "verdicts"),
    [
        # OpenAI
        (
            429,
            openai("Rate limit reached for gpt-4o", "tokens", "rate_limit_exceeded"),
            RATE_LIMIT,
            "defer/defer",
        ),
        (
            429,
            openai(
                "Request too large for gpt-4o on tokens per min (TPM): Limit 3, Requested 4.",
                "tokens",
                "rate_limit_exceeded",
            ),
            PERMANENT,
            "next/final",
        ),
        (
            429,
            openai(
                "You exceeded your current quota, please check your plan and billing details.",
                "insufficient_quota",
                "insufficient_quota",
            ),
            QUOTA,
            "next/defer",
        ),
        (
            400,
            openai(
                "Billing hard limit has been reached",
                "invalid_request_error",
                "billing_hard_limit_reached",
            ),
            QUOTA,
            "next/defer",
        ),
        (
            400,
            openai(
                "This model's maximum context length is 8192 tokens.",
                "invalid_request_error",
                "context_length_exceeded",
            ),
            PERMANENT,
            "next/final",
        ),
        (
            401,
            openai("Incorrect API key provided", "invalid_request_error", "invalid_api_key"),
            PERMANENT,
            "next/final",
        ),
        (500, openai("The server had an error", "server_error"), SERVER_ERROR, "retry/retry"),
        (
            503,
            openai("The engine is currently overloaded", "server_error"),
            OVERLOAD,
            "defer/defer",
        ),
        # Azure
        (
            429,
            openai("Requests to the API have exceeded the token rate limit.", code="429"),
            RATE_LIMIT,
            "defer/defer",
        ),
        (
            400,
            {
                "error": {
                    "code": "content_filter",
                    "message": "…",
                    "status": 400,
                    "innererror": {"code": "ResponsibleAIPolicyViolation"},
                }
            },
            PERMANENT,
            "final/final",
        ),
        (
            400,
            {"error": {"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
            PERMANENT,
            "final/final",
        ),
        (404, {"error": {"code": "DeploymentNotFound", "message": "…"}}, PERMANENT, "next/final"),
        (
            429,
            {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 10 seconds."},
            RATE_LIMIT,
            "defer/defer",
        ),
        # Anthropic
        (429, anthropic("rate_limit_error", "…"), RATE_LIMIT, "defer/defer"),
        (529, anthropic("overloaded_error", "Overloaded"), OVERLOAD, "defer/defer"),
        (
            400,
            anthropic(
                "invalid_request_error",
                "Your credit balance is too low to access the Anthropic API.",
            ),
            QUOTA,
            "next/defer",
        ),
        (
            400,
            anthropic(
                "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"
            ),
            PERMANENT,
            "next/final",
        ),
        (413, anthropic("request_too_large", "…"), PERMANENT, "next/final"),
        (500, anthropic("api_error", "…"), SERVER_ERROR, "retry/retry"),
        (504, anthropic("timeout_error", "…"), UNKNOWN, "retry/retry"),
        # Google's compatible endpoint
        (
            429,
            [
                {
                    "error": {
                        "code": 429,
                        "status": "RESOURCE_EXHAUSTED",
                        "message": "You exceeded your current quota",
                    }
                }
            ],
            RATE_LIMIT,
            "defer/defer",
        ),
        (
            400,
            [
                {
                    "error": {
                        "code": 400,
                        "status": "INVALID_ARGUMENT",
                        "message": "API key not valid. Please pass a valid API key.",
                    }
                }
            ],
            PERMANENT,
            "next/final",
        ),
        (
            503,
            [
                {
                    "error": {
                        "code": 503,
                        "status": "UNAVAILABLE",
                        "message": "The model is overloaded.",
                    }
                }
            ],
            OVERLOAD,
            "defer/defer",
        ),
        # others
        (
            402,
            openai("Insufficient Balance", "unknown_error", "invalid_request_error"),
            QUOTA,
            "next/defer",
        ),
        (200, {"error": {"code": 402, "message": "Insufficient credits"}}, QUOTA, "next/defer"),
        (
            429,
            openai("Your account is suspended", "exceeded_current_quota_error"),
            QUOTA,
            "next/defer",
        ),
        (
            403,
            {
                "code": "Some resource has been exhausted",
                "error": "Your team has used all available credits or reached its limit.",
            },
            QUOTA,
            "next/defer",
        ),
        (
            400,
            {
                "object": "error",
                "message": "This model's maximum context length is 2048 tokens.",
                "type": "BadRequestError",
                "code": 400,
            },
            PERMANENT,
            "next/final",
        ),
        (
            422,
            {
                "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 9",
                "error_type": "validation",
            },
            PERMANENT,
            "next/final",
        ),
        (
            429,
            {"error": "Model is overloaded", "error_type": "overloaded"},
            OVERLOAD,
            "defer/defer",
        ),
        (
            400,
            {"error": {"code": 400, "type": "exceed_context_size_error", "message": "…"}},
            PERMANENT,
            "next/final",
        ),
        (
            503,
            {"error": {"code": 503, "type": "unavailable_error", "message": "Loading model"}},
            OVERLOAD,
            "defer/defer",
        ),
        (404, {"error": "model 'x' not found"}, PERMANENT, "next/final"),
        (
            422,
            {"detail": [{"loc": ["body"], "msg": "extra fields not permitted"}]},
            PERMANENT,
            "final/final",
        ),
        # no JSON at all
        (502, b"<html>Bad Gateway</html>", UNKNOWN, "retry/retry"),
        (503, b"<html>Service Unavailable</html>", OVERLOAD, "defer/defer"),
        (200, b"<html>Hello</html>", BAD_OUTPUT, "retry/retry"),
        (200, b'{"choices": \xff}', BAD_OUTPUT, "retry/retry"),
        (200, b"", BAD_OUTPUT, "retry/retry"),
        (500, b"\xff\xfe\x00", SERVER_ERROR, "retry/retry"),
    ],
)
def test_what_they_say(status: int, body: Any, kind: FailureKind, verdicts: str) -> None:
    error = error_of(status, body)

    assert error is not None
    judgement = classify(error)
    said = f"{judgement.verdict.value}/{judgement.otherwise.value}"
    assert (judgement.kind, said) == (kind, verdicts)
    assert judgement.stops_key is (kind is QUOTA)


def test_a_limit_with_the_time_to_come_back() -> None:
    retry_info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
    body = [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [retry_info]}}]

    error = error_of(429, body, {"retry-after": "20"})

    assert error is not None
    assert classify(error).retry_after_s == 34.5


def test_a_wait_comes_with_a_success_that_tells_of_an_error() -> None:
    error = error_of(200, {"error": {"code": 429}}, {"retry-after": "20"})

    assert error is not None
    judgement = classify(error)
    assert (judgement.verdict, judgement.retry_after_s) == (Verdict.DEFER, 20)


FIELDS = st.sampled_from(
    ["error", "code", "type", "status", "message", "error_type", "object", "innererror", "detail"]
)
TEXTS = st.sampled_from(
    [
        CANARY,
        f"insufficient_quota {CANARY}",
        f"context length {CANARY}",
        f"try again in 5s {CANARY}",
        "rate_limit_exceeded",
        "error",
        "429",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 700) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(FIELDS, inner, max_size=4),
)
BODIES = (
    st.dictionaries(FIELDS, JSON, min_size=1, max_size=4).map(
        lambda body: json.dumps(body).encode()
    )
    | JSON.map(lambda body: json.dumps(body).encode())
    | st.binary(max_size=30).map(lambda noise: noise + CANARY.encode())
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset", "content-type"]),
    st.sampled_from([CANARY, "5", "1e400", "Tue, 14 Nov 2023 22:13:20 GMT"]),
)


@given(status=st.integers(100, 999), body=BODIES, headers=HEADERS)
@example(status=400, body=b'{"error":{"code":"%b"}}' % CANARY.encode(), headers={})
@example(status=400, body=b"[" * 100_000, headers={})
def test_any_answer_is_read_or_judged_and_never_shown(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    error = error_of(status, body, headers)

    if error is None:
        assert 200 <= status < 300
        return
    judgement = classify(error)
    assert judgement.otherwise is not Verdict.NEXT
    assert CANARY not in f"{error.message} {error.code} {judgement}"
    assert len(error.message) < 200


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_judged(body: bytes) -> None:
    error = error_of(200, body)

    assert error is None or error.code in {"bad_response", "http_200"} or b"error" in body
