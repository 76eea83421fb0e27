"""Anthropic's Message Batches API: the requests in one body, and one file of results.

Source: https://docs.anthropic.com/en/api/creating-message-batches. A batch carries nothing of ours
but its lines' custom ids, and those show only once it has ended: until then, a batch of the right
size in the list may be ours or not.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import orjson

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.anthropic import API_VERSION, completion_of, translate
from promptfleet_workers.providers.batch_protocol import (
    BatchView,
    Line,
    LineAnswer,
    Order,
    Search,
    Sighting,
)
from promptfleet_workers.providers.batch_transfers import (
    UPLOAD_S,
    BatchClient,
    checked_name,
    size_of,
)
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.providers.responses import (
    bad_response,
    failure,
    read_json,
    write_json,
)

CLOCKS_APART_S = 3600.0
"""How far the provider's clock and ours may be from each other."""
_PAGE = 100
_COUNTS = ("processing", "succeeded", "errored", "canceled", "expired")
_NOT_DONE = {"expired": "batch_expired", "canceled": "batch_cancelled"}
_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "overloaded_error": 529,
}
_TIMEOUTS = TimeoutOptions()
_Json = dict[str, Any]


class AnthropicBatches:
    """The batch API of a deployment that speaks Anthropic's protocol."""

    max_lines = 100_000
    max_bytes = 256_000_000
    kinds = frozenset({JobKind.CHAT})

    def __init__(self, deployment: Deployment, client: HttpClient) -> None:
        """Prepare the headers of `deployment`; `client` stays its owner's to close."""
        headers = {"anthropic-version": API_VERSION}
        headers |= {key.lower(): value for key, value in deployment.headers.items()}
        secret = (deployment.secret() or "").strip()
        if secret:
            headers.setdefault("x-api-key", secret)
        self._client = BatchClient(deployment, client, headers)

    def written(self, line: Line, kind: JobKind, model: str) -> bytes:  # noqa: ARG002 - chats only
        """The line as it stands in the body's list; errors as in `BatchApi`, here and below."""
        params = {"model": model, **translate(read_json(line.request.encode()))}
        return f'{{"custom_id":"{line.custom_id}","params":'.encode() + write_json(params) + b"}"

    async def upload(self, order: Order) -> None:
        """Nothing is left there before: the lines go with the batch."""

    async def create(self, order: Order) -> str:
        """Have the batch made."""

        async def body() -> AsyncIterator[bytes]:
            mark = b'{"requests":['
            async for lines in order.lines():
                written = [self.written(line, order.kind, order.model) for line in lines]
                yield mark + b",".join(written)
                mark = b","
            yield b"]}"

        data = await self._client.send(
            "POST",
            self._client.url("/messages/batches"),
            body,
            await size_of(body()),
            "application/json",
            within_s=UPLOAD_S,
        )
        return checked_name(data.get("id"))

    async def find(self, search: Search) -> Sighting:
        """By the custom ids of what has ended, among those of its time and size."""
        oldest = search.since - CLOCKS_APART_S
        undecided = False
        after = ""
        while True:
            query = f"limit={_PAGE}" + (f"&after_id={after}" if after else "")
            page = await self._client.ask("GET", "/messages/batches", query=query)
            items = page.get("data")
            if not isinstance(items, list):
                raise bad_response("the provider's list of batches is none")
            alike = {
                checked_name(item.get("id")): item
                for item in items
                if isinstance(item, dict) and _size(item) == search.count
            }
            known = await search.known(alike.keys()) if alike else set()
            for name, item in alike.items():
                if name in known or _instant(item) < oldest:
                    continue
                owner = await self._owner(name, item, search)
                if owner:
                    return Sighting(provider_id=name)
                undecided = undecided or owner is None
            if not items or not page.get("has_more") or _instant(items[-1]) < oldest:
                return Sighting(undecided=undecided)
            after = checked_name(items[-1].get("id"))

    async def _owner(self, name: str, item: _Json, search: Search) -> bool | None:
        """Whether it is what is looked for; None if that can't be told (yet)."""
        if item.get("processing_status") != "ended" or item.get("archived_at"):
            return None
        async for line in self._client.lines(f"/messages/batches/{name}/results"):
            custom_id = line.get("custom_id")
            if isinstance(custom_id, str):
                return await search.owns(custom_id)
        return None

    async def look(self, provider_id: str) -> BatchView:
        """The batch's status."""
        data = await self._client.ask("GET", f"/messages/batches/{provider_id}")
        is_over = data.get("processing_status") == "ended"
        # Not `results_url`: our key goes nowhere but to the deployment's own address.
        sources = (f"/messages/batches/{provider_id}/results",) if is_over else ()
        return BatchView(provider_id=provider_id, is_over=is_over, sources=sources)

    async def answers(self, view: BatchView, kind: JobKind) -> AsyncIterator[LineAnswer]:
        """The lines of its results."""
        for source in view.sources:
            async for item in self._client.lines(source):
                custom_id = item.get("custom_id")
                if isinstance(custom_id, str):
                    yield LineAnswer(custom_id=custom_id, answer=_answer(item, kind))

    async def cancel(self, provider_id: str) -> None:
        """Ask for the batch's cancellation."""
        await self._client.ask("POST", f"/messages/batches/{provider_id}/cancel", b"{}")


def _size(item: _Json) -> int:
    counts = item.get("request_counts")
    if not isinstance(counts, dict):
        return -1
    return sum(n for name in _COUNTS if isinstance(n := counts.get(name), int))


def _instant(item: Any) -> float:
    at = item.get("created_at") if isinstance(item, dict) else None
    try:
        return dt.datetime.fromisoformat(at).timestamp() if isinstance(at, str) else float("inf")
    except ValueError:
        return float("inf")


def _answer(item: _Json, kind: JobKind) -> Answer:
    """What a line of the results says."""
    result = item.get("result")
    if not isinstance(result, dict):
        return bad_response("a line of the results has none")
    what = result.get("type")
    if isinstance(what, str) and what in _NOT_DONE:
        return ProviderError("the provider did not come to this line", code=_NOT_DONE[what])
    message = result.get("message")
    if what != "succeeded" or not isinstance(message, dict):
        return _failure(result.get("error"))
    call = Call(kind=kind, model="", requests=[""], input_tokens=[0], timeouts=_TIMEOUTS)
    try:
        return completion_of(call, message, orjson.dumps(message))
    except ProviderError as error:
        return error


def _failure(error: Any) -> ProviderError:
    """An errored line's; its status is not told, but its type has one."""
    inner = error.get("error") if isinstance(error, dict) else None
    kind = inner.get("type") if isinstance(inner, dict) else None
    return failure(error, _STATUS.get(str(kind), 500))
