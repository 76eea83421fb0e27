"""A chat request, taken apart and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from promptfleet_workers.providers.responses import read_json, write_json

SUMMARY_OF = "Summary of our conversation so far:\n"
_UNDERSTOOD = "Understood."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A request's body and its messages.

    Attributes:
        wanted: Tokens that the answer may have; None where the request does not say.
    """

    body: dict[str, Any]
    messages: list[Mapping[str, Any]]

    @property
    def wanted(self) -> int | None:
        """Tokens that the answer may have; None where the request does not say."""
        for field in ("max_completion_tokens", "max_tokens"):
            value = self.body.get(field)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def with_messages(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The request with other messages, all else in the order that it had."""
        return write_json({**self.body, "messages": list(messages)}).decode()


def read_chat(request: str) -> Chat | None:
    """The chat of a request; None for what has no messages to choose from."""
    body = read_json(request.encode("utf-8", "surrogatepass"))
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages:
        return None
    if not all(isinstance(message, dict) for message in messages):
        return None
    return Chat(body=body, messages=messages)


def summary_turn(summary: str) -> list[dict[str, str]]:
    """A summary as a turn of its own.

    As what the user said, not as the system: it was made of what users wrote, and must not be
    heeded more than that. With an answer, since some models insist on roles that take turns.
    """
    return [
        {"role": "user", "content": SUMMARY_OF + summary},
        {"role": "assistant", "content": _UNDERSTOOD},
    ]
