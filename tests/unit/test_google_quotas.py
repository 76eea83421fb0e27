"""What Google's refusals say of quotas, as the Gemini API words them, and as nobody should."""

from __future__ import annotations

from typing import Any

import pytest

from promptfleet_workers.providers.google_quotas import Violated, violated
from promptfleet_workers.providers.responses import failure
from promptfleet_workers.retries import FailureKind, classify

FREE = "-FreeTier"
REQUESTS = "GenerateRequestsPerMinutePerProjectPerModel"
TOKENS = "GenerateContentInputTokensPerModelPerMinute"
DAY = "GenerateRequestsPerDayPerProjectPerModel"


def body(*quotas: tuple[str, Any]) -> dict[str, Any]:
    violations = [
        {
            "quotaMetric": "generativelanguage.googleapis.com/x",
            "quotaId": quota,
            "quotaValue": value,
        }
        for quota, value in quotas
    ]
    return {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota, please check your plan.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [
                {"@type": "type.googleapis.com/google.rpc.Help", "links": []},
                {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations},
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "22s"},
            ],
        }
    }


@pytest.mark.parametrize(
    ("quotas", "minute", "lasts"),
    [
        ([(REQUESTS + FREE, "15")], {"requests": 15}, False),
        ([(TOKENS + FREE, "16000")], {"input_tokens": 16_000}, False),
        (
            [("GenerateContentPaidTierInputTokensPerModelPerMinute", "4000000")],
            {"input_tokens": 4_000_000},
            False,
        ),
        ([("EmbedContentRequestsPerMinutePerUserPerProject", 100)], {"requests": 100}, False),
        ([(REQUESTS, "15"), (REQUESTS + FREE, "10")], {"requests": 10}, False),
        ([(DAY, "250")], {}, True),
        ([(REQUESTS, None), (DAY, None)], {}, True),  # a model that the plan does not have
        ([(REQUESTS, "0")], {}, True),
        ([(REQUESTS, None)], {}, False),
        ([("TunedModelsPerProject", "5"), (7, "5"), (REQUESTS, "-5"), (TOKENS, "1e3")], {}, False),
        (
            [(REQUESTS, True), (REQUESTS, "9" * 400), ("Requests" * 99 + "PerMinute", "5")],
            {},
            False,
        ),
    ],
)
def test_quotas_are_read(quotas: Any, minute: dict[str, float], lasts: bool) -> None:
    assert violated(body(*quotas)["error"]) == Violated(minute=minute, lasts=lasts)


@pytest.mark.parametrize("details", [None, 7, [None], [{"violations": {}}], [{"violations": [1]}]])
def test_whatever_else_stands_there_tells_nothing(details: Any) -> None:
    assert violated({"details": details}) == Violated(minute={}, lasts=False)


def test_a_refusal_has_them_and_other_statuses_have_not() -> None:
    error = failure(body((REQUESTS, "15")), 429)
    assert (error.code, error.limits, error.retry_after_s) == (
        "resource_exhausted",
        {"requests": 15},
        22,
    )
    assert failure([body((REQUESTS, "15"))], 429).limits == {"requests": 15}  # compatible endpoint
    assert (
        failure({"error": {"code": 503, "details": body()["error"]["details"]}}, 503).limits is None
    )
    day = failure(body((DAY, "250")), 429)
    assert (day.code, classify(day).kind) == ("daily_quota_exceeded", FailureKind.QUOTA)
