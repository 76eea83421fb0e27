"""`/v1/batches`: OpenAI's Batch API, with results as they land and progress as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Final, Literal

import pydantic
from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from uuid_utils.compat import uuid7

from promptfleet.api.dependencies import Reader, ServicesDep, Submitter
from promptfleet.api.errors import ApiError, JsonResponse, limited, not_found
from promptfleet.api.jobs import MAX_WAIT_S
from promptfleet.api.openai.batch_requests import CUSTOM_ID, ENDPOINTS
from promptfleet.api.openai.files import list_json
from promptfleet.api.openai.ids import BATCH, FILE, private_id, public_id
from promptfleet.api.openai.uploading import check_ttl
from promptfleet.api.services import Services
from promptfleet.api.shapes import ErrorBody, ResultShape, result_json
from promptfleet.api.sse import EventStreamResponse, sse_event
from promptfleet.api.submitting import header_key
from promptfleet.options import callback_url, refuse
from promptfleet_shared.errors import InvalidRequestError, StoreUnavailableError
from promptfleet_shared.store.batches import (
    Batch,
    NewBatch,
    cancel_batch,
    create_batch,
    list_batches,
    open_batches,
    read_batch,
)
from promptfleet_shared.store.files import StoredFile, read_file
from promptfleet_shared.store.listing import ResultPage, landed_results

MAX_OPEN: Final = 200
"""Batches of a tenant that have not ended."""
LOOK_EVERY_S: Final = 1.0
MAX_PAGE: Final = 100
MAX_RESULTS: Final = 1_000
MAX_PAIRS: Final = 16
MAX_KEY: Final = 64
MAX_VALUE: Final = 512
LONGEST_WINDOW_S: Final = 14 * 86_400
CALLBACK_KEY: Final = "promptfleet_callback_url"
"""A metadata key for clients that can't send more than OpenAI's own parameters."""
_DAY_S: Final = 86_400
_CONFLICT: Final = 409
_FIRST_PAUSE_S: Final = 0.1
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": _DAY_S}
_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_KNOWN: Final = frozenset(
    {
        "input_file_id",
        "endpoint",
        "completion_window",
        "metadata",
        "output_expires_after",
        "promptfleet",
    }
)
_INSTANTS: Final = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_MISSING: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "You have no such batch."}
}
_CREATE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input_file_id", "endpoint", "completion_window"],
                    "properties": {
                        "input_file_id": {"type": "string"},
                        "endpoint": {"type": "string", "enum": list(ENDPOINTS)},
                        "completion_window": {"type": "string", "example": "24h"},
                        "metadata": {
                            "type": "object",
                            "maxProperties": MAX_PAIRS,
                            "additionalProperties": {"type": "string", "maxLength": MAX_VALUE},
                        },
                        "output_expires_after": {
                            "type": "object",
                            "properties": {
                                "anchor": {"type": "string", "enum": ["created_at"]},
                                "seconds": {"type": "integer"},
                            },
                        },
                        "promptfleet": {
                            "type": "object",
                            "properties": {"callback_url": {"type": "string"}},
                        },
                    },
                }
            }
        },
    }
}


class CountsShape(pydantic.BaseModel):
    """How far a batch is."""

    total: int
    completed: int
    failed: int


class BatchShape(pydantic.BaseModel):
    """A batch, as OpenAI's Batch object has it."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: CountsShape
    usage: dict[str, Any] | None
    metadata: dict[str, str] | None


