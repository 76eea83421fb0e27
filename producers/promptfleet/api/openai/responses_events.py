"""Streams of responses: OpenAI's events, made of a job's tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from promptfleet.api.errors import api_error
from promptfleet.api.openai.answering import Accepted, Asked
from promptfleet.api.openai.chunks import Frames
from promptfleet.api.openai.following import Begun
from promptfleet.api.openai.responses_output import (
    Draft,
    message_item,
    response_json,
    text_part,
)
from promptfleet.api.sse import sse_event
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.jobs import Result

Json = dict[str, Any]


def response_frames(draft: Callable[[Accepted], Draft]) -> Frames:
    """What `stream_frames` sends of a response."""

    async def frames(_: Asked, accepted: Accepted, news: Begun) -> AsyncIterator[bytes]:
        events = _Events(draft(accepted))
        try:
            async with contextlib.aclosing(news):
                yield events.opening()
                async for item in news:
                    if isinstance(item, str):
                        yield events.text(item)
                    else:
                        yield events.closing(item)
        except PromptFleetError as error:
            yield events.error(error)

    return frames


class _Events:
    """The events of one response, numbered."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._numbers = itertools.count()
        self._said: list[str] = []
        self._place = {"item_id": f"msg_{draft.id.hex}", "output_index": 0, "content_index": 0}

    def opening(self) -> bytes:
        response = response_json(self._draft, status="in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def text(self, text: str) -> bytes:
        opening = b"" if self._said else self._message_begins()
        self._said.append(text)
        return opening + self._event(
            "response.output_text.delta", **self._place, delta=text, logprobs=[]
        )

    def closing(self, result: Result) -> bytes:
        """The end of the message, the other items, and the whole response."""
        response = response_json(self._draft, status="failed", result=result)
        return b"".join(self._closing(response))

    def error(self, error: PromptFleetError) -> bytes:
        """The stream breaks off."""
        told = api_error(error)
        return self._event("error", code=told.error_code, message=told.message, param=told.param)

    def _closing(self, response: Json) -> Iterator[bytes]:
        for index, item in enumerate(response["output"]):
            if item["type"] == "message":
                yield from self._message_ends(item)
                continue
            begun = {**item, "arguments": "", "status": "in_progress"}
            place = {"item_id": item["id"], "output_index": index}
            arguments = item["arguments"] or ""
            yield self._event("response.output_item.added", output_index=index, item=begun)
            yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
            yield self._event(
                "response.function_call_arguments.done",
                **place,
                arguments=arguments,
                name=item["name"],
            )
            yield self._event("response.output_item.done", output_index=index, item=item)
        status = response["status"]
        kind = status if status in {"completed", "incomplete"} else "failed"
        yield self._event(f"response.{kind}", response=response)

    def _message_begins(self) -> bytes:
        item = message_item(self._draft.id, [], "in_progress")
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._place, part=text_part("")
        )

    def _message_ends(self, item: Json) -> Iterator[bytes]:
        if not self._said:
            yield self._message_begins()
        part = item["content"][0] if item["content"] else text_part("")
        if part["type"] == "output_text":
            yield self._event(
                "response.output_text.done", **self._place, text=part["text"], logprobs=[]
            )
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = next(self._numbers)
        return sse_event({"type": kind, "sequence_number": number, **fields}, event=kind)
