"""From a deployment in fleet.toml to the provider that speaks its protocol."""

from __future__ import annotations

from collections.abc import Callable

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import Deployment
from promptfleet_workers.providers.anthropic import AnthropicProvider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Provider

PROVIDERS: dict[str, Callable[[Deployment, HttpClient], Provider]] = {
    "openai": OpenAIProvider,
    "anthropic": AnthropicProvider,
}


def build_provider(deployment: Deployment, client: HttpClient) -> Provider:
    """The provider of a deployment.

    Raises:
        ConfigurationError: There is no such protocol.
    """
    build = PROVIDERS.get(deployment.provider)
    if build is None:
        known = ", ".join(sorted(PROVIDERS))
        message = (
            f"deployment {deployment.name!r}: provider {deployment.provider!r} is none of {known}"
        )
        raise ConfigurationError(message)
    return build(deployment, client)
