"""What callbacks say, and what their receivers' answers mean."""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from decimal import Decimal
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from promptfleet_shared.errors import (
    BlockedAddressError,
    ConfigurationError,
    InvalidRequestError,
)
from promptfleet_shared.jobs import JobError, Usage
from promptfleet_shared.settings import Settings, load_settings
from promptfleet_shared.signing import new_secret, verify
from promptfleet_shared.store.deliveries import Attempt, Delivery, ResultFacts, Verdict
from promptfleet_workers.callback_message import MAX_BODY_BYTES, sign_message, write_body
from promptfleet_workers.callback_verdicts import SLOW_DOWN_S, judge_failure, judge_reply
from promptfleet_workers.egress import DeliveryError, Reply
from promptfleet_workers.telemetry import CallbacksDelivered, LogHook

DELAYS_S = Settings().callback_delays_s
ENDED = dt.datetime(2026, 3, 1, 12, 30, 5, 250_000, tzinfo=dt.timezone(dt.timedelta(hours=1)))


def facts(**changes: Any) -> ResultFacts:
    values: dict[str, Any] = {
        "state": "succeeded",
        "tier": "basic",
        "model": "m",
        "finish_reason": "stop",
        "error": None,
        "usage": Usage(input=4, cached=1, output=3, reasoning=2),
        "cost_usd": Decimal("0.00012"),
        "cache": "miss",
        "attempts": 1,
        "metadata": {"order": 7},
        "finished_at": ENDED,
        **changes,
    }
    return ResultFacts(**values)


def delivery(*, attempt: int = 1, event: str = "prompt.succeeded") -> Delivery:
    return Delivery(
        id=uuid.UUID(int=11),
        lease_until=ENDED,
        job_id=uuid.UUID(int=12),
        tenant="default",
        endpoint="https://example.com/hook",
        url="https://example.com/hook",
        event=event,
        attempt=attempt,
        facts=facts(),
    )


def body(public_url: str = "", **changes: Any) -> Any:
    return orjson.loads(write_body(delivery(), facts(**changes), public_url=public_url))


class TestMessage:
    def test_it_tells_the_facts_and_where_the_result_is(self) -> None:
        assert body("https://api.example.com") == {
            "type": "prompt.succeeded",
            "timestamp": "2026-03-01T11:30:05.250000Z",
            "data": {
                "id": str(uuid.UUID(int=12)),
                "state": "succeeded",
                "tier": "basic",
                "model": "m",
                "finish_reason": "stop",
                "error": None,
                "usage": {
                    "input_tokens": 4,
                    "cached_tokens": 1,
                    "output_tokens": 3,
                    "reasoning_tokens": 2,
                },
                "cost_usd": 0.00012,
                "cache": "miss",
                "attempts": 1,
                "metadata": {"order": 7},
                "result_url": f"https://api.example.com/v1/jobs/{uuid.UUID(int=12)}",
            },
        }

    def test_a_failure_has_its_error(self) -> None:
        error = JobError(code="bad_request", message="No.", status=400)
        data = body(error=error, cost_usd=None, metadata=None)["data"]
        assert data["error"] == {"code": "bad_request", "message": "No.", "status": 400}
        assert (data["cost_usd"], data["metadata"], data["result_url"]) == (None, {}, None)

    def test_it_is_never_too_long(self) -> None:
        long = "\1" * 50_000  # six bytes each as JSON
        error = JobError(code=long, message=long, status=500)
        written = write_body(
            delivery(),
            facts(model=long, finish_reason=long, error=error, metadata={"x": long}),
            public_url="https://example.com",
        )
        assert len(written) < MAX_BODY_BYTES
        assert "metadata" not in orjson.loads(written)["data"]

    def test_metadata_that_fit_are_told_whole(self) -> None:
        assert body(metadata={"x": "y" * 18_000})["data"]["metadata"]["x"] == "y" * 18_000

    def test_every_attempt_has_the_same_id_and_body_and_a_time_of_its_own(self) -> None:
        secret = new_secret()
        first, second = (
            sign_message(
                delivery(attempt=n), facts(), secrets=(secret,), public_url="", now=1e9 + n
            )
            for n in (1, 2)
        )
        assert first.body == second.body
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == f"msg_{11:032x}"
        for message, now in ((first, 1e9 + 1), (second, 1e9 + 2)):
            verified = verify(
                [secret], message.headers, message.body, now=functools.partial(float, now)
            )
            assert verified.timestamp == int(now)
        assert first.headers["content-type"] == "application/json"
        assert first.headers["user-agent"].startswith("promptfleet/")


