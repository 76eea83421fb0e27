"""Providers that run on this machine: their command lines, and a fleet.toml that points there."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum


class LocalProvider(StrEnum):
    """Which provider a development fleet runs itself."""

    LOCAL = "local"  # a small real model, behind llama.cpp's server
    SIMULATED = "simulated"  # answers made up at a settable speed

    @property
    def usual_port(self) -> int:
        """The port it listens on if that is free."""
        return _PORTS[self]


_PORTS: Mapping[LocalProvider, int] = {
    LocalProvider.LOCAL: 17700,
    LocalProvider.SIMULATED: 17800,
}
_MODULES: Mapping[LocalProvider, str] = {
    LocalProvider.LOCAL: "promptfleet.local_model",
    LocalProvider.SIMULATED: "promptfleet_workers.providers.simulated",
}
_LOCAL_SLOTS = 6
_LOCAL_CONTEXT = 2048  # tokens of each slot
# As a hosted small model behaves: some latency, then tokens at reading speed or better.
_USUAL_FLAGS: Mapping[LocalProvider, tuple[str, ...]] = {
    LocalProvider.LOCAL: (
        "--slots",
        str(_LOCAL_SLOTS),
        "--ctx",
        str(_LOCAL_SLOTS * _LOCAL_CONTEXT),
    ),
    LocalProvider.SIMULATED: ("--latency-ms", "100..400", "--tokens-per-s", "200"),
}
# Simulated answers cost what these models would, so that the cost columns show something.
_PRICES = ("openai/gpt-4.1-nano", "openai/gpt-4.1-mini", "openai/gpt-4.1")


def provider_command(provider: LocalProvider, *, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command line of the provider's process; later flags win."""
    python = [sys.executable, "-m", _MODULES[provider], "--port", str(port)]
    return [*python, *_USUAL_FLAGS[provider], *flags]


def fleet_toml(
    provider: LocalProvider, *, base_url: str, tiers: Sequence[str], cache_namespace: str
) -> str:
    """The fleet.toml of a development fleet."""
    default = "standard" if "standard" in tiers else tiers[0]
    head = [
        f"# Made by `promptfleet dev --provider {provider}` at each start.",
        "# Copy it to ./fleet.toml and change it there; --provider config uses that.",
        f'default_tier = "{default}"',
        "",
        "[cache]",
        f'namespace = "{cache_namespace}"',
    ]
    if provider is LocalProvider.LOCAL:
        body = _one_model(base_url, tiers)
    else:
        body = _a_model_each(base_url, tiers)
    return "\n".join([*head, *body]) + "\n"


def _one_model(base_url: str, tiers: Sequence[str]) -> list[str]:
    lines = []
    for tier in tiers:
        lines += ["", f"[tiers.{tier}]", 'models = ["smollm2-135m"]']
    return [
        *lines,
        "",
        '[models."smollm2-135m"]',
        'price_as = "free"',
        "",
        '[[models."smollm2-135m".deployments]]',
        f'base_url = "{base_url}"',
        # Of each tier's worker; more would only wait in the server, where nobody sees them.
        f"max_concurrent_calls = {max(1, _LOCAL_SLOTS // len(tiers))}",
    ]


def _a_model_each(base_url: str, tiers: Sequence[str]) -> list[str]:
    lines = []
    for n, tier in enumerate(tiers):
        model = f"simulated-{tier}"
        lines += [
            "",
            f"[tiers.{tier}]",
            f'models = ["{model}"]',
            "",
            f"[models.{model}]",
            f'price_as = "{_PRICES[min(n, len(_PRICES) - 1)]}"',
            "",
            f"[[models.{model}.deployments]]",
            f'base_url = "{base_url}"',
        ]
    return lines
