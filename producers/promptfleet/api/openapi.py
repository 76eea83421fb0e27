"""The OpenAPI document: what FastAPI knows, bodies that we read ourselves, and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from promptfleet.api.admin import KeyRequest, Rotation
from promptfleet.api.shapes import ErrorBody, JobRequest, UploadLine

BODIES: tuple[type[BaseModel], ...] = (
    JobRequest,
    UploadLine,
    ErrorBody,
    KeyRequest,
    Rotation,
)
"""Shapes that an endpoint's `openapi_extra` names as `#/components/schemas/<name>`."""

_REF = "#/components/schemas/{model}"
_OPEN = frozenset({"/healthz", "/readyz", "/metrics"})
_KEY: dict[str, Any] = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, `pf_…`; `promptfleet keys create` makes one.",
}
_ERROR: dict[str, Any] = {
    "description": "Refused, or failed.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
}
_VALIDATION = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI) -> None:
    """Let the app serve this document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(plain())
        document: dict[str, Any] = app.openapi_schema or {}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, extra = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REF)
    for name, schema in extra["$defs"].items():
        schemas.setdefault(name, schema)
    for name in _VALIDATION:  # FastAPI's own shape of errors, which we don't use
        schemas.pop(name, None)
    components["securitySchemes"] = {"key": _KEY}
    for path, operation in _operations(document):
        operation["responses"] = {
            status: response
            for status, response in operation["responses"].items()
            if "HTTPValidationError" not in str(response)
        }
        operation["responses"].setdefault("default", _ERROR)
        operation["security"] = [] if path in _OPEN else [{"key": []}]


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            yield path, operation
