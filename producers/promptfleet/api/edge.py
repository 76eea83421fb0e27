"""The outermost layer: ids of requests, their numbers, and an answer for what nobody caught."""

from __future__ import annotations

import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptfleet.api.errors import error_response, internal_error
from promptfleet.api.metrics import ApiMetrics

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{8,128}")
_NO_ROUTE = "none"
_FRAMES = 6


class Edge:
    """Gives every request an id, counts it, and answers 500 for an exception that got this far.

    What it logs of an exception is its type and where it was raised: its text may hold a prompt.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: ApiMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Wrap an app.

        Args:
            app: What answers.
            metrics: What is counted.
            clock: Seconds.
        """
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        began = self._clock()
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, noting)
        except Exception as error:  # noqa: BLE001  # the last one who can answer
            _report(error, scope, request_id)
            if status:
                raise BrokenOffError from None  # the server hangs up, as it must
            await error_response(internal_error())(scope, receive, noting)
        finally:
            seconds = self._clock() - began
            self._metrics.answered(scope["method"], _route(scope), status, seconds)
            if log.isEnabledFor(logging.DEBUG):
                _tell(scope, request_id, status, seconds)


class BrokenOffError(Exception):
    """A response that had begun was broken off; see the line before."""


def _request_id(scope: Scope) -> str:
    """The id that a proxy gave the request, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GIVEN_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req_{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The route's template, which has no ids in it."""
    return getattr(scope.get("route"), "path", None) or _NO_ROUTE


def _tell(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """Without path and query, which hold ids and metadata."""
    log.debug(
        "request_answered",
        extra={
            "method": scope["method"],
            "route": _route(scope),
            "status": status,
            "ms": round(seconds * 1000, 1),
            "request_id": request_id,
        },
    )


def _report(error: Exception, scope: Scope, request_id: str) -> None:
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    log.error(
        "request_failed",
        extra={
            "error": type(error).__name__,
            "at": [f"{frame.filename}:{frame.lineno}" for frame in frames],
            "route": _route(scope),
            "request_id": request_id,
        },
    )
