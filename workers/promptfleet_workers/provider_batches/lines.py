"""A line's custom id: its job, and the fence of the claim that was given away for it."""

from __future__ import annotations

import uuid

from promptfleet_shared.store.provider_batches import LineKey


def custom_id(key: LineKey) -> str:
    """At most 52 characters: letters, digits and a dash.

    Example:
        >>> custom_id(LineKey(job_id=uuid.UUID(int=1), fence=2))
        '00000000000000000000000000000001-2'
    """
    return f"{key.job_id.hex}-{key.fence}"


def key_of(text: str) -> LineKey | None:
    """The line that a custom id tells; None if it is none of ours."""
    job, _, fence = text.partition("-")
    try:
        return LineKey(job_id=uuid.UUID(hex=job), fence=int(fence))
    except ValueError:
        return None
