"""Values that are of use to who has the key only: AES-256-GCM, with keys that can be changed.

A sealed value is: a version, the first 4 bytes of its key's SHA-256, a random nonce of 12 bytes,
and what AES-GCM makes of the plain bytes. The name under which it is kept is authenticated with
it, so that no value passes for another one's. With random nonces, a key is good for 2^32 values
(NIST SP 800-38D, 8.3): change it before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from promptfleet_shared.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
_VERSION = b"\x02"
_ID_BYTES = 4
_NONCE_BYTES = 12
_HEAD_BYTES = 1 + _ID_BYTES + _NONCE_BYTES


class AesGcm:
    """Seals with the first of its keys, and opens with any of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Keys of 32 bytes each, at least one."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra of its own
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - as above

        self._invalid = InvalidTag
        self._ciphers: dict[bytes, AESGCM] = {_id(key): AESGCM(key) for key in keys}
        self._newest = _id(keys[0])

    @classmethod
    def of_environment(cls, variable: str) -> Self:
        """The keys that an environment variable holds, in base64, divided by commas.

        Raises:
            ConfigurationError: It holds none, or something else; or the library is missing.
        """
        field = "cache.encryption_key_env"
        texts = [text.strip() for text in os.environ.get(variable, "").split(",") if text.strip()]
        if not texts:
            msg = f"{field}: the environment variable {variable} is not set"
            raise ConfigurationError(msg)
        keys = [_key(text) for text in texts]
        for n, key in enumerate(keys, 1):
            if key is None:
                msg = f"{field}: key {n} of {variable} is not {KEY_BYTES} bytes in base64"
                raise ConfigurationError(msg)
        try:
            return cls([key for key in keys if key is not None])
        except ImportError:
            msg = f"{field}: needs cryptography; pip install 'promptfleet[encryption]'"
            raise ConfigurationError(msg) from None

    def seal(self, name: str, plain: bytes) -> bytes:
        """The bytes, for this name only."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[self._newest].encrypt(nonce, plain, name.encode())
        return _VERSION + self._newest + nonce + sealed

    def open(self, name: str, sealed: bytes) -> bytes | None:
        """The bytes as they were; None for a key or a name that is not theirs, or any damage."""
        cipher = self._ciphers.get(sealed[1 : 1 + _ID_BYTES])
        if cipher is None or sealed[:1] != _VERSION or len(sealed) < _HEAD_BYTES:
            return None
        nonce = sealed[1 + _ID_BYTES : _HEAD_BYTES]
        try:
            return cipher.decrypt(nonce, sealed[_HEAD_BYTES:], name.encode())
        except self._invalid:
            return None


def _id(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:_ID_BYTES]


def _key(text: str) -> bytes | None:
    """32 bytes from either alphabet of base64, with or without its padding."""
    bare = text.replace("-", "+").replace("_", "/").rstrip("=")
    padded = bare + "=" * (-len(bare) % 4)
    try:
        key = base64.b64decode(padded, validate=True)
    except binascii.Error:
        return None
    return key if len(key) == KEY_BYTES else None
