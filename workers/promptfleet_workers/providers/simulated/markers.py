"""Scripted behaviour: `[[sim:…]]` markers in the text of a prompt.

`[[sim:status=429,retry-after-ms=200,times=2]]` fails the first two calls of that exact prompt with
429 and answers the third. Several markers add up. Keys:

- a failure, one of:
  `status=N` (400 to 599; with `code=…` and `retry-after-ms=N`), `quota` (the account is used up),
  `overload`, `html` (an error page of a gateway; `status=200` for one that claims success),
  `error-body` (a success that tells of an error: `status=N` and `code=…` are the body's),
  `error-event` (the same after half of a stream);
  `hang` (no answer ever), `disconnect` (a TCP reset), `slow` (the answer trickles), `drip` (a byte
  at a time, with a pause of `drip_ms`), `endless` (the body never ends);
  after half of the answer: `truncate` (the end of the connection), `stall` (nothing more comes),
  `reset` (a TCP reset); `cut` (well-formed, without a finish reason);
  `bad-utf8`, `nul`, `surrogate` (the answer has one in it), `bomb` (64 MiB of gzip);
- `times=N`: the failure ends after N calls of that prompt; without it, never;
- `latency-ms=N`, `output-tokens=N`, `finish=REASON`;
- `text=…`: the answer itself; it takes the rest of its marker, commas included.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARKER = re.compile(r"\[\[sim:(.*?)\]\]", re.DOTALL)
_OPENING = "[[sim:"
_TEXT = re.compile(r"(?:^|,)\s*text=", re.DOTALL)


class FaultKind(enum.StrEnum):
    """How a call goes wrong."""

    STATUS = "status"
    TIMEOUT = "timeout"
    DISCONNECT = "disconnect"
    TRUNCATE = "truncate"
    HTML = "html"
    SLOW = "slow"
    QUOTA = "quota"
    OVERLOAD = "overload"
    ERROR_BODY = "error-body"
    ERROR_EVENT = "error-event"
    DRIP = "drip"
    ENDLESS = "endless"
    STALL = "stall"
    RESET = "reset"
    CUT = "cut"
    BAD_UTF8 = "bad-utf8"
    NUL = "nul"
    SURROGATE = "surrogate"
    BOMB = "bomb"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One failure; `status`, `code` and `retry_after_ms` matter to those that tell of errors."""

    kind: FaultKind
    status: int = 0
    code: str | None = None
    retry_after_ms: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Directive:
    """What the markers of one prompt ask for."""

    fault: Fault | None = None
    times: int | None = None
    latency_ms: float | None = None
    output_tokens: int | None = None
    finish: str | None = None
    text: str | None = None

    def fault_of_call(self, call: int) -> Fault | None:
        """The failure of the `call`-th call of the prompt, counted from 1."""
        return self.fault if self.times is None or call <= self.times else None


def _status(value: str) -> int:
    status = int(value)
    if status != 200 and not 400 <= status <= 599:  # noqa: PLR2004 - HTTP's numbers
        raise ValueError("must be 400 to 599, or 200 with html")
    return status


_VALUES: dict[str, Callable[[str], Any]] = {
    "status": _status,
    "retry-after-ms": int,
    "times": int,
    "latency-ms": float,
    "output-tokens": int,
    "finish": str,
    "code": str,
    "text": str,
}
_FLAGS = {kind.value: kind for kind in FaultKind if kind is not FaultKind.STATUS}
_FLAGS["hang"] = FaultKind.TIMEOUT


def read_markers(text: str) -> Directive | None:
    """What `text` asks for, None without markers; ValueError for one that means nothing."""
    if _OPENING not in text:
        return None
    values: dict[str, Any] = {}
    kind: FaultKind | None = None
    for marker in _MARKER.findall(text):
        for key, value in _entries(marker):
            if key in _FLAGS:
                kind = _FLAGS[key]
            elif key in _VALUES:
                values[key] = _value(key, value)
            else:
                raise ValueError(f"unknown key {key!r} in [[sim:{marker}]]")
    return Directive(
        fault=_fault(kind, values),
        times=values.get("times"),
        latency_ms=values.get("latency-ms"),
        output_tokens=values.get("output-tokens"),
        finish=values.get("finish"),
        text=values.get("text"),
    )


def without_markers(text: str) -> str:
    """`text` as a reader would see it."""
    return _MARKER.sub("", text) if _OPENING in text else text


def _entries(marker: str) -> list[tuple[str, str]]:
    found = _TEXT.search(marker)
    head = marker[: found.start()] if found else marker
    entries = []
    for entry in head.split(",") if head else []:
        key, _, value = entry.partition("=")
        entries.append((key.strip(), value.strip()))
    if found:
        entries.append(("text", marker[found.end() :]))
    return entries


def _value(key: str, value: str) -> Any:
    try:
        return _VALUES[key](value)
    except ValueError as error:
        raise ValueError(f"bad value {value!r} of {key} in a [[sim:…]] marker: {error}") from None


def _fault(kind: FaultKind | None, values: dict[str, Any]) -> Fault | None:
    if kind is None:
        if "status" not in values:
            return None
        kind = FaultKind.STATUS
    if kind is FaultKind.STATUS and values["status"] == 200:  # noqa: PLR2004 - HTTP's number
        raise ValueError("status=200 in a [[sim:…]] marker makes sense with html only")
    return Fault(
        kind=kind,
        status=values.get("status", 502 if kind is FaultKind.HTML else 500),
        code=values.get("code"),
        retry_after_ms=values.get("retry-after-ms"),
    )
