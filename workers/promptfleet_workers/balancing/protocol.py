"""What a load balancer is to the workers: something that orders deployments for a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from promptfleet_shared.jobs import JobKind


class JobFacts(NamedTuple):
    """What a balancer may know of a job; never its prompt.

    A tuple, as the job itself is: one is made for each job.

    Attributes:
        input_tokens: An estimate.
        complexity: From 1 to 10, where the job's tier was chosen by it, or its caller said so.
        session_id: What the caller named to keep prompts together.
    """

    tenant: str
    tier: str
    kind: JobKind
    input_tokens: int
    priority: int
    complexity: float | None
    session_id: str | None


class Choice(Protocol):
    """A deployment that may answer a job, and how it stands at this moment."""

    @property
    def deployment(self) -> str:
        """Its name in fleet.toml."""
        ...

    @property
    def model(self) -> str:
        """The fleet's name of the model that it answers for."""
        ...

    @property
    def in_flight(self) -> int:
        """Jobs in flight there from the whole fleet, those of this worker up to date."""
        ...

    @property
    def max_concurrency(self) -> int | None:
        """How many there should be at most."""
        ...

    @property
    def latency_s(self) -> float | None:
        """Seconds that a call takes, the fleet's peak-EWMA; None while nobody knows."""
        ...

    @property
    def usd(self) -> float | None:
        """US dollars of 1,000 input and 250 output tokens; None where no price is known."""
        ...


class LoadBalancer(Protocol):
    """Orders the deployments that may answer a job.

    A class of your own is made with the options of `[balancing]`, once for each model that names
    it, and is asked on the event loop for each job: it must not block.
    """

    def order(self, job: JobFacts, choices: Sequence[Choice]) -> Sequence[Choice]:
        """The choices, best first; what is left out is asked last.

        Args:
            job: Who asks.
            choices: At least two, as fleet.toml lists them: their breakers let calls through, they
                have room, and the job is not too complex for them.
        """
        ...
