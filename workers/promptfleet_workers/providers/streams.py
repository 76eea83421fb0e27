"""Streamed answers, whole again: what every provider's event stream has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import TimeoutOptions
from promptfleet_workers.providers.http import Endpoint, HttpClient, HttpResponse
from promptfleet_workers.providers.responses import (
    bad_response,
    failure,
    read_answer,
    read_json,
    response_json,
    truncated,
)
from promptfleet_workers.providers.sse import Event, EventStream

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""A longer answer is refused while it comes: what is kept of a stream, its envelopes aside."""
_MAX_HEAD_BYTES = 1024 * 1024
_OK = 200

OnText = Callable[[str], None]


class Assembly(Protocol):
    """Puts the answer of one provider's events together."""

    has_begun: bool
    """True once a part of the answer came."""

    def add(self, event: Event) -> bool:
        """Take the next event; true if it was the last one.

        Raises:
            ProviderError: The event tells of a failure, or can't be understood.
        """
        ...

    def end(self, pending: bytes) -> dict[str, Any]:
        """The answer, in the shape of one that was not streamed; `pending` is an unended event.

        Raises:
            ProviderError: Its end never came.
        """
        ...


class Parts(list[str]):
    """A text that is still growing; adding to a string would copy it each time."""


class Weight:
    """How much is kept of a stream."""

    def __init__(self) -> None:
        """Nothing, so far."""
        self._bytes = 0

    def add(self, size: int) -> None:
        """Keep `size` bytes or characters more.

        Raises:
            ProviderError: `response_too_large`.
        """
        self._bytes += size
        if self._bytes > MAX_ANSWER_BYTES:
            message = f"the streamed answer is longer than {MAX_ANSWER_BYTES} bytes"
            raise ProviderError(message, code="response_too_large", unknown_outcome=True)


class TextTap:
    """Hands on texts as they come, never half of a surrogate pair."""

    def __init__(self, on_text: OnText | None) -> None:
        """Hand on nothing where nobody listens."""
        self._on_text = on_text
        self._held = ""

    def __call__(self, text: str) -> None:
        """Hand on the next piece."""
        if self._on_text is None:
            return
        text = self._held + text
        self._held = ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._held = text[:-1], text[-1]
        if text:
            self._on_text(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


class _Reader:
    """From pieces to events to the assembly."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._events = EventStream()
        self.has_events = False
        self.head = bytearray()  # what came before any event: perhaps this is no event stream

    def take(self, piece: bytes) -> bool:
        if not self.has_events and len(self.head) < _MAX_HEAD_BYTES:
            self.head += piece
        for event in self._events.feed(piece):
            self.has_events = True
            if self._assembly.add(event):
                return True
        return False

    @property
    def pending(self) -> bytes:
        return self._events.pending


async def read_streamed(
    client: HttpClient,
    endpoint: Endpoint,
    body: bytes,
    timeouts: TimeoutOptions,
    assembly: Assembly,
    *,
    on_headers: Callable[[Mapping[str, str]], None] | None = None,
) -> tuple[dict[str, Any], bytes]:
    """The answer to a request that asks for a stream, decoded and as JSON.

    A server may well answer at once instead, with a failure or with the whole answer.

    Raises:
        ProviderError: As `HttpClient.post` and `read_answer`; `truncated` for a stream without
            its end.
    """
    reader = _Reader(assembly)
    try:
        response = await client.post(endpoint, body, timeouts, reader.take, on_headers)
    except ProviderError as error:
        if error.code == "connection_lost" and assembly.has_begun:
            raise truncated() from None
        raise
    if reader.has_events or reader.pending:
        data = assembly.end(reader.pending)
        return data, response_json(data)
    if reader.head:
        response = HttpResponse(response.status, response.headers, bytes(reader.head))
    elif not response.body and response.status == _OK:
        raise truncated(response.status)
    return read_answer(response), response.body


def decoded(event: Event, *, has_begun: bool) -> dict[str, Any]:
    """The JSON of an event.

    Raises:
        ProviderError: It tells of a failure, or is no JSON object.
    """
    try:
        data = read_json(event.data)
    except ValueError:
        data = None
    is_failure = event.name == b"error" or (isinstance(data, dict) and data.get("error"))
    if is_failure or isinstance(data, list):
        raise failure(data, _OK, has_begun=has_begun)
    if not isinstance(data, dict):
        raise bad_response("an event of the stream is no JSON object", _OK)
    return data
