"""The events of Gemini's streams, put together to the response that they are parts of.

Each event is a response of its own, with the next piece of each candidate; the stream ends with the
body, and what counts in the end is the last that was said of everything but the parts.
"""

from __future__ import annotations

from typing import Any

from promptfleet_workers.providers.protocol import Received
from promptfleet_workers.providers.responses import bad_response, tokens, truncated, write_json
from promptfleet_workers.providers.sse import Event
from promptfleet_workers.providers.streams import OnText, Parts, TextTap, Weight, decoded

_Json = dict[str, Any]


class ResponseAssembly:
    """Puts the events of a response's stream together."""

    def __init__(self, *, on_text: OnText | None = None, received: Received | None = None) -> None:
        """Expect the first event; `on_text` hears the first candidate's text as it comes."""
        self._received = received
        self._tap = TextTap(on_text)
        self._head: _Json = {}
        self._candidates: dict[int, _Json] = {}
        self._parts: dict[int, list[_Json]] = {}
        self._weight = Weight()
        self.has_begun = False

    def add(self, event: Event) -> bool:
        """Take the next event; never the last one, as the stream has no word of its end.

        Raises:
            ProviderError: The event tells of a failure, or can't be understood.
        """
        data = decoded(event, has_begun=self.has_begun)
        candidates = data.pop("candidates", None) or []
        if type(candidates) is not list:
            raise bad_response("an event of the stream has candidates that are no list")
        self._head.update({key: value for key, value in data.items() if value is not None})
        self._weight.add(len(event.data))
        self._count(data.get("usageMetadata"))
        for candidate in candidates:
            if type(candidate) is not dict:
                raise bad_response("a candidate in the stream is no object")
            self._take(candidate)
        return False

    def end(self, pending: bytes) -> _Json:  # noqa: ARG002 - an event without its end is none
        """The response, in the shape of one that was not streamed.

        Raises:
            ProviderError: Its end never came.
        """
        if not self._candidates and "promptFeedback" not in self._head:
            raise truncated()
        return {**self._head, "candidates": [self._whole(n) for n in sorted(self._candidates)]}

    def _count(self, counts: Any) -> None:
        """Tell what the provider counted so far."""
        if self._received is not None and type(counts) is dict and "promptTokenCount" in counts:
            self._received.input = tokens(counts["promptTokenCount"])
            self._received.cached = tokens(counts.get("cachedContentTokenCount"))

    def _take(self, candidate: _Json) -> None:
        index = candidate.get("index", 0)
        if type(index) is not int:
            raise bad_response("a candidate in the stream has no number")
        content = candidate.pop("content", None)
        known = self._candidates.setdefault(index, {})
        known.update({key: value for key, value in candidate.items() if value is not None})
        parts = content.get("parts") if type(content) is dict else None
        for part in parts if type(parts) is list else ():
            if type(part) is dict:
                self.has_begun = True
                self._grow(index, part)

    def _grow(self, index: int, part: _Json) -> None:
        """Let the last part go on if this one is the same kind of text, else begin the next."""
        text = part.get("text")
        is_thought = part.get("thought") is True
        parts = self._parts.setdefault(index, [])
        if type(text) is not str:
            if self._received is not None:
                self._received.hear(write_json(part.get("functionCall") or {}).decode())
            parts.append(part)
            return
        if self._received is not None:
            self._received.hear(text)
        if index == 0 and not is_thought and text:
            self._tap(text)
        last = parts[-1] if parts else None
        goes_on = last is not None and (last.get("thought") is True) == is_thought
        if last is not None and goes_on and type(last.get("text")) is Parts:
            last["text"].append(text)
            return
        parts.append({**part, "text": Parts([text])})

    def _whole(self, index: int) -> _Json:
        parts = [
            {key: "".join(value) if type(value) is Parts else value for key, value in part.items()}
            for part in self._parts.get(index, [])
        ]
        return {**self._candidates[index], "content": {"role": "model", "parts": parts}}
