"""The notice that jobs have ended, from workers to whoever waits: ids only, and never the truth.

A worker publishes one message for each batch of ends that it has committed, on the cache's server.
A notice may be lost, or come twice; who waits for one looks into the database now and then, too.
Jobs that a sweeper or a cancellation ends are not announced.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

CHANNEL = "promptfleet:finished"
_ID_BYTES = 16


def encode_notice(ids: Iterable[uuid.UUID]) -> bytes:
    """One message: 16 bytes for each job."""
    return b"".join([job_id.bytes for job_id in ids])


def decode_notice(message: bytes) -> list[bytes]:
    """The bytes of each id; none for a message that is not of this release."""
    if len(message) % _ID_BYTES:
        return []
    return [message[at : at + _ID_BYTES] for at in range(0, len(message), _ID_BYTES)]
