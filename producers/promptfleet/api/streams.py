"""`GET /v1/jobs/{id}/stream`: a job's text as it comes, as server-sent events."""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from promptfleet.api.auth import check_scopes
from promptfleet.api.dependencies import Reader, ServicesDep
from promptfleet.api.errors import api_error
from promptfleet.api.jobs import id_of
from promptfleet.api.services import Services
from promptfleet.api.shapes import ErrorBody, job_json
from promptfleet.api.sse import MEDIA_TYPE, EventStreamResponse, sse_event
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.jobs import Result
from promptfleet_shared.store.keys import Scope
from promptfleet_shared.store.listing import read_jobs
from promptfleet_shared.token_stream import EventKind, StreamEvent

DONE = "done"
"""The id of the last event: who comes back with it has seen all, and is told not to come again."""
_RECONNECT = b"retry: 1000\n\n"
_MAX_ID_CHARS = 100
_NO_CONTENT = 204

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get(
    "/{job_id}/stream",
    summary="Follow a job's text as it comes",
    response_class=Response,
    responses={
        200: {"description": "Server-sent events.", "content": {MEDIA_TYPE: {}}},
        204: {"description": "All was seen: the last id was that of the `result`."},
        404: {"model": ErrorBody, "description": "You have no such job."},
    },
)
async def stream(
    job_id: str,
    services: ServicesDep,
    caller: Reader,
    *,
    last_event_id: Annotated[str | None, Header()] = None,
    after: Annotated[
        str | None,
        Query(alias="last_event_id", description="Instead of the header `Last-Event-ID`."),
    ] = None,
    cancel_on_disconnect: Annotated[
        bool, Query(description="Cancel the job if you leave before its end.")
    ] = False,
) -> Response:
    """Server-sent events, with comments while there are none.

    `token` has the `{"text"}` that goes on where the last one ended; `reset` says that the answer
    begins anew and all text before is void; `end` has the `{"state"}`; `result`, the last one, is
    the job as `GET /v1/jobs/{id}` has it.

    With `Last-Event-ID` it goes on after that event, on any process, without loss or repetition. A
    job that was submitted without `"stream": true` has its text in one piece, at its end.
    """
    wanted = id_of(job_id)
    after = (last_event_id or after or "")[:_MAX_ID_CHARS] or None
    if cancel_on_disconnect:
        check_scopes(caller, (Scope.SUBMIT,))
    await services.streams.find(caller.tenant, wanted)
    if after == DONE:
        return Response(status_code=_NO_CONTENT)
    leave = functools.partial(services.streams.cancel_soon, caller.tenant, wanted)
    return EventStreamResponse(
        _frames(services, caller.tenant, wanted, after),
        keep_alive_s=services.settings.api_keep_alive_s,
        room=services.limits.waiting.taken(caller.tenant),
        on_left=leave if cancel_on_disconnect else None,
        headers={"x-promptfleet-job": str(wanted)},
    )


async def _frames(
    services: Services, tenant: str, job_id: uuid.UUID, after: str | None
) -> AsyncGenerator[bytes, None]:
    yield _RECONNECT
    try:
        async with aclosing(services.streams.follow(tenant, job_id, after=after)) as events:
            async for event in events:
                yield _frame(event)
                if event.result is not None:
                    job = await _job(services, tenant, job_id, event.result)
                    yield sse_event(job, event="result", id=DONE)
    except PromptFleetError as error:  # too late for a status
        yield sse_event({"error": api_error(error).body}, event="error")


def _frame(event: StreamEvent) -> bytes:
    data: dict[str, Any] = {}
    if event.kind is EventKind.TOKEN:
        data = {"text": event.text}
    elif event.result is not None:
        data = {"state": event.result.state}
    return sse_event(data, event=event.kind.value, id=event.id)


async def _job(
    services: Services, tenant: str, job_id: uuid.UUID, result: Result
) -> dict[str, Any] | None:
    def read(connection: sa.Connection) -> dict[str, Any] | None:
        row = read_jobs(connection, [job_id], tenant=tenant).get(job_id)
        return None if row is None else job_json(row, result)

    return await services.stores.run(tenant, read)
