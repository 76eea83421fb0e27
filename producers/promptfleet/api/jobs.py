"""`/v1/jobs`: submit one or many, look, wait, list, cancel."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from promptfleet.api.bodies import (
    LINES_TYPES,
    BodyReader,
    media_type,
    parse_json,
    require_json,
)
from promptfleet.api.dependencies import Reader, ServicesDep, Submitter
from promptfleet.api.errors import ApiError, JsonResponse, invalid, not_found
from promptfleet.api.services import Services
from promptfleet.api.shapes import (
    ErrorBody,
    JobList,
    JobShape,
    fleet_headers,
    job_json,
    listed_job_json,
)
from promptfleet.api.splitting import ArraySplitter, LineSplitter, Splitter
from promptfleet.api.submitting import header_key, job_of
from promptfleet.api.uploads import LINES_TYPE, Upload, UploadResponse
from promptfleet.options import check_option
from promptfleet_shared.jobs import JobState, Result
from promptfleet_shared.store.listing import JobRow, list_jobs, read_jobs
from promptfleet_shared.store.results import read_results, request_cancel

MAX_WAIT_S = 60.0
MAX_PAGE = 1_000
_METADATA = "metadata."
_REPLAYED = {"idempotent-replayed": "true"}
_CONFLICT, _ACCEPTED = 409, 202

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


def _ref(model: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model}"}


_SUBMIT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [_ref("JobRequest"), {"type": "array", "items": _ref("JobRequest")}]
                },
                "example": {"prompt": "Summarize: …", "tier": "basic", "max_tokens": 100},
            },
            LINES_TYPE: {"schema": _ref("JobRequest")},
        },
    },
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "description": "The same key with the same request is one job. Of many jobs, item n has"
            " the key `<key>:<n>` unless it has one of its own.",
            "schema": {"type": "string", "maxLength": 255},
        }
    ],
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    413: {"model": ErrorBody, "description": "Beyond a limit, which the message names."},
    415: {"model": ErrorBody, "description": "Neither JSON nor NDJSON."},
    422: {"model": ErrorBody, "description": "A field is wrong, or a key was used before."},
    429: {"model": ErrorBody, "description": "You have too much under way; see `retry-after`."},
    503: {"model": ErrorBody, "description": "Not now; see `retry-after`."},
}
_MISSING: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "You have no such job."}
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A job, and its result if it is final."""

    row: JobRow
    result: Result | None = None


@router.post(
    "",
    summary="Submit one job or many",
    status_code=_ACCEPTED,
    response_model=JobShape,
    openapi_extra=_SUBMIT_BODY,
    responses={
        202: {
            "description": "Committed: the job as JSON; of many, a line for each as they commit.",
            "content": {LINES_TYPE: {"schema": _ref("UploadLine")}},
        },
        **_REFUSALS,
    },
)
async def submit(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """One JSON object is one job; a JSON array or NDJSON, with a job a line, are many.

    Any number of them is read and committed, up to 1,000 at a time, each time all or none.

    The answer to many is NDJSON, while the upload goes on: `{"index", "id"}` for what is committed,
    `{"index", "error"}` for what is not; a bad item costs none of the others. Where the rest can't
    be read or is not accepted now, a last line says so for all items from its `index` on. Read the
    answer while you write: some 250,000 unread lines are kept, then the upload waits.
    """
    key = header_key(request)
    reader = BodyReader(request.receive)
    longest = services.settings.api_max_line_bytes
    splitter: Splitter | None = None
    if media_type(request) in LINES_TYPES:
        splitter = LineSplitter(max_bytes=longest)
    else:
        require_json(request)
        if await reader.begins_with(b"["):
            splitter = ArraySplitter(max_bytes=longest)
    if splitter is None:
        body = parse_json(await services.limits.read_body(request, reader))
        return await _submit_one(request, services, caller.tenant, body, key)
    upload = Upload(services=services, tenant=caller.tenant, splitter=splitter, key=key)
    return UploadResponse(upload, reader, services.limits.uploads.taken(caller.tenant))


async def _submit_one(
    request: Request, services: Services, tenant: str, body: object, key: str | None
) -> Response:
    spec = job_of(body, services.defaults_of(tenant), services.limits, key=key)
    with services.limits.submissions.taken(tenant):
        await services.limits.check_backlog(tenant)
        (accepted,) = await services.stores.submit(tenant, [spec])
        found = await _look(services, tenant, accepted)
    if found is None:  # it has ended and was pruned since
        raise not_found()
    headers = {"location": f"{request.scope.get('root_path', '')}/v1/jobs/{accepted}"}
    if accepted == spec.id:
        services.limits.accepted(tenant, 1)
    else:
        headers |= _REPLAYED
    return _job_response(found, status=_ACCEPTED, headers=headers)


@router.get(
    "/{job_id}",
    summary="Look at a job, or wait for it",
    response_model=JobShape,
    responses=_MISSING,
)
async def get_job(
    job_id: str,
    services: ServicesDep,
    caller: Reader,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the job's end.")
    ] = 0,
) -> Response:
    """The job, with its result once it is final.

    With `wait`, as soon as it is final, or as it stands when the time is up.
    """
    wanted = id_of(job_id)
    found = await _look(services, caller.tenant, wanted)
    if found is not None and wait > 0 and not found.row.state.is_final:
        with services.limits.waiting.taken(caller.tenant):
            await services.results.wait(caller.tenant, [wanted], wait)
        found = await _look(services, caller.tenant, wanted)
    if found is None:
        raise not_found()
    return _job_response(found)


