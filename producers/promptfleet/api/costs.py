"""`/v1/costs`: what the caller's tenant spent, and what was saved."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from promptfleet.api.dependencies import Reader, ServicesDep
from promptfleet.api.errors import JsonResponse
from promptfleet.api.shapes import ErrorBody
from promptfleet.cost_report import DEFAULT_BY, DEFAULT_SINCE, instant, report
from promptfleet_shared.store.costs import check_key, costs
from promptfleet_shared.store.status import database_clock

MAX_ROWS = 10_000
"""Values that one report tells apart: the metadata could have any number."""

router = APIRouter(prefix="/v1/costs", tags=["costs"])


class CostShape(BaseModel):
    """What one model, tier, day … cost."""

    key: str | None = Field(description="Which one; null where nobody knows.")
    calls: int
    unknown_calls: int = Field(description="Those whose outcome and bill nobody knows.")
    unpriced_calls: int = Field(description="Those that no price is known for.")
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_usd: float | None = Field(description="US dollars, by the providers' counts.")
    estimated_usd: float | None = Field(description="Of calls that were cut.")
    at_most_usd: float | None = Field(description="What the unknown calls may have cost at most.")
    saved_usd: dict[str, float] = Field(description="By what saved it, e.g. `hit`.")
    saved_jobs: dict[str, int]


class CostReport(BaseModel):
    """What was spent in a span of time."""

    object: str = "costs"
    by: str
    since: dt.datetime
    until: dt.datetime = Field(description="The first instant that is left out.")
    tenant: str
    rows: list[CostShape] = Field(description="The dearest first; days in their order.")
    total: CostShape = Field(description="The sum of all rows; its key is `all`.")


@router.get(
    "",
    summary="Report what was spent",
    response_model=CostReport,
    responses={422: {"model": ErrorBody, "description": "A parameter is wrong, or too wide."}},
)
async def get(
    services: ServicesDep,
    caller: Reader,
    by: Annotated[
        str,
        Query(description="model, tier, deployment, provider, day, tenant or metadata.KEY."),
    ] = DEFAULT_BY,
    since: Annotated[
        str, Query(description="How long ago, e.g. 7d or 24h, or a date or instant (UTC).")
    ] = DEFAULT_SINCE,
    until: Annotated[
        str | None, Query(description="The same; by default now. It is left out itself.")
    ] = None,
) -> Response:
    """Your ledger: the same numbers as `promptfleet cost --format json` has for your tenant."""
    check_key(by)

    def work(connection: sa.Connection) -> dict[str, Any]:
        now = database_clock(connection)
        begin = instant(since, now, field="since")
        end = now.astimezone(dt.UTC) if until is None else instant(until, now, field="until")
        tenant = caller.tenant
        rows = costs(connection, by=by, since=begin, until=end, tenant=tenant, most=MAX_ROWS)
        return report(rows, by=by, since=begin, until=end, tenant=tenant)

    return JsonResponse({"object": "costs", **await services.stores.run_whole(caller.tenant, work)})
