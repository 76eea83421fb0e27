"""From the deployments of fleet.toml that have `batch_api` to what speaks to it."""

from __future__ import annotations

from collections.abc import Callable

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import Deployment, Fleet
from promptfleet_workers.providers.anthropic_batches import AnthropicBatches
from promptfleet_workers.providers.batch_protocol import BatchApi
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.openai_batches import OpenAIBatches

BATCH_APIS: dict[str, Callable[[Deployment, HttpClient], BatchApi]] = {
    "openai": OpenAIBatches,
    "anthropic": AnthropicBatches,
}


def build_batch_apis(fleet: Fleet, client: HttpClient) -> dict[str, BatchApi]:
    """The batch APIs of the fleet, by their deployments' names; empty where it uses none.

    Raises:
        ConfigurationError: A deployment's protocol has none.
    """
    return {
        deployment.name: _build(deployment, client)
        for model in fleet.models.values()
        for deployment in model.deployments
        if deployment.batch_api
    }


def _build(deployment: Deployment, client: HttpClient) -> BatchApi:
    build = BATCH_APIS.get(deployment.provider)
    if build is None:
        known = ", ".join(sorted(BATCH_APIS))
        message = (
            f"deployment {deployment.name!r}: batch_api: true was given, and the provider"
            f" {deployment.provider!r} has no batch API here; only {known} have"
        )
        raise ConfigurationError(message)
    return build(deployment, client)
