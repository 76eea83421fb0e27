"""How much each model can read: fleet.toml's word, else what genai-prices knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from genai_prices import data_snapshot

from promptfleet_shared.fleet import Deployment, Fleet, Model

FREE = "free"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What a model can read and write in one call.

    Attributes:
        tokens: Read and written together.
        output: Tokens that it can write at most; None where nobody knows.
        vocabulary: The model's name there, by which its vocabulary is found.
    """

    tokens: int
    output: int | None
    vocabulary: str

    def room(self, wanted: int | None, reserve: int) -> int:
        """Tokens that are left for the input.

        Args:
            wanted: What the job's answer may have, if it says.
            reserve: What is kept free where it does not.
        """
        kept = reserve if wanted is None else wanted
        if self.output is not None:
            kept = min(kept, self.output)
        return max(0, self.tokens - kept)

    def sure_room(self, reserve: int) -> int:
        """Tokens of input that fit whatever answer a job asks for, or nearly so."""
        most = self.tokens // 2 if self.output is None else self.output
        return max(0, self.tokens - max(most, reserve))


def windows_of(fleet: Fleet) -> dict[str, Window]:
    """The window of each model of the fleet; those that nobody knows are missing."""
    found: dict[str, Window] = {}
    for name, model in fleet.models.items():
        tokens = model.context_window or _known(model, model.deployments[0], name)
        if tokens is not None:
            found[name] = Window(
                tokens=tokens,
                output=model.max_output_tokens,
                vocabulary=model.deployments[0].model or name,
            )
    return found


def smallest(windows: Mapping[str, Window], models: tuple[str, ...], reserve: int) -> int | None:
    """The tokens that fit every one of these models for sure; None where all are unknown."""
    rooms = [windows[model].sure_room(reserve) for model in models if model in windows]
    return min(rooms, default=None)


def _known(model: Model, deployment: Deployment, name: str) -> int | None:
    provider, there = deployment.provider, deployment.model or name
    if model.price_as == FREE:
        return None  # a model of their own, whatever its name is
    if model.price_as is not None:
        provider, _, there = model.price_as.partition("/")
    try:
        info = data_snapshot.get_snapshot().find_provider_model(there, None, provider, None)[1]
    except LookupError:
        return None
    return info.context_window
