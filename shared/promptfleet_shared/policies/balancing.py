"""How a model's deployments share its jobs: [balancing] in fleet.toml, and what affinity does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from promptfleet_shared.policies.section import Count, Section

ORDERED = "ordered"
"""The strategy that takes deployments as fleet.toml lists them; nothing is measured for it."""
MAX_SESSION_CHARS = 255

Weight = Annotated[float, Field(ge=0)]
Complexity = Annotated[int, Field(ge=1, le=10)]


class BalancingWeights(Section):
    """What counts for the strategy "weighted", and how much; only their ratios matter.

    Attributes:
        load: Of the jobs in flight at the deployment, as a share of what it can take.
        latency: Of the time that its calls take, as a share of the slowest one's.
        cost: Of its price, as a share of the dearest one's.
    """

    load: Weight = 0.4
    latency: Weight = 0.4
    cost: Weight = 0.2

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if self.load + self.latency + self.cost <= 0:
            msg = "at least one of load, latency and cost must be above 0"
            raise ValueError(msg)
        return self


class ModelBalancing(Section):
    """Which of a model's deployments a job goes to.

    Attributes:
        strategy: "ordered", "weighted", "least_busy", "peak_ewma", "cheapest", the name of an
            entry point of the group `promptfleet.balancers`, or a class as "module:Class".
        weights: For "weighted".
        decay_s: Seconds after which a latency that was seen counts for little (1/e) any more.
        prefix_affinity: True to send requests that begin alike to the same deployment, whose
            prefix cache knows that beginning.
        prefix_bytes: The first bytes of a request's messages that make it alike.
        spill_factor: A sticky deployment is passed over when more jobs are in flight there than
            so many times the mean of those that are well,
        spill_min: and more than this.
    """

    strategy: Annotated[str, Field(min_length=1)] = ORDERED
    weights: BalancingWeights = BalancingWeights()
    decay_s: Annotated[float, Field(gt=0)] = 10.0
    prefix_affinity: bool = False
    prefix_bytes: Count = 1024
    spill_factor: Annotated[float, Field(ge=1)] = 1.25
    spill_min: Count = 8


class BalancingSection(ModelBalancing):
    """The same for every model that does not say otherwise.

    Attributes:
        across_models: True to choose among the deployments of all of a tier's models, instead of
            those of one model after the other.
    """

    across_models: bool = False


def rendezvous(key: bytes, names: Sequence[str]) -> list[int]:
    """The indexes of `names` in the order in which `key` prefers them.

    The same for everybody who asks; when a name goes away, only the keys that preferred it move,
    and they are spread over all others. Highest random weight: Thaler and Ravishankar, "Using
    Name-Based Mappings to Increase Hit Rates", IEEE/ACM Transactions on Networking 6(1), 1998.

    Example:
        >>> rendezvous(b"a session", ["one", "two", "three"])
        [1, 0, 2]
    """
    weights = [
        hashlib.blake2b(name.encode(), key=key[:64], digest_size=8).digest() for name in names
    ]
    return sorted(range(len(names)), key=lambda n: weights[n], reverse=True)


def affinity_key(*parts: str) -> bytes:
    """What `rendezvous` takes, of parts that may hold anything."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


def spill_bound(loads: Sequence[int], options: ModelBalancing) -> int:
    """Jobs in flight with which a sticky deployment is full.

    Consistent hashing with bounded loads: no deployment takes more than `spill_factor` times the
    mean, the job that comes included (Mirrokni, Thorup and Zadimoghaddam, SODA 2018,
    https://arxiv.org/abs/1608.01350).

    Args:
        loads: Jobs in flight at each deployment that is well.
        options: The factor, and the least bound.
    """
    mean = (sum(loads) + 1) / max(1, len(loads))
    return max(options.spill_min, math.ceil(options.spill_factor * mean))


def request_prefix(request: str, length: int) -> str:
    """The beginning of a request's messages, or of its prompt or input.

    Args:
        request: The stored request: JSON without white space, keys sorted.
        length: Characters of it that matter.
    """
    for field in ('"messages":', '"prompt":', '"input":'):
        start = request.find(field)
        if start >= 0:
            return request[start : start + len(field) + length]
    return request[:length]