@router.get("", summary="List jobs, the newest first", response_model=JobList)
async def list_(  # noqa: PLR0917  # one for each filter
    request: Request,
    services: ServicesDep,
    caller: Reader,
    state: Annotated[JobState | None, Query(description="Only those in this state.")] = None,
    tier: Annotated[str | None, Query(description="Only those of this tier.")] = None,
    batch_id: Annotated[str | None, Query(description="Only the lines of this batch.")] = None,
    cursor: Annotated[str | None, Query(description="Of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
) -> Response:
    """Without their results.

    `metadata.NAME=VALUE` leaves those whose metadata has this value, as a text, at its top level;
    it may be given for several names. With a filter, a page may be short or empty and not the last:
    go on as long as there is a `cursor`.
    """
    metadata = _wanted_metadata(request)
    if tier is not None:
        check_option("tier", tier)
    batch = None if batch_id is None else _batch(batch_id)
    page = await services.stores.run(
        caller.tenant,
        lambda connection: list_jobs(
            connection,
            caller.tenant,
            state=state,
            tier=tier,
            metadata=metadata,
            batch_id=batch,
            before=cursor,
            limit=limit,
        ),
    )
    return JsonResponse(
        {
            "object": "list",
            "data": [listed_job_json(row) for row in page.jobs],
            "has_more": page.cursor is not None,
            "cursor": page.cursor,
        }
    )


@router.delete(
    "/{job_id}",
    summary="Cancel a job",
    status_code=_ACCEPTED,
    response_model=JobShape,
    responses={
        **_MISSING,
        409: {"model": ErrorBody, "description": "It has ended already, and not as cancelled."},
    },
)
async def cancel(job_id: str, services: ServicesDep, caller: Submitter) -> Response:
    """A job that waits ends at once; one that runs is told within seconds: look at its `state`.

    A job that was cancelled before is answered the same; one that has ended otherwise, with 409.
    """
    wanted = id_of(job_id)

    def work(connection: sa.Connection) -> _Found | None:
        request_cancel(connection, [wanted], tenant=caller.tenant)
        return _find(connection, wanted, caller.tenant)

    found = await services.stores.run(caller.tenant, work)
    if found is None:
        raise not_found()
    state = found.row.state
    if state.is_final and state is not JobState.CANCELLED:
        msg = f"The job has ended already: it {_ENDED[state]}."
        raise ApiError(_CONFLICT, msg, code="job_final")
    return _job_response(found, status=_ACCEPTED)


_ENDED = {
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.EXPIRED: "expired",
}


def id_of(text: str) -> uuid.UUID:
    """A job's id from a path.

    Raises:
        ApiError: 404; no job has such an id.
    """
    try:
        return uuid.UUID(text)
    except ValueError:
        raise not_found() from None


async def _look(services: Services, tenant: str, job_id: uuid.UUID) -> _Found | None:
    return await services.stores.run(tenant, lambda connection: _find(connection, job_id, tenant))


def _find(connection: sa.Connection, job_id: uuid.UUID, tenant: str) -> _Found | None:
    row = read_jobs(connection, [job_id], tenant=tenant).get(job_id)
    if row is None or not row.state.is_final:
        return None if row is None else _Found(row=row)
    return _Found(row=row, result=read_results(connection, [job_id], tenant=tenant).get(job_id))


def _job_response(
    found: _Found, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    headers = dict(headers or {})
    if found.result is not None:
        headers |= fleet_headers(found.result)
    return JsonResponse(job_json(found.row, found.result), status_code=status, headers=headers)


def _wanted_metadata(request: Request) -> dict[str, str]:
    wanted = {}
    for name, value in request.query_params.multi_items():
        if name.startswith(_METADATA):
            if "\0" in name + value:
                raise invalid(f"{_METADATA}*: holds a NUL character", param="metadata")
            wanted[name.removeprefix(_METADATA)] = value
    return wanted


def _batch(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text.removeprefix("batch_"))
    except ValueError:
        raise invalid("batch_id: must be a batch's id", param="batch_id") from None