class BatchListShape(pydantic.BaseModel):
    """Some batches."""

    object: Literal["list"]
    data: list[BatchShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchResultShape(pydantic.BaseModel):
    """A line's result."""

    custom_id: str | None
    job_id: uuid.UUID
    result: ResultShape


class BatchResultsShape(pydantic.BaseModel):
    """Results in the order in which they landed."""

    object: Literal["list"]
    data: list[BatchResultShape]
    has_more: bool
    cursor: str
    status: str


@router.post(
    "",
    summary="Create a batch",
    response_model=BatchShape,
    openapi_extra=_CREATE_BODY,
    responses={
        400: {"model": ErrorBody, "description": "A parameter is wrong."},
        404: {"model": ErrorBody, "description": "You have no such file."},
        429: {"model": ErrorBody, "description": "You have too many batches under way."},
    },
)
async def create(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """Every line of an uploaded file becomes a job, once all of them are found to be right.

    With `{"promptfleet": {"callback_url": "https://…"}}` in the body, or the URL in the metadata as
    `promptfleet_callback_url`, the batch's end is posted there as OpenAI's webhooks tell it.
    """
    body = await services.limits.read_json(request)
    if not isinstance(body, Mapping):
        refuse("the body", "an object", body)
    key = header_key(request)
    tenant = caller.tenant
    new = _new_batch(body, services, tenant, key)
    await _check_file(services, tenant, new.input_file_id)
    await _check_room(services, tenant)
    batch, is_new = await services.stores.run_whole(tenant, lambda c: create_batch(c, new))
    services.batch_bell.set()
    headers = {} if is_new else {"idempotent-replayed": "true"}
    return JsonResponse(batch_json(batch), headers=headers)


@router.get("", summary="List batches, the newest first", response_model=BatchListShape)
async def list_(
    services: ServicesDep,
    caller: Reader,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
) -> Response:
    """Those of the caller's tenant."""
    tenant = caller.tenant
    start = None if after is None else private_id(BATCH, after, param="after")
    batches, has_more = await services.stores.run(
        tenant, lambda c: list_batches(c, tenant=tenant, after=start, limit=limit)
    )
    return JsonResponse(list_json([batch_json(batch) for batch in batches], has_more=has_more))


@router.get("/{batch_id}", summary="Look at a batch", response_model=BatchShape, responses=_MISSING)
async def get(batch_id: str, services: ServicesDep, caller: Reader) -> Response:
    """Its counts move while it is in progress."""
    return JsonResponse(batch_json(await _find(services, caller.tenant, batch_id)))


@router.post(
    "/{batch_id}/cancel",
    summary="Cancel a batch",
    response_model=BatchShape,
    responses={**_MISSING, 409: {"model": ErrorBody, "description": "It has ended already."}},
)
async def cancel(batch_id: str, services: ServicesDep, caller: Submitter) -> Response:
    """What has ended is in the output file; the rest is in the error file, as `batch_cancelled`."""
    wanted, tenant = private_id(BATCH, batch_id), caller.tenant
    found = await services.stores.run(tenant, lambda c: cancel_batch(c, wanted, tenant=tenant))
    if found is None:
        raise not_found("batch")
    batch, done = found
    services.batch_bell.set()
    if not done and batch.status != "cancelling":
        msg = f"Cannot cancel a batch with status '{batch.status}'."
        raise ApiError(_CONFLICT, msg, code="batch_not_cancellable")
    return JsonResponse(batch_json(batch))


@router.get(
    "/{batch_id}/results",
    summary="Read a batch's results as they land",
    response_model=BatchResultsShape,
    responses=_MISSING,
)
async def read_results(  # noqa: PLR0917  # a parameter each
    batch_id: str,
    services: ServicesDep,
    caller: Reader,
    after: Annotated[str | None, Query(description="The cursor of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = 100,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the first one.")
    ] = 0,
) -> Response:
    """Each exactly once, long before the output file is there.

    Go on with `cursor` until `status` is final and nothing came. A line that the batch's end came
    before its job was made has no result: the error file tells of it.
    """
    batch = await _find(services, caller.tenant, batch_id)
    read = functools.partial(_page, services, caller.tenant, batch.id, limit)
    page = await read(after)
    if not page.results and wait > 0 and not batch.is_final:
        with services.limits.listening.taken(caller.tenant):
            batch, page = await _wait(services, batch, page, read, wait)
    return JsonResponse(
        {
            "object": "list",
            "data": [
                {
                    "custom_id": result.metadata.get(CUSTOM_ID),
                    "job_id": result.job_id,
                    "result": result_json(result),
                }
                for result in page.results
            ],
            "has_more": page.has_more,
            "cursor": page.cursor,
            "status": batch.status,
        }
    )


@router.get(
    "/{batch_id}/events",
    summary="Follow a batch",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The batch, as it changes."},
        **_MISSING,
    },
)
async def follow(batch_id: str, services: ServicesDep, caller: Reader) -> Response:
    """Server-sent events `batch.<status>` with the whole batch, until it has ended."""
    batch = await _find(services, caller.tenant, batch_id)
    return EventStreamResponse(
        _events(services, caller.tenant, batch),
        keep_alive_s=services.settings.api_keep_alive_s,
        room=services.limits.listening.taken(caller.tenant),
    )


async def _events(services: Services, tenant: str, batch: Batch) -> AsyncIterator[bytes]:
    told: dict[str, Any] | None = None
    while True:
        shown = batch_json(batch)
        if shown != told:
            yield sse_event(shown, event=f"batch.{batch.status}")
            told = shown
        if batch.is_final:
            return
        await asyncio.sleep(LOOK_EVERY_S)
        with contextlib.suppress(StoreUnavailableError):  # it may be back at the next look
            batch = await _again(services, tenant, batch)


async def _wait(
    services: Services, batch: Batch, page: ResultPage, read: Any, wait_s: float
) -> tuple[Batch, ResultPage]:
    """Look again and again, until something is there, the batch has ended or the time is up."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + wait_s
    pause_s = _FIRST_PAUSE_S
    while not page.results and not batch.is_final and (left_s := ends_at - loop.time()) > 0:
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 2, LOOK_EVERY_S)
        # The batch first: once it has ended, the page after that is whole.
        batch = await _again(services, batch.tenant, batch)
        page = await read(page.cursor)
    return batch, page


async def _page(
    services: Services, tenant: str, batch_id: uuid.UUID, limit: int, after: str | None
) -> ResultPage:
    return await services.stores.run(
        tenant, lambda c: landed_results(c, tenant, after=after, limit=limit, batch_id=batch_id)
    )


async def _find(services: Services, tenant: str, batch_id: str) -> Batch:
    wanted = private_id(BATCH, batch_id)
    batch = await services.stores.run(tenant, lambda c: read_batch(c, wanted, tenant=tenant))
    if batch is None:
        raise not_found("batch")
    return batch


async def _again(services: Services, tenant: str, batch: Batch) -> Batch:
    found = await services.stores.run(tenant, lambda c: read_batch(c, batch.id, tenant=tenant))
    if found is None:  # it has ended and was pruned since
        raise not_found("batch")
    return found


def batch_json(batch: Batch) -> dict[str, Any]:
    """OpenAI's Batch object."""
    instants = {name: _unix(getattr(batch, name)) for name in _INSTANTS}
    errors = None if batch.errors is None else {"object": "list", "data": batch.errors}
    return {
        "id": public_id(BATCH, batch.id),
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": public_id(FILE, batch.input_file_id),
        "completion_window": _window_text(batch.completion_window_s),
        "status": batch.status,
        "output_file_id": _file_id(batch.output_file_id),
        "error_file_id": _file_id(batch.error_file_id),
        **instants,
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "usage": batch.usage,
        "metadata": batch.metadata,
    }


def _new_batch(
    body: Mapping[str, Any], services: Services, tenant: str, key: str | None
) -> NewBatch:
    for name in body:
        if name not in _KNOWN:
            accepted = ", ".join(sorted(_KNOWN))
            raise _bad("body", f"The body has a parameter that is none of {accepted}.")
    endpoint = _required(body, "endpoint")
    if endpoint not in ENDPOINTS:
        accepted = ", ".join(f"'{name}'" for name in ENDPOINTS)
        raise _bad("endpoint", f"endpoint: must be one of {accepted}.")
    file_id = _required(body, "input_file_id")
    if not isinstance(file_id, str):
        refuse("input_file_id", "a file's id", file_id)
    window_s = _window(_required(body, "completion_window"))
    metadata = _metadata(body.get("metadata"))
    return NewBatch(
        id=uuid7(),
        tenant=tenant,
        endpoint=endpoint,
        input_file_id=private_id(FILE, file_id, param="input_file_id"),
        metadata=metadata,
        completion_window_s=window_s,
        callback_url=_callback(body, metadata, services),
        output_ttl_s=_output_ttl(body.get("output_expires_after"), services),
        idempotency_key=key,
    )


async def _check_file(services: Services, tenant: str, file_id: uuid.UUID) -> None:
    file: StoredFile | None = await services.stores.run(
        tenant, lambda c: read_file(c, file_id, tenant=tenant)
    )
    if file is None:
        raise not_found("file", param="input_file_id")
    if file.purpose != "batch":
        msg = f"input_file_id: the file's purpose is '{file.purpose}'; it must be 'batch'."
        raise _bad("input_file_id", msg, "invalid_purpose")


async def _check_room(services: Services, tenant: str) -> None:
    count = await services.stores.run(tenant, lambda c: open_batches(c, tenant=tenant))
    if count >= MAX_OPEN:
        msg = f"You have {MAX_OPEN} batches under way, the limit; create more when some have ended."
        raise limited(msg, code="too_many_batches", retry_after_s=60)


def _required(body: Mapping[str, Any], name: str) -> Any:
    value = body.get(name)
    if value is None:
        msg = f"Missing required parameter: '{name}'."
        raise _bad(name, msg, "missing_required_parameter")
    return value


def _window(value: object) -> int:
    """Seconds; OpenAI takes "24h" alone."""
    match = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    seconds = 0 if match is None else int(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= LONGEST_WINDOW_S:
        msg = (
            "completion_window: must be '24h', or another number of seconds, minutes, hours or"
            " days up to '14d', e.g. '90m'."
        )
        raise _bad("completion_window", msg)
    return seconds


def _window_text(seconds: int) -> str:
    for unit in ("h", "m"):
        if seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_PAIRS:
        raise _bad("metadata", f"metadata: must be an object of up to {MAX_PAIRS} pairs.")
    for name, text in value.items():
        if not 0 < len(name) <= MAX_KEY or not isinstance(text, str) or len(text) > MAX_VALUE:
            msg = (
                f"metadata: keys must have up to {MAX_KEY} characters, and values must be strings"
                f" of up to {MAX_VALUE}."
            )
            raise _bad("metadata", msg)
        if "\0" in name or "\0" in text:
            raise _bad("metadata", "metadata: holds a NUL character.")
    return dict(value)


def _callback(
    body: Mapping[str, Any], metadata: Mapping[str, str] | None, services: Services
) -> str | None:
    own = body.get("promptfleet")
    url = (metadata or {}).get(CALLBACK_KEY)
    if own is not None:
        if not isinstance(own, Mapping) or set(own) - {"callback_url"}:
            raise _bad("promptfleet", "promptfleet: must be an object with a 'callback_url'.")
        url = own.get("callback_url") or url
    if url is None:
        return None
    allowed = services.settings.callback_allow_loopback
    try:
        return callback_url(url, allow_loopback=allowed)
    except InvalidRequestError as error:
        raise _bad("promptfleet.callback_url", error.message) from None


def _output_ttl(value: object, services: Services) -> int | None:
    if value is None:
        days = services.settings.api_file_days
        return int(days * _DAY_S) if days else None
    if not isinstance(value, Mapping) or value.get("anchor") != "created_at":
        msg = "output_expires_after: must be an object with the anchor 'created_at' and seconds."
        raise _bad("output_expires_after", msg)
    return check_ttl(value.get("seconds"), "output_expires_after.seconds")


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def _file_id(value: uuid.UUID | None) -> str | None:
    return None if value is None else public_id(FILE, value)


def _unix(value: Any) -> int | None:
    return None if value is None else int(value.timestamp())
