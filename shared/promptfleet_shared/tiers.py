"""Tiers: how much model a prompt gets, and the queue that stands for it."""

from __future__ import annotations

import re

DEFAULT_TIERS = ("basic", "standard", "advanced")
QUEUE_PREFIX = "prompts."
AUTO_TIER = "auto"
"""The tier that stands for the choice among all others."""
TIER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


def queue_name(tier: str) -> str:
    """The Celery queue of a tier, e.g. ``prompts.basic``."""
    return QUEUE_PREFIX + tier


def tier_of_queue(queue: str) -> str | None:
    """The tier whose queue this is, or None for a queue of somebody else's."""
    return queue.removeprefix(QUEUE_PREFIX) if queue.startswith(QUEUE_PREFIX) else None
