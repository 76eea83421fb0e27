"""Which limits a call counts against: those of its deployment, and those of the jobs it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from promptfleet_shared.fleet import Deployment, Fleet
from promptfleet_shared.jobs import ClaimedJob
from promptfleet_shared.policies.limits import PERIODS_S, Dimension, LimitRule, Rates
from promptfleet_workers.rate_limits.costs import Costs

MICROSECONDS = 1_000_000
_MINUTE = "minute"
_MAX_KEPT = 10_000
"""Plans of so many groups of jobs are kept: tenants and keys must not fill our memory."""

Kind = Literal["rate", "window", "permits", "health"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitKey:
    """One thing that is counted, all over the fleet; reserve.lua says what each kind is.

    Attributes:
        name: Its own part of the key in Redis.
        label: What people call it, without tenants and keys: "deployment/limit" or "per/limit".
        limit: So much a period, or so many at once; None where only the provider may tell.
        period_us: Microseconds.
        health: The name of its deployment's health.
        dimension: What it counts; None for permits and health.
        adaptive: True for permits whose number is found out.
    """

    name: str
    label: str
    kind: Kind
    limit: float | None = None
    period_us: int = 0
    health: str | None = None
    dimension: Dimension | None = None
    adaptive: bool = False

    def cost(self, costs: Costs) -> float:
        """How much of it a call takes."""
        return 0.0 if self.dimension is None else costs.of(self.dimension)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The keys of a call to one deployment; `learns` if its responses may lower them."""

    keys: tuple[LimitKey, ...]
    health: LimitKey | None = None
    permits: tuple[LimitKey, ...] = ()
    learns: bool = False


class KeyBook:
    """Finds the keys of calls; knows fleet.toml by heart."""

    def __init__(self, fleet: Fleet) -> None:
        """Prepare the keys of all deployments."""
        deployments = [d for model in fleet.models.values() for d in model.deployments]
        self.plans = {d.name: _plan_of(d) for d in deployments if d.limits is not None}
        self._rules = fleet.limits.rules
        self._kept: dict[str, tuple[LimitKey, ...]] = {}

    @property
    def limits_anything(self) -> bool:
        """False if no limit is configured at all."""
        return bool(self.plans or self._rules)

    @property
    def has_rules(self) -> bool:
        """True if jobs have limits besides those of their deployments."""
        return bool(self._rules)

    def of_job(self, job: ClaimedJob) -> tuple[LimitKey, ...]:
        """The keys of our own rules that this job counts against."""
        keys: tuple[LimitKey, ...] = ()
        for per, value, owner in _groups(job):
            kept = self._kept.get(owner)
            if kept is None:
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                kept = self._kept[owner] = tuple(self._keys_of(per, value, owner))
            keys += kept
        return keys

    def _keys_of(self, per: str, value: str, owner: str) -> Sequence[LimitKey]:
        rules = [rule for rule in self._rules if rule.per == per]
        own = [rule for rule in rules if value in rule.only]
        chosen: Sequence[LimitRule] = own or [rule for rule in rules if not rule.only]
        return [key for rule in chosen for key in _keys(rule, owner, per)]


def _groups(job: ClaimedJob) -> list[tuple[str, str, str]]:
    """What a job belongs to: the rule's `per`, the value, and the owner of the keys."""
    groups = [
        ("fleet", "", "fleet"),
        ("tier", job.tier, f"tier:{job.tier}"),
        ("tenant", job.tenant, f"tenant:{job.tenant}"),
    ]
    limit_key = job.policy.get("limit_key")
    if isinstance(limit_key, str):
        # The same word of two tenants is not the same key.
        groups.append(("limit_key", limit_key, f"limit_key:{job.tenant}:{limit_key}"))
    return groups


def _plan_of(deployment: Deployment) -> Plan:
    limits = deployment.limits
    assert limits is not None  # noqa: S101 - for the type checkers
    owner = f"account:{limits.account}" if limits.account else f"deployment:{deployment.name}"
    label = limits.account or deployment.name
    health = LimitKey(name=f"{owner}:health", label=f"{label}/pause", kind="health")
    keys = [*_keys(limits, owner, label, health=health.name, adaptive=limits.adaptive)]
    if limits.learn:
        known = {key.name for key in keys}
        told = [_told(owner, label, dimension, health.name) for dimension in _TELLING]
        keys += [key for key in told if key.name not in known]
    permits = tuple(key for key in keys if key.kind == "permits")
    return Plan(keys=(health, *keys), health=health, permits=permits, learns=limits.learn)


_TELLING = (
    Dimension.REQUESTS,
    Dimension.INPUT_TOKENS,
    Dimension.OUTPUT_TOKENS,
    Dimension.TOKENS,
)
"""What providers tell limits of."""


def _told(owner: str, label: str, dimension: Dimension, health: str) -> LimitKey:
    """A limit that only the provider may set."""
    name = f"{dimension.value}_per_{_MINUTE}"
    return LimitKey(
        name=f"{owner}:{name}",
        label=f"{label}/{name}",
        kind="rate",
        period_us=PERIODS_S[_MINUTE] * MICROSECONDS,
        health=health,
        dimension=dimension,
    )


def _keys(
    rates: Rates, owner: str, label: str, *, health: str | None = None, adaptive: bool = False
) -> list[LimitKey]:
    keys = [
        LimitKey(
            name=f"{owner}:{rate.name}",
            label=f"{label}/{rate.name}",
            kind="rate" if rate.period == _MINUTE else "window",
            limit=rate.amount,
            period_us=rate.period_s * MICROSECONDS,
            health=health,
            dimension=rate.dimension,
        )
        for rate in rates.rates()
    ]
    if rates.max_concurrency is not None or adaptive:
        keys.append(
            LimitKey(
                name=f"{owner}:max_concurrency",
                label=f"{label}/max_concurrency",
                kind="permits",
                limit=rates.max_concurrency,
                health=health,
                adaptive=adaptive,
            )
        )
    return keys
