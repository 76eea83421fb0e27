"""From a strategy's name in fleet.toml to the load balancer that it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.policies.balancing import ORDERED, ModelBalancing
from promptfleet_workers.balancing.protocol import LoadBalancer
from promptfleet_workers.balancing.strategies import Cheapest, LeastBusy, PeakEwma, Weighted
from promptfleet_workers.plugins import load_path, load_plugin

GROUP = "promptfleet.balancers"
BALANCERS: dict[str, Callable[[ModelBalancing], LoadBalancer]] = {
    "weighted": Weighted,
    "least_busy": LeastBusy,
    "peak_ewma": PeakEwma,
    "cheapest": Cheapest,
}


def build_balancer(options: ModelBalancing, *, field: str) -> LoadBalancer | None:
    """The balancer of these options; None for the order of fleet.toml.

    Args:
        options: Of [balancing], or of a model.
        field: What errors call the place where the strategy stands.

    Raises:
        ConfigurationError: There is no such strategy, or what it names is no load balancer.
    """
    strategy = options.strategy
    if strategy == ORDERED:
        return None
    make: Any = BALANCERS.get(strategy)
    if make is None and ":" in strategy:
        make = load_path(strategy, field=field)
    elif make is None:
        make = load_plugin(GROUP, strategy, field=field, built_in=[ORDERED, *BALANCERS])
    balancer: Any = make(options) if callable(make) else None
    if not callable(getattr(balancer, "order", None)):
        message = f"{field}: {strategy!r} is no load balancer: it makes nothing with an `order`"
        raise ConfigurationError(message)
    found: LoadBalancer = balancer
    return found
