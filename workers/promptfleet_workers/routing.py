"""Which models, on which deployments, may answer a job, in order of preference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from promptfleet_shared.fleet import Deployment, Fleet, TimeoutOptions
from promptfleet_shared.jobs import ClaimedJob
from promptfleet_workers.providers.protocol import Provider


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A deployment that may answer, with all that a call to it needs."""

    model: str
    price_as: str | None
    deployment: Deployment
    provider: Provider
    timeouts: TimeoutOptions

    @property
    def model_there(self) -> str:
        """What the deployment itself calls the model."""
        return self.deployment.model or self.model


class Router:
    """Reads routes from fleet.toml: the job's own model, else its tier's models in order."""

    def __init__(self, fleet: Fleet, providers: Mapping[str, Provider]) -> None:
        """Prepare the routes.

        Args:
            fleet: Tiers, models and deployments.
            providers: The provider of each deployment, by the deployment's name.
        """
        self._fleet = fleet
        self._providers = providers
        self._routes: dict[tuple[str, str | None], tuple[Candidate, ...]] = {}

    def route(self, job: ClaimedJob) -> tuple[Candidate, ...]:
        """The candidates for a job, best first; none if nothing is configured for it."""
        key = (job.tier, job.model)
        known = self._routes.get(key)
        if known is None:
            known = self._routes[key] = tuple(self._candidates(*key))
        return known

    def candidates_of(self, model: str) -> tuple[Candidate, ...]:
        """Who answers for a model of the fleet, for calls that are no job's own."""
        return tuple(self._candidates(self._fleet.default_tier, model))

    def _candidates(self, tier: str, model: str | None) -> list[Candidate]:
        section = self._fleet.tiers.get(tier)
        names = (model,) if model is not None else (section.models if section else ())
        return [
            Candidate(
                model=name,
                price_as=deployment.price_as or self._fleet.models[name].price_as,
                deployment=deployment,
                provider=self._providers[deployment.name],
                timeouts=self._fleet.timeout_options(tier, deployment),
            )
            for name in names
            if name in self._fleet.models
            for deployment in self._fleet.models[name].deployments
        ]
