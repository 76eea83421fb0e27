"""What receivers call: `promptfleet.verify_callback`."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from promptfleet import (
    CallbackEvent,
    ConfigurationError,
    InvalidRequestError,
    InvalidSignatureError,
    JobState,
    verify_callback,
)
from promptfleet_shared.signing import new_secret, sign

SECRET = new_secret()
JOB = uuid.UUID("01980a3e-3f2b-7c1d-9a4e-0242ac120002")
EVENT: dict[str, Any] = {
    "type": "prompt.succeeded",
    "timestamp": "2026-01-02T03:04:05.678901Z",
    "data": {"id": str(JOB), "state": "succeeded", "metadata": {"ticket": "é"}},
}


def headers_of(body: bytes, *, secret: str = SECRET, age_s: float = 0) -> dict[str, str]:
    now = int(time.time() - age_s)
    return {
        "Webhook-Id": "msg_1",
        "Webhook-Timestamp": str(now),
        "Webhook-Signature": sign([secret], "msg_1", now, body),
    }


def verified(event: Mapping[str, Any] = EVENT, **options: Any) -> CallbackEvent:
    body = orjson.dumps(event)
    return verify_callback(body, headers_of(body), SECRET, **options)


def test_a_callback_tells_what_happened() -> None:
    assert verified() == CallbackEvent(
        id="msg_1",
        type="prompt.succeeded",
        timestamp=dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC),
        data=EVENT["data"],
        job_id=JOB,
        state=JobState.SUCCEEDED,
    )


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "expired"])
def test_every_end_of_a_job_has_an_event(state: str) -> None:
    event = verified({**EVENT, "type": f"prompt.{state}", "data": {"id": str(JOB), "state": state}})
    assert event.state is JobState(state)


def test_an_event_about_no_single_job_has_neither_job_nor_state() -> None:
    event = verified({**EVENT, "type": "batch.completed", "data": {"id": "b", "state": "done"}})
    assert (event.job_id, event.state) == (None, None)
    assert event.data == {"id": "b", "state": "done"}


def test_a_body_may_be_text() -> None:
    text = orjson.dumps(EVENT).decode()
    assert verify_callback(text, headers_of(text.encode()), SECRET) == verified()
    with pytest.raises(InvalidSignatureError):
        verify_callback("\ud800", headers_of(b""), SECRET)


def test_secrets_may_be_several() -> None:
    body = orjson.dumps(EVENT)
    for known in ([new_secret(), SECRET], f"{new_secret()}, {SECRET}", (SECRET,)):
        assert verify_callback(body, headers_of(body), known).job_id == JOB


def test_without_a_secret_it_is_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    body = orjson.dumps(EVENT)
    monkeypatch.setenv("PROMPTFLEET_CALLBACK_SECRETS", f"{new_secret()},{SECRET}")
    assert verify_callback(body, headers_of(body)).job_id == JOB
    monkeypatch.setenv("PROMPTFLEET_CALLBACK_SECRETS", "")
    with pytest.raises(ConfigurationError, match="without a secret"):
        verify_callback(body, headers_of(body))


def test_another_secret_or_body_is_refused() -> None:
    body = orjson.dumps(EVENT)
    for wrong in (new_secret(), [new_secret(), new_secret()]):
        with pytest.raises(InvalidSignatureError):
            verify_callback(body, headers_of(body), wrong)
    with pytest.raises(InvalidSignatureError):
        verify_callback(body + b" ", headers_of(body), SECRET)


def test_the_tolerance_is_the_receivers_to_choose() -> None:
    body = orjson.dumps(EVENT)
    headers = headers_of(body, age_s=1000)
    with pytest.raises(InvalidSignatureError, match="older than 300 s"):
        verify_callback(body, headers, SECRET)
    assert verify_callback(body, headers, SECRET, tolerance_s=2000).job_id == JOB


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        *(orjson.dumps({k: v for k, v in EVENT.items() if k != missing}) for missing in EVENT),
        orjson.dumps({**EVENT, "timestamp": "yesterday"}),
        orjson.dumps({**EVENT, "timestamp": 7}),
        orjson.dumps({**EVENT, "data": None}),
        orjson.dumps({**EVENT, "data": [1]}),
        orjson.dumps({**EVENT, "data": {"id": "no uuid", "state": "succeeded"}}),
        orjson.dumps({**EVENT, "data": {"id": str(JOB), "state": "sleeping"}}),
        orjson.dumps({**EVENT, "data": {"id": str(JOB)}}),
    ],
)
def test_what_is_signed_and_no_event_is_refused_without_being_shown(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="no event of a fleet") as caught:
        verify_callback(body, headers_of(body), SECRET)
    assert caught.value.field == "body"
    assert caught.value.__suppress_context__
