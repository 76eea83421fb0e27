"""Ids as OpenAI's clients see them: a prefix and a UUID without dashes."""

from __future__ import annotations

import re
import uuid

from promptfleet.api.errors import not_found

FILE, BATCH, RESPONSE = "file-", "batch_", "resp_"
_NAMES = {FILE: "file", BATCH: "batch", RESPONSE: "response"}
_HEX = re.compile(r"[0-9a-f]{32}")


def public_id(prefix: str, value: uuid.UUID) -> str:
    """The id for clients."""
    return prefix + value.hex


def private_id(prefix: str, text: str, *, param: str | None = None) -> uuid.UUID:
    """The id of the row.

    Raises:
        ApiError: 404; nothing has such an id.
    """
    value = text.removeprefix(prefix)
    if len(value) == len(text) or not _HEX.fullmatch(value):
        raise not_found(_NAMES[prefix], param=param)
    return uuid.UUID(value)
