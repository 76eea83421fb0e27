"""What a chat is made of: messages that stay, and turns that are kept or left out as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

Message = Mapping[str, Any]

SYSTEM_ROLES = frozenset({"system", "developer"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The places of a chat's messages, by what may become of them.

    A turn is what the user said and all that answered it, so tool calls and their answers are
    never parted, and no answer is left without its question.

    Attributes:
        pinned: System and developer messages: always kept.
        turns: The earlier turns, the oldest first.
        last: The last turn: always kept.
    """

    pinned: list[int]
    turns: list[list[int]]
    last: list[int]

    def places(self, kept: Sequence[int]) -> list[int]:
        """The places that remain, in order, if these of the earlier turns are kept."""
        chosen = [place for n in kept for place in self.turns[n]]
        return sorted([*self.pinned, *chosen, *self.last])


def split(messages: Sequence[Message]) -> Split:
    """Part a chat into its turns.

    Example:
        >>> split([{"role": "user"}, {"role": "assistant"}, {"role": "user"}])
        Split(pinned=[], turns=[[0, 1]], last=[2])
    """
    pinned: list[int] = []
    turns: list[list[int]] = []
    turn_of_call: dict[str, int] = {}
    previous = None
    for place, message in enumerate(messages):
        role = message.get("role")
        if role in SYSTEM_ROLES:
            pinned.append(place)
            continue
        if not turns or (role == "user" and previous != "user"):
            turns.append([])
        previous = role
        turns[-1].append(place)
        for call in _call_ids(message):
            turn_of_call[call] = len(turns) - 1
        asked = turn_of_call.get(str(message.get("tool_call_id")))
        if asked is not None and asked < len(turns) - 1:
            # An answer that came after the next question: all between belongs together.
            turns[asked:] = [[place for turn in turns[asked:] for place in turn]]
            turn_of_call = {call: min(n, asked) for call, n in turn_of_call.items()}
    return Split(pinned=pinned, turns=turns[:-1], last=turns[-1] if turns else [])


def text_of(messages: Sequence[Message]) -> str:
    """The words of some messages, tool calls as the JSON they are."""
    return "\n".join(text for message in messages for text in _texts(message))


def transcript(messages: Sequence[Message]) -> str:
    """Messages as a person would write them down: who said what."""
    lines = []
    for message in messages:
        role = str(message.get("role"))
        lines += [f"{role}: {text}" for text in _texts(message)]
    return "\n".join(lines)


def _call_ids(message: Message) -> list[str]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return []
    return [str(call["id"]) for call in calls if isinstance(call, Mapping) and "id" in call]


def _texts(message: Message) -> list[str]:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else []
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        texts = [part for part in parts if isinstance(part, str)]
    if calls := message.get("tool_calls"):
        texts.append(orjson.dumps(calls).decode())
    return texts
