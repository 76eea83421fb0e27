"""`/v1/models`: the models of fleet.toml, and each tier as `tier/<tier>`."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from promptfleet.api.dependencies import AnyCaller, ServicesDep
from promptfleet.api.errors import ApiError, JsonResponse
from promptfleet.options import refuse
from promptfleet.requests import Defaults
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.tiers import AUTO_TIER

TIER_PREFIX = "tier/"
_OWNER = "promptfleet"
_CREATED = 0
"""Nobody knows when a model of fleet.toml was made, and OpenAI's shape wants a number."""

router = APIRouter(prefix="/v1/models", tags=["openai"])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Who is to answer.

    Attributes:
        model: One of fleet.toml; None leaves the choice to the tier.
    """

    tier: str | None
    model: str | None


def find_target(name: object, fleet: Fleet, defaults: Defaults) -> Target:
    """Who answers to a model's name.

    Raises:
        InvalidRequestError: It is no name.
        ApiError: 404, the fleet has no such model or tier.
    """
    if not isinstance(name, str) or not name:
        refuse("model", "the name of a model, or tier/<tier>", name)
    if name in fleet.models:
        return Target(tier=_tier_with(name, fleet), model=name)
    if name.startswith(TIER_PREFIX):
        tier = name.removeprefix(TIER_PREFIX)
        if tier == AUTO_TIER or tier in fleet.tier_names or defaults.tiers is None:
            return Target(tier=tier, model=None)
    elif defaults.models is None:
        return Target(tier=None, model=name)  # only the workers have a fleet.toml
    raise unknown_model()


def unknown_model() -> ApiError:
    """The answer for a model that the fleet does not have; its name may be anything, a prompt."""
    message = "The model does not exist; GET /v1/models lists those that do."
    return ApiError(404, message, code="model_not_found", param="model")


def _tier_with(model: str, fleet: Fleet) -> str | None:
    """A tier that the model is one of: the default one if it can be, else the first."""
    tiers = [tier for tier, section in fleet.tiers.items() if model in section.models]
    if not tiers or fleet.default_tier in tiers:
        return None
    return tiers[0]


@router.get("", summary="List models and tiers")
async def list_models(services: ServicesDep, caller: AnyCaller) -> Response:  # noqa: ARG001
    """Every name that `model` may be."""
    data = [_model(name) for name in _names(services.fleet)]
    return JsonResponse({"object": "list", "data": data})


@router.get("/{model:path}", summary="Look at a model or a tier")
async def get_model(model: str, services: ServicesDep, caller: AnyCaller) -> Response:  # noqa: ARG001
    """Whether `model` may be this name."""
    if model not in _names(services.fleet):
        raise unknown_model()
    return JsonResponse(_model(model))


def _names(fleet: Fleet) -> list[str]:
    return [*fleet.models, *(TIER_PREFIX + tier for tier in (*fleet.tier_names, AUTO_TIER))]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _CREATED, "owned_by": _OWNER}
