"""What a worker's breaker and the fleet's, in Redis, tell each other; breaker.lua reads it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from promptfleet_shared.fleet import BreakerOptions

State = Literal["closed", "open", "ramp"]
Probe = Literal["", "ask", "running", "ok", "failed", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """The options as breaker.lua reads them."""

    window_ms: float
    min_calls: int
    failure_share: float
    cool_down_ms: float
    max_cool_down_ms: float
    ramp_ms: float
    retry_share: float
    retries_per_s: float

    @classmethod
    def of(cls, options: BreakerOptions) -> Terms:
        """From fleet.toml."""
        return cls(
            window_ms=options.window_s * 1000,
            min_calls=options.min_calls,
            failure_share=options.failure_share,
            cool_down_ms=options.cool_down_s * 1000,
            max_cool_down_ms=options.max_cool_down_s * 1000,
            ramp_ms=options.ramp_s * 1000,
            retry_share=options.retry_share,
            retries_per_s=options.retries_per_s,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a worker saw since its last report, and what it takes the fleet's view to be.

    Attributes:
        worker: Who reports.
        epoch: The epoch of the fleet's view that the worker acts on; the counts are this epoch's.
        ok: Calls that ended well.
        failed: Calls that failed.
        firsts: First calls of jobs, which earn retries.
        tokens: Retries that were granted and not used; below 0 if one was used ahead of its grant.
        want: Retries that the worker could use.
        probe: What there is to say about a probe.
        tripped: True if the worker opened by its own counts.
        stop_ms: How long nobody may call, because the key's quota is exhausted; else 0.
        state: The fleet's state as this worker knows it, in case that the server has lost it; so
            are the next four.
        opens: Openings in a row.
        until_ms: Until a probe may be made.
        ramp_ms: Since the ramp began.
        stopped: True if the opening was a stop.
    """

    worker: str
    epoch: int
    ok: int
    failed: int
    firsts: int
    tokens: float
    want: int
    probe: Probe
    tripped: bool
    stop_ms: float
    state: State
    opens: int
    until_ms: float
    ramp_ms: float
    stopped: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FleetView:
    """What the fleet knows of a deployment.

    Attributes:
        probe: True if this worker has the token for a probe.
        well: True if the window holds enough calls and few failures: retries need no token.
        tokens: Retries that are granted to this worker.
        spare: True if there are more, so that one may be used ahead of its grant.
        calls: Calls in the window.
        failed: Failed ones among them.
    """

    state: State
    epoch: int
    opens: int
    until_ms: float
    stopped: bool
    ramp_ms: float
    probe: bool
    well: bool
    tokens: int
    spare: bool
    calls: int
    failed: int