def judged(status: int, *, attempt: int = 1, retry_after_s: float | None = None) -> Attempt:
    reply = Reply(status=status, retry_after_s=retry_after_s)
    return judge_reply(delivery(attempt=attempt), reply, delays_s=DELAYS_S, jitter=1.0)


class TestVerdicts:
    @pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
    def test_2xx_is_a_success(self, status: int) -> None:
        got = judged(status)
        assert (got.verdict, got.status, got.error) == (Verdict.DELIVERED, status, None)

    @pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 404, 500, 503])
    def test_all_else_is_a_failure(self, status: int) -> None:
        got = judged(status)
        assert (got.verdict, got.status, got.pause_s) == (Verdict.FAILED, status, 0.0)
        assert str(status) in (got.error or "")

    def test_410_disables(self) -> None:
        assert judged(410).verdict is Verdict.DISABLED
        assert judged(410, attempt=8).verdict is Verdict.DISABLED

    @pytest.mark.parametrize("status", [429, 502, 504])
    def test_an_overloaded_endpoint_is_left_alone_for_a_while(self, status: int) -> None:
        assert judged(status).pause_s == SLOW_DOWN_S
        assert judged(status, retry_after_s=3).pause_s == 3

    def test_not_earlier_than_told(self) -> None:
        got = judged(503, retry_after_s=4000)
        assert (got.pause_s, got.delay_s) == (4000, 4000)
        assert judged(503, attempt=4, retry_after_s=4000).delay_s == 7200

    def test_the_schedule(self) -> None:
        delays = [judged(500, attempt=n).delay_s for n in range(1, 8)]
        assert delays == [5, 300, 1800, 7200, 18_000, 36_000, 36_000]
        assert judged(500, attempt=7).verdict is Verdict.FAILED
        assert judged(500, attempt=8).verdict is Verdict.EXHAUSTED
        assert judged(500, attempt=9).verdict is Verdict.EXHAUSTED  # one was lost with its worker

    @pytest.mark.parametrize(
        "error",
        [
            DeliveryError("timeout", "no whole answer within 15 s"),
            BlockedAddressError("the host has an address that is not public", field="url"),
            InvalidRequestError("url: is none", field="url"),
        ],
        ids=lambda error: error.code,
    )
    def test_no_answer_is_a_failure_by_the_schedule(
        self, error: DeliveryError | InvalidRequestError
    ) -> None:
        got = judge_failure(delivery(attempt=2), error, delays_s=DELAYS_S, jitter=1.1)
        assert (got.verdict, got.status) == (Verdict.FAILED, None)
        assert got.delay_s == pytest.approx(330)
        assert got.error == f"{error.code}: {error.message}"


class TestLog:
    @pytest.mark.parametrize(
        ("outcomes", "levels"),
        [
            ({"delivered": 9, "failed": 3, "returned": 1}, []),
            ({"delivered": 9, "exhausted": 1}, ["warning"]),
            ({"disabled": 1}, ["warning"]),
        ],
        ids=["usual", "exhausted", "disabled"],
    )
    def test_what_was_given_up_is_a_warning(
        self, outcomes: dict[str, int], levels: list[str]
    ) -> None:
        with capture_logs() as lines:
            LogHook()(CallbacksDelivered(outcomes=outcomes))
        assert [line["log_level"] for line in lines] == levels
        assert all(line["outcomes"] == outcomes for line in lines)


class TestSettings:
    @pytest.mark.parametrize("text", ["", "0,", "1,2", "0,x", "0,-1", "0,inf", "0,nan", "0;1"])
    def test_a_wrong_schedule_is_refused(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROMPTFLEET_CALLBACK_SCHEDULE_S", text)
        with pytest.raises(ConfigurationError, match="CALLBACK_SCHEDULE_S"):
            load_settings()

    def test_the_usual_schedule_is_that_of_the_standard(self) -> None:
        assert DELAYS_S == (0, 5, 300, 1800, 7200, 18_000, 36_000, 36_000)

    def test_a_schedule_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROMPTFLEET_CALLBACK_SCHEDULE_S", "0, 0.5, 60")
        assert load_settings().callback_delays_s == (0, 0.5, 60)

    def test_the_public_url_has_no_slash_at_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROMPTFLEET_PUBLIC_URL", "https://example.com/fleet/")
        assert load_settings().public_url == "https://example.com/fleet"
        monkeypatch.setenv("PROMPTFLEET_PUBLIC_URL", "example.com")
        with pytest.raises(ConfigurationError, match="PUBLIC_URL"):
            load_settings()
