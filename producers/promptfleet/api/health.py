"""Whether the API lives and is ready, and its numbers: for probes and Prometheus, without a key."""

from __future__ import annotations

import asyncio
from typing import Annotated

import pydantic
from fastapi import APIRouter, Header
from starlette.responses import Response

from promptfleet.api.dependencies import ServicesDep
from promptfleet.api.errors import JsonResponse, retry_after
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.store.status import database_clock

ASK_S = 3.0
router = APIRouter(tags=["health"])


class Health(pydantic.BaseModel):
    """What a probe wants to know."""

    status: str


@router.get("/healthz", summary="Whether the process lives", response_model=Health)
async def healthz() -> Response:
    """200 as long as the process answers at all; it asks nobody else."""
    return JsonResponse({"status": "ok"})


@router.get(
    "/readyz",
    summary="Whether requests would be answered",
    response_model=Health,
    responses={503: {"description": "The database does not answer.", "model": Health}},
)
async def readyz(services: ServicesDep) -> Response:
    """200 where the database answers, else 503; jobs are taken without the broker."""
    try:
        async with asyncio.timeout(ASK_S):
            await services.stores.admin(database_clock)
    except (PromptFleetError, TimeoutError):
        body = {"status": "the database does not answer"}
        return JsonResponse(body, status_code=503, headers=retry_after(1))
    return JsonResponse({"status": "ok"})


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
)
async def metrics(services: ServicesDep, accept: Annotated[str, Header()] = "") -> Response:
    """This process's numbers; with several processes, those of whichever answers."""
    page, content_type = services.metrics.page(accept)
    return Response(page, headers={"content-type": content_type})
