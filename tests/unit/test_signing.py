"""Signatures of callbacks, against the standard and against two libraries of others."""

from __future__ import annotations

import base64
import datetime as dt
import hmac
import time
from collections.abc import Mapping

import openai
import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfleet_shared.errors import ConfigurationError, InvalidSignatureError
from promptfleet_shared.signing import (
    ID_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    new_secret,
    sign,
    split_secrets,
    verify,
)

# The worked example that the libraries of the standard and their many ports share.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

HEADERS = {ID_HEADER: ID, TIMESTAMP_HEADER: str(TIMESTAMP), SIGNATURE_HEADER: SIGNATURE}
OTHER = "whsec_" + base64.b64encode(b"o" * 24).decode()

CLIENT = openai.OpenAI(api_key="none")

ids = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="."))
bodies = st.text(st.characters(codec="utf-8")).map(str.encode)


def check(headers: Mapping[str, str], body: bytes = BODY, *secrets: str, late_s: float = 0) -> None:
    verify(secrets or (SECRET,), headers, body, now=lambda: TIMESTAMP + late_s)


def headers_of(secrets: list[str], message_id: str, body: bytes) -> dict[str, str]:
    now = int(time.time())
    return {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(now),
        SIGNATURE_HEADER: sign(secrets, message_id, now, body),
    }


def test_the_standards_example_is_signed_and_verified() -> None:
    assert sign([SECRET], ID, TIMESTAMP, BODY) == SIGNATURE
    verified = verify([SECRET], HEADERS, BODY, now=lambda: TIMESTAMP)
    assert (verified.message_id, verified.timestamp) == (ID, TIMESTAMP)


@given(ids.filter(bool), bodies, st.binary(min_size=24, max_size=64))
@settings(deadline=None)
def test_others_verify_what_we_sign(message_id: str, body: bytes, key: bytes) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    headers = headers_of([secret], message_id, body)

    standardwebhooks.Webhook(secret).verify(body, headers, json_parse=False)
    CLIENT.webhooks.verify_signature(body, headers, secret=secret)


@given(ids.filter(bool), bodies, st.binary(min_size=24, max_size=64))
@settings(deadline=None)
def test_we_verify_what_others_sign(message_id: str, body: bytes, key: bytes) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    now = dt.datetime.now(dt.UTC)
    signature = standardwebhooks.Webhook(secret).sign(message_id, now, body.decode())
    headers = {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(int(now.timestamp())),
        SIGNATURE_HEADER: signature,
    }

    assert verify([secret], headers, body).message_id == message_id


@pytest.mark.parametrize("place", [0, 1])
def test_while_rotating_receivers_with_either_secret_are_served(place: int) -> None:
    secrets = [new_secret(), new_secret()]
    body = b'{"type":"prompt.succeeded"}'
    headers = headers_of(secrets, "evt_1", body)
    theirs = secrets[place]

    assert len(headers[SIGNATURE_HEADER].split(" ")) == 2
    assert verify([theirs], headers, body).message_id == "evt_1"
    assert standardwebhooks.Webhook(theirs).verify(body, headers) == {"type": "prompt.succeeded"}
    assert CLIENT.webhooks.unwrap(body, headers, secret=theirs).type == "prompt.succeeded"  # type: ignore[comparison-overlap]  # a type of ours


def test_the_first_secret_signs_first_and_any_known_one_verifies() -> None:
    both = sign([SECRET, OTHER], ID, TIMESTAMP, BODY)
    assert both.split(" ")[0] == SIGNATURE
    check({**HEADERS, SIGNATURE_HEADER: both.split(" ")[1]}, BODY, SECRET, OTHER)


def test_other_versions_are_passed_over() -> None:
    check({**HEADERS, SIGNATURE_HEADER: f"v1a,AAAA v2,x nonsense {SIGNATURE}"})
    for version in ("v1a,", "v2,", "V1,", ",", ""):
        wrong = SIGNATURE.replace("v1,", version)
        with pytest.raises(InvalidSignatureError, match="no signature"):
            check({**HEADERS, SIGNATURE_HEADER: wrong})


def test_names_of_headers_may_have_any_case() -> None:
    check({name.title(): value for name, value in HEADERS.items()})
    check({name.upper(): value for name, value in HEADERS.items()})


@pytest.mark.parametrize("name", [ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER])
def test_a_missing_header_is_named(name: str) -> None:
    with pytest.raises(InvalidSignatureError, match=f"no {name} header"):
        check({key: value for key, value in HEADERS.items() if key != name})


@pytest.mark.parametrize(
    ("late_s", "complaint"), [(300, None), (301, "older"), (-300, None), (-301, "ahead")]
)
def test_only_recent_messages_are_taken(late_s: float, complaint: str | None) -> None:
    if complaint is None:
        check(HEADERS, late_s=late_s)
    else:
        with pytest.raises(InvalidSignatureError, match=complaint):
            check(HEADERS, late_s=late_s)


