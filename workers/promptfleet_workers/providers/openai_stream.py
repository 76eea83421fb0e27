"""The chunks of OpenAI's streams, put together to the answer that they are parts of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promptfleet_workers.providers.protocol import Received
from promptfleet_workers.providers.responses import bad_response, truncated
from promptfleet_workers.providers.sse import Event
from promptfleet_workers.providers.streams import OnText, Parts, TextTap, Weight, decoded

_Json = dict[str, Any]
_DONE = b"[DONE]"
# What names a thing is repeated by some servers; everything else that is a text goes on.
_NAMES = frozenset({"role", "id", "type", "format"})
_OWN = frozenset({"index", "delta", "text", "logprobs", "finish_reason"})
_MAX_DEPTH = 8
_ENTRY_BYTES = 100


class _Numbered(dict[int, _Json]):
    """A list of objects (tool calls) whose parts come in any order."""


class ChunkAssembly:
    """Puts the chunks of a chat's or a completion's stream together."""

    def __init__(
        self, *, is_chat: bool, on_text: OnText | None = None, received: Received | None = None
    ) -> None:
        """Expect the first chunk; `on_text` hears the first choice's text as it comes."""
        self._received = received
        self._is_chat = is_chat
        self._tap = TextTap(on_text)
        self._head: _Json = {}
        self._choices: dict[int, _Json] = {}
        self._usage: _Json | None = None
        self._weight = Weight()
        self._is_over = False
        self.has_begun = False

    def add(self, event: Event) -> bool:
        """Take the next event; true if it was the last one.

        Raises:
            ProviderError: The event tells of a failure, or can't be understood.
        """
        if event.data.strip() == _DONE:
            self._is_over = True
            return True
        chunk = decoded(event, has_begun=self.has_begun)
        choices = chunk.get("choices")
        if type(choices) is list:
            for choice in choices:
                if type(choice) is not dict:
                    raise bad_response("a choice in the stream is no JSON object")
                self._add_choice(choice, len(event.data))
        usage = chunk.get("usage")
        if type(usage) is dict:
            self._usage = usage
        for name, value in chunk.items():
            if value is not None and name not in {"choices", "usage", "object"}:
                self._set(self._head, name, value, len(event.data))
        return False

    def end(self, pending: bytes) -> _Json:
        """The answer, in the shape of one that was not streamed.

        Raises:
            ProviderError: Its end never came.
        """
        if not self._is_over and pending.strip() != _DONE:
            raise truncated()
        answer = {**self._head, "object": "chat.completion" if self._is_chat else "text_completion"}
        answer["choices"] = [_whole(self._choices[index]) for index in sorted(self._choices)]
        if self._usage is not None:
            answer["usage"] = self._usage
        return answer

    def _add_choice(self, part: _Json, weight: int) -> None:
        index = part.get("index", 0)
        if type(index) is not int:
            raise bad_response("a choice in the stream has no number")
        choice = self._choices.get(index)
        if choice is None:
            self._weight.add(_ENTRY_BYTES)
            choice = self._choices[index] = self._new_choice(index)
        text = self._add_delta(choice, part, weight)
        if index == 0 and type(text) is str and text:
            self._tap(text)
        if part.get("finish_reason"):
            choice["finish_reason"] = part["finish_reason"]
        if type(part.get("logprobs")) is dict:
            self._merge(choice, {"logprobs": part["logprobs"]}, weight)
        for name in part.keys() - _OWN:
            if part[name] is not None:
                self._set(choice, name, part[name], weight)

    def _add_delta(self, choice: _Json, part: _Json, weight: int) -> Any:
        """Let the choice's message or text grow; returns the new text."""
        if not self._is_chat:
            text = part.get("text")
            if type(text) is str:
                self._merge_text(choice, "text", text)
            return text
        delta = part.get("delta")
        if type(delta) is not dict:
            return None
        self._merge(choice["message"], delta, weight)
        return delta.get("content")

    def _new_choice(self, index: int) -> _Json:
        content: _Json = {"message": {"role": "assistant", "content": None}}
        if not self._is_chat:
            content = {"text": Parts()}
        return {"index": index, **content, "logprobs": None, "finish_reason": None}

    def _set(self, holder: _Json, name: str, value: Any, weight: int) -> None:
        """Where only the last value counts."""
        if name not in holder:
            self._weight.add(weight)
        holder[name] = value

    def _merge(self, whole: _Json, part: _Json, weight: int, depth: int = 0) -> None:
        """Let `whole` grow by `part`: texts and lists go on, objects grow, the rest is replaced."""
        for name, value in part.items():
            current = whole.get(name)
            if value is None:
                whole.setdefault(name, None)
            elif type(value) is str:
                self._merge_text(whole, name, value)
            elif name == "tool_calls" and type(value) is list:
                self._merge_numbered(whole, name, value, weight, depth)
            elif type(value) is list:
                self._weight.add(weight)
                if type(current) is not list:
                    current = whole[name] = _as_parts(current)
                current.extend(value)
            elif type(value) is dict and depth < _MAX_DEPTH:
                if type(current) is not dict:
                    self._weight.add(_ENTRY_BYTES)
                    current = whole[name] = {}
                self._merge(current, value, weight, depth + 1)
            else:
                self._set(whole, name, value, weight)

    def _merge_text(self, whole: _Json, name: str, value: str) -> None:
        current = whole.get(name)
        self._weight.add(len(value))
        self.has_begun = self.has_begun or (bool(value) and name not in _NAMES)
        if self._received is not None and name not in _NAMES:
            self._received.hear(value)
        if type(current) is Parts:
            current.append(value)
        elif type(current) is list:  # Mistral: parts of a content, then plain texts
            current.append({"type": "text", "text": value})
        elif name not in _NAMES:
            whole[name] = Parts([value])
        elif not current:
            whole[name] = value

    def _merge_numbered(
        self, whole: _Json, name: str, parts: list[Any], weight: int, depth: int
    ) -> None:
        current = whole.get(name)
        if type(current) is not _Numbered:
            current = whole[name] = _Numbered()
        for part in parts:
            if type(part) is not dict or depth >= _MAX_DEPTH:
                raise bad_response("a tool call in the stream can't be read")
            number = _number(part, current)
            if number not in current:
                self._weight.add(_ENTRY_BYTES)
                current[number] = {}
            self._merge(
                current[number], {k: part[k] for k in part if k != "index"}, weight, depth + 1
            )
        self.has_begun = True


def _number(part: _Json, known: Mapping[int, _Json]) -> int:
    """Which tool call a part belongs to; without a number, one with an id begins a new one."""
    number = part.get("index")
    if type(number) is int:
        return number
    last = max(known, default=-1)
    return last + 1 if part.get("id") or last < 0 else last


def _as_parts(text: Any) -> list[Any]:
    """A text so far as the first part of a content in parts."""
    is_text = type(text) is Parts and any(text)
    return [{"type": "text", "text": "".join(text)}] if is_text else []


def _whole(value: Any, depth: int = 0) -> Any:
    """The value with its texts joined; what came whole is left as it is."""
    if type(value) is Parts:
        return "".join(value)
    if type(value) is _Numbered:
        return [_whole(value[number], depth + 1) for number in sorted(value)]
    if type(value) is dict and depth <= 4 * _MAX_DEPTH:  # deeper, nothing was merged
        return {name: _whole(item, depth + 1) for name, item in value.items()}
    return value
