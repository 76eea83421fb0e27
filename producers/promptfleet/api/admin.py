"""API keys over HTTP, for callers with the scope `admin`: those of their own tenant.

Callers of the operator's tenant (`PROMPTFLEET_OPERATOR_TENANT`) manage the keys of all tenants.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from promptfleet.api.auth import Caller
from promptfleet.api.bodies import parse_json
from promptfleet.api.dependencies import Admin, ServicesDep
from promptfleet.api.errors import ApiError, JsonResponse, invalid, not_found
from promptfleet.api.services import Services
from promptfleet_shared.store.keys import (
    MAX_LIFETIME_S,
    MAX_NAME_LENGTH,
    Key,
    NewKey,
    Scope,
    check_tenant,
    create_key,
    list_keys,
    revoke_key,
    rotate_key,
)

M = TypeVar("M", bound=BaseModel)

router = APIRouter(prefix="/v1/admin/keys", tags=["keys"])

OVERLAP_S = 86_400.0
"""Seconds that a rotated key goes on, where the request does not say."""
_SECRET_HEADERS = {"cache-control": "no-store"}
_MISSING: dict[int | str, dict[str, Any]] = {
    404: {"description": "The tenant has no such key, or it opens nothing any more."}
}


class KeyRequest(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=MAX_NAME_LENGTH, description="For people.")] = ""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=len(Scope))] = [
        Scope.SUBMIT,
        Scope.READ,
    ]
    expires_in_s: Annotated[
        float | None,
        Field(gt=0, le=MAX_LIFETIME_S, description="Seconds; null lasts until it is revoked."),
    ] = None
    tenant: Annotated[
        str | None,
        Field(min_length=1, max_length=MAX_NAME_LENGTH, description="By default your own."),
    ] = None


class Rotation(BaseModel):
    """How to rotate a key."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: Annotated[
        float, Field(ge=0, le=MAX_LIFETIME_S, description="Seconds that the old key goes on.")
    ] = OVERLAP_S


class KeyObject(BaseModel):
    """A key, without its secret."""

    id: uuid.UUID
    object: str = "api_key"
    tenant: str
    name: str
    prefix: str = Field(description="What the key begins with, after `pf_`.")
    scopes: list[Scope]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None = Field(description="To a minute or two.")
    usable: bool


class NewKeyObject(KeyObject):
    """A key that was just made, with the only sight of its secret."""

    key: str


class KeyList(BaseModel):
    """A tenant's keys, the newest first."""

    object: str = "list"
    data: list[KeyObject]


TenantQuery = Annotated[
    str | None,
    Query(min_length=1, max_length=MAX_NAME_LENGTH, description="By default your own."),
]


def _body(model: type[BaseModel], *, required: bool) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}
    }


@router.post(
    "",
    status_code=201,
    response_model=NewKeyObject,
    openapi_extra=_body(KeyRequest, required=True),
)
async def create(services: ServicesDep, caller: Admin, request: Request) -> JsonResponse:
    """Make a key. Its secret is in this response, and nowhere afterwards."""
    wanted = _checked(KeyRequest, await services.limits.read_json(request))
    tenant = _tenant(services, caller, wanted.tenant)
    made = await services.stores.run(
        tenant,
        lambda connection: create_key(
            connection,
            tenant=tenant,
            scopes=wanted.scopes,
            name=wanted.name,
            expires_in_s=wanted.expires_in_s,
        ),
    )
    return JsonResponse(_with_secret(made), status_code=201, headers=_SECRET_HEADERS)


@router.get("", response_model=KeyList)
async def list_(services: ServicesDep, caller: Admin, tenant: TenantQuery = None) -> JsonResponse:
    """The keys of a tenant, those that open nothing any more among them."""
    whose = _tenant(services, caller, tenant)
    keys = await services.stores.run(whose, lambda connection: list_keys(connection, tenant=whose))
    return JsonResponse({"object": "list", "data": [_shown(key) for key in keys]})


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    response_model=NewKeyObject,
    responses=_MISSING,
    openapi_extra=_body(Rotation, required=False),
)
async def rotate(
    services: ServicesDep,
    caller: Admin,
    key_id: uuid.UUID,
    request: Request,
    tenant: TenantQuery = None,
) -> JsonResponse:
    """Make a key like this one, which goes on for a while: time to change it everywhere."""
    whose = _tenant(services, caller, tenant)
    body = await services.limits.read_body(request)
    overlap_s = _checked(Rotation, parse_json(body) if body.strip() else {}).overlap_s
    made = await services.stores.run(
        whose,
        lambda connection: rotate_key(connection, key_id, tenant=whose, overlap_s=overlap_s),
    )
    if made is None:
        raise not_found("API key that could be rotated")
    services.auth.forget(key_id)  # its end may be nearer now
    return JsonResponse(_with_secret(made), status_code=201, headers=_SECRET_HEADERS)


@router.delete("/{key_id}", response_model=KeyObject, responses=_MISSING)
async def revoke(
    services: ServicesDep, caller: Admin, key_id: uuid.UUID, tenant: TenantQuery = None
) -> JsonResponse:
    """Let a key open nothing any more: at once here, within seconds in other processes."""
    whose = _tenant(services, caller, tenant)
    revoked = await services.stores.run(
        whose, lambda connection: revoke_key(connection, key_id, tenant=whose)
    )
    if revoked is None:
        raise not_found("API key")
    services.auth.forget(key_id)
    return JsonResponse(_shown(revoked))


def _checked(model: type[M], body: Any) -> M:
    """The body in its shape; read by the handler, so that nobody without a key can make us read.

    Raises:
        ApiError: 422; names the first mistake, and never a value.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or "body"
        raise invalid(f"{param}: {first['msg']}", param=param) from None


def _tenant(services: Services, caller: Caller, asked: str | None) -> str:
    """Whose keys are meant, if the caller may manage them; whether there is such a tenant or not.

    Raises:
        ApiError: 403.
    """
    if asked is None or asked == caller.tenant:
        return caller.tenant
    if caller.tenant == services.settings.operator_tenant:
        return check_tenant(asked)
    raise ApiError(
        403,
        "This API key manages the keys of its own tenant only.",
        type="permission_error",
        code="insufficient_scope",
        param="tenant",
    )


def _shown(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "api_key",
        "tenant": key.tenant,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": [scope for scope in Scope if scope in key.scopes],
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
        "usable": key.usable,
    }


def _with_secret(made: NewKey) -> dict[str, Any]:
    return {**_shown(made.key), "key": made.secret}
