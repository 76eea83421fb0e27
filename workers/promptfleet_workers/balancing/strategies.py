"""The load balancers that come with promptfleet."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from promptfleet_shared.policies.balancing import ModelBalancing
from promptfleet_workers.balancing.protocol import Choice, JobFacts

Random = Callable[[], float]
"""Gives numbers from 0 to 1, as `random.random` does."""

_UNKNOWN = math.inf


class LeastBusy:
    """The fewest jobs in flight, as a share of `max_concurrency` where both have one."""

    def __init__(self, _options: ModelBalancing, random: Random = random.random) -> None:
        """Nothing to set."""
        self._random = random

    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:  # noqa: ARG002 - a protocol
        """Least busy first; of equals, chance decides, so that workers don't move in a herd."""
        shares = all(choice.max_concurrency for choice in choices)
        keys = {
            id(choice): (
                choice.in_flight / (choice.max_concurrency or 1) if shares else choice.in_flight,
                self._random(),
            )
            for choice in choices
        }
        return sorted(choices, key=lambda choice: keys[id(choice)])


class PeakEwma:
    """The power of two choices: of two at random, the one with less latency times load.

    The load includes the job that comes, as in Finagle's PeakEwma and linkerd's balancer. Two
    random ones are nearly as good as the best of all, and better where what is known is a little
    old: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001. Source:
    https://github.com/twitter/finagle, finagle-core/src/main/scala/com/twitter/finagle/
    loadbalancer/PeakEwma.scala.
    """

    def __init__(self, _options: ModelBalancing, random: Random = random.random) -> None:
        """Nothing to set: the decay is that of the latencies."""
        self._random = random

    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:  # noqa: ARG002 - a protocol
        """The better one of two, the other, the rest."""
        count = len(choices)
        first = min(int(self._random() * count), count - 1)
        second = min(int(self._random() * (count - 1)), count - 2)
        second += second >= first
        if _peak_cost(choices[second]) < _peak_cost(choices[first]):
            first, second = second, first
        rest = [choice for n, choice in enumerate(choices) if n not in {first, second}]
        return [choices[first], choices[second], *rest]


def _peak_cost(choice: Choice) -> float:
    latency_s, in_flight = choice.latency_s, choice.in_flight
    if latency_s is None:
        # Nobody knows: one job finds out, and others wait for what it finds.
        return _UNKNOWN if in_flight else 0.0
    return latency_s * (in_flight + 1)


class Cheapest:
    """The lowest price that has room; of equal prices, the least busy."""

    def __init__(self, options: ModelBalancing, random: Random = random.random) -> None:
        """Nothing to set."""
        self._least_busy = LeastBusy(options, random)

    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:
        """Cheapest first; those whose price nobody knows, last."""
        by_load = self._least_busy.order(job, choices)
        return sorted(by_load, key=lambda choice: _UNKNOWN if choice.usd is None else choice.usd)


class Weighted:
    """The lowest sum of load, latency and cost, each a share of the worst one's, by its weight."""

    def __init__(self, options: ModelBalancing, random: Random = random.random) -> None:
        """Take the weights from the options."""
        self._weights = options.weights
        self._random = random

    def order(self, job: JobFacts, choices: Sequence[Choice]) -> list[Choice]:  # noqa: ARG002 - a protocol
        """Lowest score first; of equals, chance decides."""
        scores = self.scores(choices)
        keys = {id(c): (score, self._random()) for c, score in zip(choices, scores, strict=True)}
        return sorted(choices, key=lambda choice: keys[id(choice)])

    def scores(self, choices: Sequence[Choice]) -> list[float]:
        """From 0, the best, to the sum of the weights.

        A latency that nobody knows counts as none, so that somebody finds out; a price that nobody
        knows counts as the dearest one.
        """
        weights = self._weights
        busiest = max(choice.in_flight for choice in choices) + 1
        slowest = max(choice.latency_s or 0.0 for choice in choices) or 1.0
        dearest = max(choice.usd or 0.0 for choice in choices) or 1.0
        return [
            weights.load * min(1.0, (choice.in_flight + 1) / (choice.max_concurrency or busiest))
            + weights.latency * (choice.latency_s or 0.0) / slowest
            + weights.cost * (1.0 if choice.usd is None else choice.usd / dearest)
            for choice in choices
        ]
