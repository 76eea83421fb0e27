"""`/v1/files`: upload, list, read and delete files, as OpenAI's clients do it for batches."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import pydantic
from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from promptfleet.api.dependencies import Reader, ServicesDep, Submitter
from promptfleet.api.errors import ApiError, JsonResponse, not_found
from promptfleet.api.openai.ids import FILE, private_id, public_id
from promptfleet.api.openai.uploading import FileUpload
from promptfleet.api.services import Services
from promptfleet.api.shapes import ErrorBody
from promptfleet_shared.store.deletions import Deletion
from promptfleet_shared.store.files import (
    StoredFile,
    delete_file,
    list_files,
    locate,
    read_chunk,
    read_file,
)

MAX_PAGE = 10_000
_CONFLICT, _PARTIAL, _UNSATISFIABLE = 409, 206, 416
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_UNPRINTABLE = re.compile(r"[^ !#-\[\]-~]")

router = APIRouter(prefix="/v1/files", tags=["files"])

_MISSING: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "You have no such file."}
}
_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "example": "batch"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3_600,
                            "maximum": 2_592_000,
                        },
                    },
                }
            }
        },
    }
}


class FileShape(pydantic.BaseModel):
    """A file without its content, as OpenAI's File object has it."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileListShape(pydantic.BaseModel):
    """Some files."""

    object: Literal["list"]
    data: list[FileShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeletedShape(pydantic.BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"]
    deleted: bool


@router.post(
    "",
    summary="Upload a file",
    response_model=FileShape,
    openapi_extra=_UPLOAD_BODY,
    responses={413: {"model": ErrorBody, "description": "Too large; the message names the limit."}},
)
async def upload(request: Request, services: ServicesDep, caller: Submitter) -> Response:
    """Written as it comes, and seen by nobody before it is whole."""
    with services.limits.uploads.taken(caller.tenant):
        made = await FileUpload(services, caller.tenant, request).run()
    return JsonResponse(file_json(made))


@router.get("", summary="List files", response_model=FileListShape)
async def list_(  # noqa: PLR0917  # one for each filter
    services: ServicesDep,
    caller: Reader,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The newest first, unless asked otherwise."""
    start = None if after is None else private_id(FILE, after, param="after")
    files, has_more = await services.stores.run(
        caller.tenant,
        lambda connection: list_files(
            connection,
            tenant=caller.tenant,
            purpose=purpose,
            after=start,
            limit=limit,
            oldest_first=order == "asc",
        ),
    )
    return JsonResponse(list_json([file_json(file) for file in files], has_more=has_more))


@router.get("/{file_id}", summary="Look at a file", response_model=FileShape, responses=_MISSING)
async def get(file_id: str, services: ServicesDep, caller: Reader) -> Response:
    """Without its content."""
    return JsonResponse(file_json(await _find(services, caller.tenant, file_id)))


@router.get(
    "/{file_id}/content",
    summary="Read a file",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The bytes."},
        206: {"content": {"application/octet-stream": {}}, "description": "Those asked for."},
        416: {"model": ErrorBody, "description": "It has none of these bytes."},
        **_MISSING,
    },
)
async def content(
    file_id: str, request: Request, services: ServicesDep, caller: Reader
) -> Response:
    """Its bytes as they were uploaded; a header `Range: bytes=0-99` asks for some of them."""
    file = await _find(services, caller.tenant, file_id)
    start, stop = 0, file.bytes
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f'attachment; filename="{_UNPRINTABLE.sub("_", file.filename)}"',
    }
    asked = _asked_range(request.headers.get("range"), file.bytes)
    if asked is not None:
        start, stop = asked
        headers["content-range"] = f"bytes {start}-{stop - 1}/{file.bytes}"
    return StreamingResponse(
        read_bytes(services, caller.tenant, file.id, start, stop),
        status_code=200 if asked is None else _PARTIAL,
        headers={**headers, "content-length": str(stop - start)},
        media_type="application/octet-stream",
    )


@router.delete(
    "/{file_id}",
    summary="Delete a file",
    response_model=FileDeletedShape,
    responses={
        **_MISSING,
        409: {"model": ErrorBody, "description": "A batch is still reading it."},
    },
)
async def delete(file_id: str, services: ServicesDep, caller: Submitter) -> Response:
    """With its content."""
    wanted = private_id(FILE, file_id)
    done = await services.stores.run(
        caller.tenant, lambda connection: delete_file(connection, wanted, tenant=caller.tenant)
    )
    if done is Deletion.MISSING:
        raise not_found("file")
    if done is Deletion.IN_USE:
        msg = "A batch is still reading this file; cancel it, or wait until it is in progress."
        raise ApiError(_CONFLICT, msg, code="file_in_use")
    return JsonResponse({"id": file_id, "object": "file", "deleted": True})


async def read_bytes(
    services: Services, tenant: str, file_id: uuid.UUID, start: int = 0, stop: int | None = None
) -> AsyncIterator[bytes]:
    """A file's bytes from `start` to before `stop`, a chunk in memory at a time."""
    n = at = 0
    if start:
        n, at = await services.stores.run(
            tenant, lambda connection: locate(connection, file_id, start, tenant=tenant)
        )
    while stop is None or at < stop:
        data = await _chunk(services, tenant, file_id, n)
        if data is None:
            return
        wanted = data[max(0, start - at) : None if stop is None else stop - at]
        n, at = n + 1, at + len(data)
        yield wanted


async def _chunk(services: Services, tenant: str, file_id: uuid.UUID, n: int) -> bytes | None:
    return await services.stores.run(
        tenant, lambda connection: read_chunk(connection, file_id, n, tenant=tenant)
    )


def file_json(file: StoredFile) -> dict[str, Any]:
    """OpenAI's File object."""
    return {
        "id": public_id(FILE, file.id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def list_json(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's list of objects that have ids."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


async def _find(services: Services, tenant: str, file_id: str) -> StoredFile:
    wanted = private_id(FILE, file_id)
    file = await services.stores.run(
        tenant, lambda connection: read_file(connection, wanted, tenant=tenant)
    )
    if file is None:
        raise not_found("file")
    return file


def _asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """From where to before where; None for all: no header, or one that may be ignored."""
    match = _RANGE.fullmatch(header or "")
    if match is None or match[1] == match[2] == "":
        return None
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = int(match[2]) if match[1] and match[2] else size - 1
    if match[1] and match[2] and last < first:
        return None
    if first >= size:
        headers = {"content-range": f"bytes */{size}"}
        msg = f"Range: the file has {size} bytes."
        raise ApiError(_UNSATISFIABLE, msg, code="range_not_satisfiable", headers=headers)
    return first, min(last, size - 1) + 1
