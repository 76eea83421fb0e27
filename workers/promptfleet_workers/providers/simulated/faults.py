"""What the scripted failures are made of."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from typing import Protocol

from .answers import Answer, Call, Rejected
from .markers import Fault, FaultKind

GATEWAY_PAGE = (
    b"<html><head><title>Bad Gateway</title></head>"
    b"<body><center><h1>Bad Gateway</h1></center><hr>simulated</body></html>"
)
FILLER = b" " * 65_536
"""White space, so that neither JSON nor an event ever begins."""

_MARK = "\ue000"  # a private character that stands for what no text can hold
_BLEMISHES = {
    FaultKind.BAD_UTF8: b"\xff\xfe",
    FaultKind.NUL: b"\\u0000",
    FaultKind.SURROGATE: b"\\ud83d",
}
_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 429: "requests"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


@functools.cache
def bomb() -> bytes:
    """Few bytes of gzip that become very many: 64 members of a mebibyte each."""
    return gzip.compress(b" " * 1024 * 1024) * 64


class Shape(Protocol):
    """What an endpoint makes of a call."""

    def payload(self, call: Call) -> bytes:
        """The body of the whole answer."""
        ...

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        ...


class Blemished:
    """An endpoint whose answers have something in them that is hard to read or to store."""

    def __init__(self, shape: Shape, kind: FaultKind) -> None:
        self._shape = shape
        self._blemish = _BLEMISHES[kind]

    def payload(self, call: Call) -> bytes:
        """The body of the whole answer."""
        return self._put(self._shape.payload(_marked(call)))

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        before, tokens, after = self._shape.events(_marked(call))
        return before, [self._put(token) for token in tokens], after

    def _put(self, data: bytes) -> bytes:
        return data.replace(_MARK.encode(), self._blemish)


def _marked(call: Call) -> Call:
    answers = [Answer(f"{a.text} {_MARK} end", a.tokens, a.finish) for a in call.answers]
    return dataclasses.replace(call, answers=answers)


def refusal(fault: Fault, *, is_anthropic: bool) -> Rejected:
    """The error that a fault tells of, as the API words it."""
    if fault.kind is FaultKind.QUOTA:
        return _out_of_quota(is_anthropic=is_anthropic)
    if fault.kind is FaultKind.OVERLOAD:
        status = 529 if is_anthropic else 503
        message = "The engine is currently overloaded, please try again later."
        return Rejected(status, message, kind="server_error", code="engine_overloaded")
    default = "server_error" if fault.status >= 500 else "invalid_request_error"  # noqa: PLR2004
    return Rejected(
        fault.status,
        f"Simulated failure with status {fault.status}.",
        kind=_TYPES.get(fault.status, default),
        code=fault.code or _CODES.get(fault.status),
        retry_after_ms=fault.retry_after_ms,
    )


def _out_of_quota(*, is_anthropic: bool) -> Rejected:
    if is_anthropic:
        message = "Your credit balance is too low to access the Anthropic API."
        return Rejected(400, message)
    message = "You exceeded your current quota, please check your plan and billing details."
    return Rejected(429, message, kind="insufficient_quota", code="insufficient_quota")
