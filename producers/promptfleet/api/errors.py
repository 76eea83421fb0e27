"""Every error as JSON of one shape, OpenAI's: `{"error": {message, type, param, code}}`.

| What happened                        | Status                     | code                        |
|--------------------------------------|----------------------------|------------------------------|
| The request is wrong                 | 422, on OpenAI's paths 400 | invalid_request              |
| A key was used with another request  | 422                        | idempotency_conflict         |
| No such thing, or another tenant's   | 404                        | not_found                    |
| Postgres is away                     | 503                        | store_unavailable            |
| A bug, or a database that refuses    | 500                        | internal_error, store_refused|

The type is `invalid_request_error`, `rate_limit_error` (429) or `server_error` (500, 503).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from promptfleet_shared.errors import (
    ConfigurationError,
    IdempotencyConflictError,
    InvalidRequestError,
    JobNotFoundError,
    PromptFleetError,
    StoreRefusedError,
    StoreUnavailableError,
)

RETRY_AFTER_S = 2
"""Seconds after which a client may find Postgres back."""
INVALID = "invalid_request_error"
OURS = "server_error"
LIMITED = "rate_limit_error"
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_OWN_PATHS = ("/v1/jobs", "/v1/results", "/v1/conversations", "/v1/costs", "/v1/admin")
_CLIENT_GONE = 499
_UNPROCESSABLE, _BAD_REQUEST = 422, 400


class ApiError(PromptFleetError):
    """The request was refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,  # noqa: A002  # the field's name
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """An answer.

        Args:
            status: Of HTTP.
            message: A sentence for people, without any part of a prompt or a key.
            type: OpenAI's kind of error.
            code: A short, stable name for programs.
            param: Which field of the request is wrong.
            headers: Further ones, e.g. `retry-after`.
        """
        super().__init__(message)
        self.status = status
        self.type = type
        self.error_code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What stands under `error`: always all four keys."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.error_code,
        }


class JsonResponse(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body; floats that JSON has no form for become null."""
        return orjson.dumps(content)


def not_found(what: str = "job", *, param: str | None = None) -> ApiError:
    """The answer for what does not exist, or is another tenant's: nobody can tell which."""
    return ApiError(404, f"There is no such {what}.", code="not_found", param=param)


def invalid(message: str, *, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """The answer for a wrong request to one of the fleet's own endpoints."""
    return ApiError(_UNPROCESSABLE, message, code=code, param=param)


def too_large(message: str, *, code: str = "request_too_large") -> ApiError:
    """The answer for a body beyond a limit; the message names the limit."""
    return ApiError(413, message, code=code)


def overloaded(message: str, *, retry_after_s: float = 1) -> ApiError:
    """The answer where the API itself has no room."""
    headers = retry_after(retry_after_s)
    return ApiError(503, message, type=OURS, code="overloaded", headers=headers)


def limited(message: str, *, code: str, retry_after_s: float = 1) -> ApiError:
    """The answer where the tenant has used up what is theirs."""
    headers = retry_after(retry_after_s)
    return ApiError(429, message, type=LIMITED, code=code, headers=headers)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again, in whole seconds from 1."""
    return {"retry-after": str(max(1, round(seconds)))}


def api_error(  # noqa: PLR0911  # a table
    error: PromptFleetError, *, invalid_status: int = _UNPROCESSABLE
) -> ApiError:
    """The answer for one of our own errors.

    Args:
        error: What happened.
        invalid_status: Of a request that is wrong: 400 where OpenAI's own would be.
    """
    match error:
        case ApiError():
            return error
        case JobNotFoundError():
            return not_found()
        case IdempotencyConflictError():
            return invalid(error.message, param=error.field, code=error.code)
        case InvalidRequestError():
            param = error.field or None
            return ApiError(invalid_status, error.message, code="invalid_request", param=param)
        case StoreUnavailableError():
            headers = retry_after(RETRY_AFTER_S)
            return ApiError(503, error.message, type=OURS, code=error.code, headers=headers)
        case StoreRefusedError() | ConfigurationError():
            return ApiError(500, error.message, type=OURS, code=error.code)
        case _:
            return internal_error()


def internal_error() -> ApiError:
    """The answer for a bug: nothing of what went wrong, which may hold a prompt."""
    return ApiError(500, "The server failed; its log says more.", type=OURS, code="internal_error")


def error_response(error: ApiError) -> JsonResponse:
    """The response that carries the error."""
    return JsonResponse({"error": error.body}, status_code=error.status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Let the app answer with these errors."""
    app.add_exception_handler(PromptFleetError, _own)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)


def is_own_path(request: Request) -> bool:
    """True for the fleet's own endpoints, False for those that OpenAI defined."""
    root = request.scope.get("root_path", "").rstrip("/")
    path = request.scope["path"].removeprefix(root)
    return any(path == own or path.startswith(f"{own}/") for own in _OWN_PATHS)


def _invalid_status(request: Request) -> int:
    return _UNPROCESSABLE if is_own_path(request) else _BAD_REQUEST


def _own(request: Request, error: Exception) -> Response:
    assert isinstance(error, PromptFleetError)  # noqa: S101  # for the type checker
    return error_response(api_error(error, invalid_status=_invalid_status(request)))


def _validation(request: Request, error: Exception) -> Response:
    """Name the first mistake; never its value, which may be a prompt."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    param = ".".join(where[1:] or where)
    message = f"{param}: {first['msg']}"
    refused = ApiError(_invalid_status(request), message, code="invalid_request", param=param)
    return error_response(refused)


def _http(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)  # noqa: S101
    known = {404: "unknown_path", 405: "method_not_allowed"}
    headers = error.headers
    if error.status_code == 405:  # noqa: PLR2004
        headers = {"allow": ", ".join(_methods(request))}
    refused = ApiError(
        error.status_code,
        error.detail,
        code=known.get(error.status_code),
        headers=headers,
    )
    return error_response(refused)


def _methods(request: Request) -> list[str]:
    """All methods of this path: Starlette tells those of its first route only."""
    return [
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.router.routes
        )
    ]


def _gone(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """Nobody reads this: the client left in the middle of its request."""
    return Response(status_code=_CLIENT_GONE)
