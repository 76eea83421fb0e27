"""`/v1/conversations`: read what is remembered under a `memory_id`, and forget it."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from promptfleet.api.dependencies import Reader, ServicesDep, Submitter
from promptfleet.api.errors import JsonResponse, not_found
from promptfleet.api.shapes import ErrorBody
from promptfleet.options import check_option
from promptfleet_shared.jobs import Conversation
from promptfleet_shared.store.conversations import delete_conversation, read_conversation

router = APIRouter(prefix="/v1/conversations", tags=["conversations"])

_MISSING: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "You have no such conversation."}
}


class TurnShape(BaseModel):
    """What one job added."""

    number: int
    job_id: uuid.UUID
    messages: list[dict[str, Any]] = Field(
        description="The job's new messages without system messages, then the answer's."
    )
    created_at: dt.datetime


class ConversationShape(BaseModel):
    """All that is remembered under one `memory_id`."""

    memory_id: str
    object: str = "conversation"
    turns: list[TurnShape]
    summary: str | None = Field(description="Of older turns, which are kept beside it.")
    created_at: dt.datetime
    updated_at: dt.datetime


@router.get(
    "/{memory_id}",
    summary="Read a conversation",
    response_model=ConversationShape,
    responses=_MISSING,
)
async def get(memory_id: str, services: ServicesDep, caller: Reader) -> Response:
    """Its turns, the oldest first."""
    wanted: str = check_option("memory_id", memory_id)
    found = await services.stores.run(
        caller.tenant, lambda c: read_conversation(c, wanted, tenant=caller.tenant)
    )
    if found is None:
        raise not_found("conversation")
    return JsonResponse(_json(found))


@router.delete("/{memory_id}", summary="Forget a conversation", status_code=204, responses=_MISSING)
async def delete(memory_id: str, services: ServicesDep, caller: Submitter) -> Response:
    """Its turns and its summary are gone; jobs and results stay.

    A job of it that is under way goes on, and its turn is not remembered.
    """
    wanted: str = check_option("memory_id", memory_id)
    found = await services.stores.run_whole(
        caller.tenant, lambda c: delete_conversation(c, wanted, tenant=caller.tenant)
    )
    if not found:
        raise not_found("conversation")
    return Response(status_code=204)


def _json(found: Conversation) -> dict[str, Any]:
    turns = [
        {
            "number": turn.number,
            "job_id": turn.job_id,
            "messages": turn.messages,
            "created_at": turn.created_at,
        }
        for turn in found.turns
    ]
    return {
        "memory_id": found.memory_id,
        "object": "conversation",
        "turns": turns,
        "summary": found.summary,
        "created_at": found.created_at,
        "updated_at": found.updated_at,
    }
