"""What a provider is to the pipeline: something that answers one or many requests in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import TimeoutOptions
from promptfleet_shared.jobs import NO_USAGE, JobKind, Usage


@dataclasses.dataclass(slots=True)
class Received:
    """What came of a streamed answer so far: what a call is priced by that comes to no end.

    Attributes:
        size: UTF-8 bytes of the answer: text, reasoning and arguments of tool calls.
        input: The provider's own count of the input's tokens, where it came.
        cached: Those of them that the provider took from its prefix cache.
    """

    size: int = 0
    input: int | None = None
    cached: int = 0

    def hear(self, text: str) -> None:
        """Count the next piece."""
        self.size += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


class Call(NamedTuple):  # and not a data class, which takes three times as long to make
    """One request to a provider, for one job or, where the endpoint takes a list, for many.

    Attributes:
        requests: Each job's own part of the body, as a JSON object's text without whitespace:
            `messages`, `prompt` or `input` and parameters, keys sorted, no `model`. Many only if
            they differ in nothing but `prompt` or `input`.
        input_tokens: Our estimate for each of them.
        stream: True to ask for chats and completions as event streams: a dead call is noticed
            after `idle_timeout_ms`. The answer is the same.
        on_text: Hears a stream's text (that of the first choice) as it comes; must not block.
        on_headers: Hears the headers of the response, also of a refusal; must not block.
        received: Is told what came of a stream, for whoever has to price one that is cut.
    """

    kind: JobKind
    model: str
    requests: Sequence[str]
    input_tokens: Sequence[int]
    timeouts: TimeoutOptions
    stream: bool = False
    on_text: Callable[[str], None] | None = None
    on_headers: Callable[[Mapping[str, str]], None] | None = None
    received: Received | None = None


class Completion(NamedTuple):
    """A provider's whole answer to one request.

    Attributes:
        text: The answer; None where there is none to read (tool calls, embeddings).
        response: The response's JSON as it came, or this request's share of it; of a stream, the
            JSON that would have come without streaming.
        finish_reason: As the provider names it; never empty for a whole text.
        model: The model that answered, as the provider names it.
    """

    text: str | None
    response: bytes
    finish_reason: str | None
    usage: Usage = NO_USAGE
    model: str | None = None


Answer = Completion | ProviderError


class Provider(Protocol):
    """A deployment that can be called."""

    async def call(self, call: Call) -> list[Answer]:
        """Send one request; one answer for each of `call.requests`, in their order.

        Raises:
            ProviderError: The call failed as a whole.
        """
        ...

    async def aclose(self) -> None:
        """Give back connections."""
        ...
