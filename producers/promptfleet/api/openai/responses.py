"""`/v1/responses`: answers that may be waited for, followed, or looked at later."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request
from starlette.responses import Response

from promptfleet.api.auth import Caller
from promptfleet.api.dependencies import Reader, ServicesDep, Submitter
from promptfleet.api.errors import ApiError, JsonResponse, not_found
from promptfleet.api.openai.answering import (
    Accepted,
    Asked,
    accept,
    job_of,
    read_request,
    response_headers,
    told_of,
    wait_for,
)
from promptfleet.api.openai.chunks import stream_frames
from promptfleet.api.openai.completing import REFUSALS, takes, wants
from promptfleet.api.openai.failures import failure
from promptfleet.api.openai.ids import RESPONSE, private_id
from promptfleet.api.openai.responses_events import response_frames
from promptfleet.api.openai.responses_input import chat_body, stored_request
from promptfleet.api.openai.responses_output import Draft, response_json, state_status
from promptfleet.api.services import Services
from promptfleet.api.shapes import ErrorBody, fleet_headers
from promptfleet_shared.jobs import JobKind, JobSpec, Result
from promptfleet_shared.store.deletions import Deletion, delete_job
from promptfleet_shared.store.listing import JobRow, read_jobs
from promptfleet_shared.store.requests import read_requests
from promptfleet_shared.store.results import read_results, request_cancel

CANCEL_WAIT_S = 5.0
"""Seconds that a cancellation waits for a worker to hear of it."""

router = APIRouter(prefix="/v1/responses", tags=["openai"])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A job, what it asks for, and its result if it is final."""

    row: JobRow
    request: Mapping[str, Any]
    result: Result | None

    def json(self) -> dict[str, Any]:
        draft = Draft.of(self.row, self.request)
        return response_json(draft, status=state_status(self.row), result=self.result)


@router.post(
    "",
    summary="Create a response",
    responses=REFUSALS,
    openapi_extra=takes(
        "OpenAI's parameters: texts, images and files in; text and calls of your functions out.",
        input={"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]},
        background={"type": ["boolean", "null"]},
        stream={"type": ["boolean", "null"]},
    ),
)
async def create(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """OpenAI's responses: waited for, as server-sent events, or with `background` at once."""
    asked = await read_request(request, services, caller, JobKind.CHAT)
    background = wants(asked.body, "background")
    stream = wants(asked.body, "stream")
    asked = dataclasses.replace(asked, body=chat_body(asked.body))
    if stream:
        spec = job_of(asked, stream=True)
        frames = response_frames(_drafting(asked, spec, background=background))
        return await stream_frames(asked, spec, frames)
    spec = job_of(asked)
    draft = _drafting(asked, spec, background=background)
    if background:
        accepted = await accept(asked, spec)
        with told_of(accepted):
            return await _queued(asked, accepted, draft)
    with asked.services.limits.waiting.taken(asked.tenant):
        accepted = await accept(asked, spec)
        with told_of(accepted):
            result = await wait_for(asked, accepted)
            if not result.succeeded:
                raise failure(result)
    answered = response_json(draft(accepted), status="completed", result=result)
    return JsonResponse(answered, headers={**accepted.headers, **response_headers(asked, result)})


@router.get("/{response_id}", summary="Look at a response")
async def get_response(
    response_id: str, request: Request, services: ServicesDep, caller: Reader
) -> Response:
    """As it stands; any chat that was submitted as a job is a response, too."""
    if request.query_params.get("stream", "false").lower() in {"1", "true"}:
        message = "stream: follow a response that is under way by GET /v1/jobs/{id}/stream"
        raise ApiError(400, message, code="unsupported", param="stream")
    return _response(await _look(services, caller, private_id(RESPONSE, response_id)))


@router.post("/{response_id}/cancel", summary="Cancel a response")
async def cancel(response_id: str, services: ServicesDep, caller: Submitter) -> Response:
    """What is queued ends at once, what runs within seconds; what has ended stays as it is."""
    job_id = private_id(RESPONSE, response_id)
    tenant = caller.tenant
    asked = await services.stores.run(
        tenant, lambda connection: request_cancel(connection, [job_id], tenant=tenant)
    )
    if job_id in asked:
        with services.limits.waiting.taken(tenant):
            await services.results.wait(tenant, [job_id], CANCEL_WAIT_S)
    return _response(await _look(services, caller, job_id))


@router.delete(
    "/{response_id}",
    summary="Delete a response",
    responses={409: {"model": ErrorBody, "description": "It has not ended yet."}},
)
async def delete(response_id: str, services: ServicesDep, caller: Submitter) -> Response:
    """With its job; what it cost stays in the ledger. Cancel first what has not ended."""
    job_id = private_id(RESPONSE, response_id)
    await _look(services, caller, job_id)
    tenant = caller.tenant
    done = await services.stores.run(tenant, lambda c: delete_job(c, job_id, tenant=tenant))
    if done is Deletion.MISSING:
        raise not_found("response")
    if done is Deletion.IN_USE:
        msg = "The response has not ended, or its callback or batch still waits for it."
        raise ApiError(409, msg, code="response_in_use")
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


def _drafting(asked: Asked, spec: JobSpec, *, background: bool) -> Callable[[Accepted], Draft]:
    created_at = round(time.time(), 3)

    def draft(accepted: Accepted) -> Draft:
        return Draft(
            id=accepted.id,
            model=asked.model,
            request=stored_request(spec.request),
            created_at=created_at,
            background=background,
            metadata=spec.metadata,
        )

    return draft


async def _queued(asked: Asked, accepted: Accepted, draft: Callable[[Accepted], Draft]) -> Response:
    if not accepted.is_new:  # it may have ended long ago
        caller_sees = await _find_in(asked.services, asked.tenant, accepted.id)
        if caller_sees is not None:
            return _response(caller_sees, accepted.headers)
    headers = {**accepted.headers, **response_headers(asked)}
    return JsonResponse(response_json(draft(accepted), status="queued"), headers=headers)


async def _look(services: Services, caller: Caller, job_id: uuid.UUID) -> _Found:
    found = await _find_in(services, caller.tenant, job_id)
    if found is None:
        raise not_found("response")
    return found


async def _find_in(services: Services, tenant: str, job_id: uuid.UUID) -> _Found | None:
    return await services.stores.run(tenant, lambda c: _find(c, job_id, tenant))


def _find(connection: sa.Connection, job_id: uuid.UUID, tenant: str) -> _Found | None:
    row = read_jobs(connection, [job_id], tenant=tenant).get(job_id)
    request = read_requests(connection, [job_id], tenant=tenant).get(job_id)
    if row is None or request is None or row.kind is not JobKind.CHAT:
        return None
    result = None
    if row.state.is_final:
        result = read_results(connection, [job_id], tenant=tenant).get(job_id)
    return _Found(row=row, request=request, result=result)


def _response(found: _Found, headers: Mapping[str, str] | None = None) -> Response:
    told = dict(headers or {})
    if found.result is not None:
        told |= fleet_headers(found.result)
    return JsonResponse(found.json(), headers=told)
