"""From a deployment in fleet.toml to the provider that speaks its protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import Deployment
from promptfleet_workers.plugins import load_plugin
from promptfleet_workers.providers.anthropic import AnthropicProvider
from promptfleet_workers.providers.gemini import GeminiProvider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Provider

GROUP = "promptfleet.providers"
PROVIDERS: dict[str, Callable[[Deployment, HttpClient], Provider]] = {
    "openai": OpenAIProvider,
    "anthropic": AnthropicProvider,
    "gemini": GeminiProvider,
}


def build_provider(deployment: Deployment, client: HttpClient) -> Provider:
    """The provider of a deployment: one of ours, or an entry point of `promptfleet.providers`.

    Raises:
        ConfigurationError: There is no such protocol, or what it names is no provider.
    """
    field = f"deployment {deployment.name!r}: provider"
    build = PROVIDERS.get(deployment.provider)
    if build is None:
        build = load_plugin(GROUP, deployment.provider, field=field, built_in=PROVIDERS)
    provider = build(deployment, client) if callable(build) else None
    lacking = [name for name in ("call", "aclose") if not callable(getattr(provider, name, None))]
    if provider is None or lacking:
        message = f"{field}: {deployment.provider!r} makes nothing with {' and '.join(lacking)}"
        raise ConfigurationError(message)
    return cast("Provider", provider)  # as looked at above
