"""`/v1/results`: every result of the tenant, once, in the order in which they land."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from promptfleet.api.dependencies import Reader, ServicesDep
from promptfleet.api.errors import JsonResponse
from promptfleet.api.jobs import MAX_PAGE, MAX_WAIT_S
from promptfleet.api.services import Services
from promptfleet.api.shapes import ResultList, result_json
from promptfleet_shared.store.listing import ResultPage, landed_results

router = APIRouter(prefix="/v1/results", tags=["results"])

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0


@router.get("", summary="Read results as they land", response_model=ResultList)
async def read(
    services: ServicesDep,
    caller: Reader,
    after: Annotated[str | None, Query(description="The cursor of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the first one.")
    ] = 0,
) -> Response:
    """From the oldest that is kept, or from a cursor on, none left out and none twice.

    The last page has a `cursor`, too: keep it, and ask again, with `wait`, for what lands
    meanwhile.
    """
    page = await _page(services, caller.tenant, after, limit)
    if not page.results and wait > 0:
        with services.limits.listening.taken(caller.tenant):
            page = await _wait(services, caller.tenant, page, limit, wait)
    return JsonResponse(
        {
            "object": "list",
            "data": [result_json(result) for result in page.results],
            "has_more": page.has_more,
            "cursor": page.cursor,
        }
    )


async def _page(services: Services, tenant: str, after: str | None, limit: int) -> ResultPage:
    return await services.stores.run(
        tenant, lambda connection: landed_results(connection, tenant, after=after, limit=limit)
    )


async def _wait(
    services: Services, tenant: str, page: ResultPage, limit: int, wait_s: float
) -> ResultPage:
    """Look again and again; seldom enough for the few clients that read so."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + wait_s
    pause_s = _FIRST_PAUSE_S
    while not page.results and (left_s := ends_at - loop.time()) > 0:
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        page = await _page(services, tenant, page.cursor, limit)
    return page
