"""Signatures of callbacks: Standard Webhooks 1.0, with shared secrets (`v1`, HMAC-SHA256).

What is signed is `webhook-id.webhook-timestamp.body`, with the body's bytes as they are sent. While
a secret is rotated, a message has a signature for each. The standard's text:
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from promptfleet_shared.errors import ConfigurationError, InvalidSignatureError

ID_HEADER: Final = "webhook-id"
TIMESTAMP_HEADER: Final = "webhook-timestamp"
SIGNATURE_HEADER: Final = "webhook-signature"
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - tells that a secret follows
MIN_SECRET_BYTES: Final = 24
MAX_SECRET_BYTES: Final = 64
NEW_SECRET_BYTES: Final = 32
TOLERANCE_S: Final = 300.0
"""How far a message's time may be from the receiver's, in seconds, unless told otherwise."""

# A full stop in an id would let the same signed bytes be read as another id, time and body.
_ID = re.compile(r"[\x21-\x2d\x2f-\x7e]{1,255}")
_TIMESTAMP = re.compile(r"[0-9]{1,12}")
_VERSION = "v1,"


class Headers(Protocol):
    """The headers of a request: a mapping, or what a web framework has in its place."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Names, in whatever case, with values."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What the headers of a verified message say.

    Attributes:
        message_id: The same at every attempt to deliver the message.
        timestamp: When this attempt was made, in seconds since 1970.
    """

    message_id: str
    timestamp: int


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` of a message: one signature a secret, in the order of the secrets.

    Args:
        secrets: `whsec_…`; two of them while the receivers change from one to the other.
        message_id: Visible ASCII characters without a full stop.
        timestamp: When the message is sent, in seconds since 1970.
        body: As it is sent, byte for byte.

    Raises:
        ConfigurationError: There is no secret, or one is malformed.
        ValueError: The id or the time can't be signed safely.

    Example:
        >>> sign(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], "msg_1", 1614265330, b"{}")
        'v1,ZztYR0IIDCBCUcYzh8ZE+qsQWpIgtHU7R1hpe8htaD4='
    """
    if not _ID.fullmatch(message_id):
        msg = "a message's id has visible ASCII characters and no full stop"
        raise ValueError(msg)
    if not _TIMESTAMP.fullmatch(str(timestamp)):
        msg = "a message's time is in whole seconds since 1970"
        raise ValueError(msg)
    signed = _signed(message_id, str(timestamp), body)
    return " ".join(_VERSION + _signature(key, signed) for key in _keys(secrets))


def verify(
    secrets: Sequence[str],
    headers: Headers,
    body: bytes,
    *,
    tolerance_s: float = TOLERANCE_S,
    now: Callable[[], float] = time.time,
) -> Verified:
    """Check that a message comes from someone who has one of the secrets, and just now.

    Args:
        secrets: `whsec_…`; any of them will do.
        headers: Of the request; the case of their names does not matter.
        body: As it was received, byte for byte, before any JSON was read from it.
        tolerance_s: How far the message's time may be from ours, in seconds.
        now: Seconds since 1970.

    Raises:
        InvalidSignatureError: It does not; says what is wrong.
        ConfigurationError: There is no secret, or one is malformed.
    """
    keys = _keys(secrets)
    given = {name.lower(): value for name, value in headers.items()}
    message_id = _header(given, ID_HEADER, _ID)
    timestamp = _header(given, TIMESTAMP_HEADER, _TIMESTAMP)
    signatures = _header(given, SIGNATURE_HEADER, None)
    signed = _signed(message_id, timestamp, body)
    if not _matches(keys, signatures, signed):
        raise InvalidSignatureError("no signature of the callback matches a known secret")
    _check_age(int(timestamp), now(), tolerance_s)
    return Verified(message_id=message_id, timestamp=int(timestamp))


def new_secret() -> str:
    """A new random secret, as `sign` and receivers take it."""
    return SECRET_PREFIX + base64.b64encode(os.urandom(NEW_SECRET_BYTES)).decode()


def split_secrets(text: str) -> tuple[str, ...]:
    """The secrets of a comma-separated setting, each checked; none for an empty one.

    Raises:
        ConfigurationError: One of them is malformed.
    """
    found = tuple(part for part in (piece.strip() for piece in text.split(",")) if part)
    for secret in found:
        _key(secret)
    return found


def _header(given: dict[str, str], name: str, form: re.Pattern[str] | None) -> str:
    value = given.get(name, "")
    if not value:
        raise InvalidSignatureError(f"the callback has no {name} header")
    if form is not None and not form.fullmatch(value):
        raise InvalidSignatureError(f"the callback's {name} header is malformed")
    return value


def _check_age(timestamp: int, now: float, tolerance_s: float) -> None:
    """Refuse what is too old or too new; after the signature, so that only senders learn it."""
    if timestamp < now - tolerance_s:
        raise InvalidSignatureError(f"the callback is older than {tolerance_s:g} s")
    if timestamp > now + tolerance_s:
        raise InvalidSignatureError(
            f"the callback's time is more than {tolerance_s:g} s ahead of this machine's clock"
        )


def _matches(keys: Sequence[bytes], signatures: str, signed: bytes) -> bool:
    """True if one of the signatures is right; each is compared in constant time."""
    given = [
        # Of other versions, such as v1a, nothing is known here.
        part.removeprefix(_VERSION).encode("utf-8", "surrogatepass")
        for part in signatures.split(" ")
        if part.startswith(_VERSION)
    ]
    wanted = [_signature(key, signed).encode() for key in keys]
    return any(hmac.compare_digest(ours, theirs) for ours in wanted for theirs in given)


def _signed(message_id: str, timestamp: str, body: bytes) -> bytes:
    return f"{message_id}.{timestamp}.".encode("ascii") + body


def _signature(key: bytes, signed: bytes) -> str:
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode("ascii")


def _keys(secrets: Sequence[str]) -> list[bytes]:
    if isinstance(secrets, str):  # a str is a sequence of strs, too
        secrets = [secrets]
    if not secrets:
        raise ConfigurationError("callbacks can't be signed or verified without a secret")
    return [_key(secret) for secret in secrets]


def _key(secret: str) -> bytes:
    """The key of a secret; the message of an error shows nothing of it."""
    encoded = secret.removeprefix(SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded, validate=True) if encoded != secret else b""
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ConfigurationError(
            f"a callback secret must be {SECRET_PREFIX!r} and {MIN_SECRET_BYTES} to "
            f"{MAX_SECRET_BYTES} bytes in base64, such as `openssl rand -base64 32` prints"
        ) from None
    return key
