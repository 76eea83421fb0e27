"""Providers' own batch APIs: when a job goes that way, and how its lines are gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from promptfleet_shared.jobs import Service
from promptfleet_shared.policies.section import Count, Section

OPTION = "service"
"""The name of the option, and of what a result's `decision` tells of it."""

Seconds = Annotated[float, Field(gt=0)]


class BatchServiceSection(Section):
    """How jobs of `service="batch"` are gathered, watched and, if need be, taken back.

    Attributes:
        gather_s: Seconds that a provider's batch stays open after its first job.
        max_lines: Jobs of one batch at most; the provider's own limit holds besides.
        max_bytes: Bytes of one batch at most; the provider's own limit holds besides.
        poll_s: Seconds between two looks at a batch that the provider has.
        spill_before_s: Seconds before its deadline that an unanswered job is taken back, to be
            answered by a call of its own.
        auto_from_s: Seconds to its deadline from which a job of `service="auto"` takes this way.
        settle_s: Seconds after which a batch whose making nobody saw the end of must show in the
            provider's list, if it was made; only then it is made again.
    """

    gather_s: Seconds = 60.0
    max_lines: Count = 50_000
    max_bytes: Count = 200_000_000
    poll_s: Seconds = 60.0
    spill_before_s: Annotated[float, Field(ge=0)] = 3_600.0
    auto_from_s: Seconds = 43_200.0
    settle_s: Seconds = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which way a job goes; `why` where it is not the one that it asked for."""

    is_batch: bool
    why: str | None = None


NOT_ASKED = Choice(is_batch=False)
_BATCH = Choice(is_batch=True)
_TOO_LATE = Choice(is_batch=False, why="deadline")


def choose(policy: Mapping[str, Any], remaining_s: float, options: BatchServiceSection) -> Choice:
    """The way of a job with this policy and so many seconds to its deadline.

    Example:
        >>> choose({"service": "auto"}, 86_400, BatchServiceSection()).is_batch
        True
        >>> choose({"service": "batch"}, 60, BatchServiceSection())
        Choice(is_batch=False, why='deadline')
    """
    asked = policy.get(OPTION)
    if asked == Service.AUTO:
        return _BATCH if remaining_s >= options.auto_from_s else _TOO_LATE
    if asked == Service.BATCH:
        return _BATCH if remaining_s > options.spill_before_s else _TOO_LATE
    return NOT_ASKED
