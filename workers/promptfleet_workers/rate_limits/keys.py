"""Which limits a call counts against: its deployment's, its API key's, and those of its jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from promptfleet_shared.fleet import Deployment, Fleet
from promptfleet_shared.jobs import ClaimedJob
from promptfleet_shared.policies.limits import (
    PERIODS_S,
    DeploymentLimits,
    Dimension,
    LimitRule,
    Rates,
)
from promptfleet_workers.rate_limits.costs import Costs

MICROSECONDS = 1_000_000
_MINUTE = "minute"
_API_KEY = "api_key"
_OF_TENANTS = frozenset({"tenant", "limit_key"})
_MAX_KEPT = 10_000
"""Plans of so many groups of jobs are kept: tenants and keys must not fill our memory."""

Kind = Literal["rate", "window", "permits", "health"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LimitKey:
    """One thing that is counted, all over the fleet; reserve.lua says what each kind is.

    Attributes:
        name: Its own part of the key in Redis.
        tenant: Whose it is, where it is a tenant's.
        label: What people call it, without tenants and their keys: "deployment/limit",
            "API_KEY_ENV/limit" or "per/limit".
        limit: So much a period, or so many at once; None where only the provider may tell.
        period_us: Microseconds.
        health: The name of its deployment's, or its API key's, health.
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
    tenant: str = ""

    def cost(self, costs: Costs) -> float:
        """How much of it a call takes."""
        return 0.0 if self.dimension is None else costs.of(self.dimension)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The keys of a call to one deployment.

    Attributes:
        keys: Its own and those of its API key.
        health: Its own.
        key_health: That of its API key, where the key has limits.
        permits: Those of the keys that are permits.
        learns: True if its responses may lower its own.
    """

    keys: tuple[LimitKey, ...]
    health: LimitKey
    key_health: LimitKey | None = None
    permits: tuple[LimitKey, ...] = ()
    learns: bool = False

    @property
    def rates(self) -> dict[Dimension, LimitKey]:
        """Its own limits of a minute, which its responses may tell of."""
        return {
            key.dimension: key
            for key in self.keys
            if key.kind == "rate" and key.dimension is not None and key.health == self.health.name
        }


class KeyBook:
    """Finds the keys of calls; knows fleet.toml by heart."""

    def __init__(self, fleet: Fleet) -> None:
        """Prepare the keys of all deployments."""
        deployments = [d for model in fleet.models.values() for d in model.deployments]
        of_keys = [rule for rule in fleet.limits.rules if rule.per == _API_KEY]
        plans = {d.name: _plan_of(d, _key_limits(d, of_keys)) for d in deployments}
        self.plans = {name: plan for name, plan in plans.items() if plan is not None}
        self._rules = tuple(rule for rule in fleet.limits.rules if rule.per != _API_KEY)
        self._kept: dict[str, tuple[LimitKey, ...]] = {}

    @property
    def limits_anything(self) -> bool:
        """False if no limit is configured at all."""
        return bool(self.plans or self._rules)

    @property
    def has_windows(self) -> bool:
        """True if any limit is of more than a minute."""
        planned = any(key.kind == "window" for plan in self.plans.values() for key in plan.keys)
        return planned or any(
            rate.period != _MINUTE for rule in self._rules for rate in rule.rates()
        )

    @property
    def has_rules(self) -> bool:
        """True if jobs have limits besides those of their deployments and API keys."""
        return bool(self._rules)

    def of_job(self, job: ClaimedJob) -> tuple[LimitKey, ...]:
        """The keys of our own rules that this job counts against."""
        keys: tuple[LimitKey, ...] = ()
        for per, value, owner in _groups(job):
            kept = self._kept.get(owner)
            if kept is None:
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                tenant = job.tenant if per in _OF_TENANTS else ""
                rules = _rules_for(value, [rule for rule in self._rules if rule.per == per])
                found = [key for rule in rules for key in _keys(rule, owner, per, tenant=tenant)]
                kept = self._kept[owner] = tuple(found)
            keys += kept
        return keys


def _rules_for(value: str, rules: Sequence[LimitRule]) -> Sequence[LimitRule]:
    """The rules that name this value, in place of those for all."""
    return [rule for rule in rules if value in rule.only] or [
        rule for rule in rules if not rule.only
    ]


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


def _key_limits(deployment: Deployment, rules: Sequence[LimitRule]) -> tuple[LimitKey, ...]:
    """The limits of a deployment's API key, after the key's health; empty where it has none."""
    name = deployment.key_name
    chosen = _rules_for(name, rules) if name else ()
    if not chosen:
        return ()
    owner = f"api_key:{name}"
    health = LimitKey(name=f"{owner}:health", label=f"{name}/pause", kind="health")
    limits = [key for rule in chosen for key in _keys(rule, owner, f"{name}", health=health.name)]
    return (health, *limits)


def _plan_of(deployment: Deployment, of_key: tuple[LimitKey, ...]) -> Plan | None:
    """The limits of a call to a deployment; None where there are none."""
    if deployment.limits is None and not of_key:
        return None
    limits = deployment.limits or DeploymentLimits(learn=False)
    owner = f"account:{limits.account}" if limits.account else f"deployment:{deployment.name}"
    label = limits.account or deployment.name
    health = LimitKey(name=f"{owner}:health", label=f"{label}/pause", kind="health")
    keys = [*_keys(limits, owner, label, health=health.name, adaptive=limits.adaptive)]
    if limits.learn:
        known = {key.name for key in keys}
        told = [_told(owner, label, dimension, health.name) for dimension in _TELLING]
        keys += [key for key in told if key.name not in known]
    keys += of_key
    return Plan(
        keys=(health, *keys),
        health=health,
        key_health=of_key[0] if of_key else None,
        permits=tuple(key for key in keys if key.kind == "permits"),
        learns=limits.learn,
    )


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
    rates: Rates,
    owner: str,
    label: str,
    *,
    health: str | None = None,
    adaptive: bool = False,
    tenant: str = "",
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
            tenant=tenant,
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
