"""`/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from promptfleet.api.dependencies import ServicesDep, Submitter
from promptfleet.api.openai.answering import answer, json_answer, read_request
from promptfleet.api.openai.answers import with_base64
from promptfleet.api.openai.chunks import stream_answer
from promptfleet.api.shapes import ErrorBody
from promptfleet.options import refuse
from promptfleet_shared.jobs import JobKind

router = APIRouter(prefix="/v1", tags=["openai"])

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A field is wrong, or the provider says so."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    413: {"model": ErrorBody, "description": "Beyond a limit, which the message names."},
    429: {"model": ErrorBody, "description": "Too much under way, here or at the provider."},
    502: {"model": ErrorBody, "description": "No provider answered, after all tries."},
    503: {"model": ErrorBody, "description": "Not now; see `retry-after`."},
    504: {"model": ErrorBody, "description": "Still under way; `x-promptfleet-job` says as what."},
}


def takes(description: str, **properties: Any) -> dict[str, Any]:
    """OpenAPI's words for a body that is passed on."""
    schema = {
        "type": "object",
        "description": description,
        "required": ["model", *list(properties)[:1]],
        "properties": {"model": {"type": "string"}, **properties},
        "additionalProperties": True,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_PROMPT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}
_STREAM: dict[str, Any] = {"type": ["boolean", "null"]}


@router.post(
    "/chat/completions",
    summary="Answer a chat",
    responses=REFUSALS,
    openapi_extra=takes(
        "OpenAI's parameters; what the fleet does not know goes to the provider as it is.",
        messages={"type": "array", "minItems": 1, "items": {"type": "object"}},
        stream=_STREAM,
    ),
)
async def chat(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """OpenAI's chat completions, whole or as server-sent events."""
    asked = await read_request(request, services, caller, JobKind.CHAT)
    if wants(asked.body, "stream"):
        return await stream_answer(asked)
    _, answered, headers = await answer(asked)
    return json_answer(answered, headers)


@router.post(
    "/completions",
    summary="Go on with a text",
    responses=REFUSALS,
    openapi_extra=takes(
        "OpenAI's parameters; what the fleet does not know goes to the provider as it is.",
        prompt=_PROMPT,
        stream=_STREAM,
    ),
)
async def complete(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """OpenAI's completions: a text, several, or their tokens; whole, or one text as events."""
    asked = await read_request(request, services, caller, JobKind.COMPLETION)
    if wants(asked.body, "stream"):
        return await stream_answer(asked)
    _, answered, headers = await answer(asked)
    return json_answer(answered, headers)


@router.post(
    "/embeddings",
    summary="Turn texts into vectors",
    responses=REFUSALS,
    openapi_extra=takes("OpenAI's parameters.", input=_PROMPT),
)
async def embed(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """OpenAI's embeddings: of a text, of several, or of their tokens."""
    asked = await read_request(request, services, caller, JobKind.EMBEDDING)
    _, answered, headers = await answer(asked)
    if asked.body.get("encoding_format") == "base64":
        answered = with_base64(answered)
    return json_answer(answered, headers)


def wants(body: Mapping[str, Any], name: str) -> bool:
    """Whether the body asks for this.

    Raises:
        InvalidRequestError: It says neither true nor false.
    """
    wanted = body.get(name)
    if wanted is not None and not isinstance(wanted, bool):
        refuse(name, "true or false", wanted)
    return bool(wanted)