@pytest.mark.parametrize(
    "change",
    [
        {ID_HEADER: "msg_other"},
        {TIMESTAMP_HEADER: str(TIMESTAMP + 1)},
        {SIGNATURE_HEADER: SIGNATURE[:-2] + "A="},
        {SIGNATURE_HEADER: "v1,"},
        {SIGNATURE_HEADER: "v1,ä\ud800"},
    ],
)
def test_whatever_is_changed_is_noticed(change: dict[str, str]) -> None:
    with pytest.raises(InvalidSignatureError, match="no signature"):
        check(HEADERS | change)


def test_a_changed_body_or_another_secret_is_noticed() -> None:
    for body, secret in [(BODY + b" ", SECRET), (b"", SECRET), (BODY, OTHER)]:
        with pytest.raises(InvalidSignatureError, match="no signature"):
            check(HEADERS, body, secret)


@pytest.mark.parametrize(
    "change",
    [
        {TIMESTAMP_HEADER: "1614265330.0"},
        {TIMESTAMP_HEADER: " 1614265330"},
        {TIMESTAMP_HEADER: "١٦١٤٢٦٥٣٣٠"},
        {TIMESTAMP_HEADER: "9" * 5000},
        {TIMESTAMP_HEADER: "-1"},
        {ID_HEADER: "msg.1"},
        {ID_HEADER: "msg\n1"},
        {ID_HEADER: "x" * 256},
    ],
)
def test_a_malformed_header_is_named(change: dict[str, str]) -> None:
    with pytest.raises(InvalidSignatureError, match=f"{next(iter(change))} header is malformed"):
        check(HEADERS | change)


def test_bytes_can_not_move_from_one_part_into_the_next() -> None:
    """`a.1.2.{}` would be the id `a.1` at 2, or the id `a` at 1 with another body."""
    with pytest.raises(ValueError, match="no full stop"):
        sign([SECRET], "a.1", 2, b"{}")
    signature = sign([SECRET], "a", 1, b"2.{}")
    moved = {ID_HEADER: "a.1", TIMESTAMP_HEADER: "2", SIGNATURE_HEADER: signature}
    with pytest.raises(InvalidSignatureError):
        verify([SECRET], moved, b"{}", now=lambda: 2)


@pytest.mark.parametrize("timestamp", [-1, 10**12])
def test_what_is_no_time_is_not_signed(timestamp: int) -> None:
    with pytest.raises(ValueError, match="seconds"):
        sign([SECRET], ID, timestamp, BODY)


def test_a_new_secret_is_long_enough_and_new() -> None:
    made = {new_secret() for _ in range(20)}
    assert len(made) == 20
    assert {len(base64.b64decode(secret.removeprefix("whsec_"))) for secret in made} == {32}


def encoded(size: int) -> str:
    return base64.b64encode(b"k" * size).decode()


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        encoded(32),
        "whsk_" + encoded(32),
        "WHSEC_" + encoded(32),
        "whsec_" + encoded(23),
        "whsec_" + encoded(65),
        "whsec_" + encoded(32)[:-1],
        "whsec_ " + encoded(32),
        "whsec_" + encoded(32).replace("a", "-"),
        "whsec_" + "ü" * 40,
    ],
)
def test_a_malformed_secret_is_refused_and_not_shown(secret: str) -> None:
    for use in (
        lambda: sign([secret], ID, TIMESTAMP, BODY),
        lambda: sign([SECRET, secret], ID, TIMESTAMP, BODY),
        lambda: check(HEADERS, BODY, secret),
        lambda: split_secrets(f"{SECRET},{secret or 'x'}"),
    ):
        with pytest.raises(ConfigurationError, match="24 to 64 bytes") as caught:
            use()
        shown = f"{caught.value.message} {caught.value.facts} {caught.value.__cause__}"
        assert len(secret) < 7 or secret not in shown
        assert caught.value.__suppress_context__


@pytest.mark.parametrize("size", [24, 64])
def test_the_shortest_and_the_longest_secret_are_taken(size: int) -> None:
    assert sign(["whsec_" + encoded(size)], ID, TIMESTAMP, BODY)


def test_no_secret_at_all_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(ConfigurationError, match="without a secret"):
        sign([], ID, TIMESTAMP, BODY)
    with pytest.raises(ConfigurationError, match="without a secret"):
        verify([], HEADERS, BODY)


def test_secrets_are_split_at_commas() -> None:
    assert split_secrets(f" {SECRET} ,{OTHER},") == (SECRET, OTHER)
    assert split_secrets("") == ()


def test_comparison_takes_the_same_time_for_any_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one function that promises it."""
    seen: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        seen.append((ours, theirs))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with pytest.raises(InvalidSignatureError):
        check(HEADERS)
    assert seen == [(SIGNATURE[3:].encode(), SIGNATURE[3:].encode())]
