"""OpenAI's Batch API: a file of lines, a batch of it, and files of answers and errors.

Source: https://platform.openai.com/docs/api-reference/batch. A batch carries metadata of ours, by
which it is found again should nobody have seen the end of its making.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
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
from promptfleet_workers.providers.openai import completion_of
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.providers.responses import bad_response, failure, write_json

OWN_KEY = "promptfleet_batch"
"""The metadata that names our batch."""
ENDPOINTS = {
    JobKind.CHAT: "/v1/chat/completions",
    JobKind.COMPLETION: "/v1/completions",
    JobKind.EMBEDDING: "/v1/embeddings",
}
CLOCKS_APART_S = 3600.0
"""How far the provider's clock and ours may be from each other."""
_OVER = frozenset({"completed", "expired", "cancelled", "failed"})
_PAGE = 100
_FULL = frozenset({"token_limit_exceeded", "rate_limit_exceeded", "too_many_batches"})
_TIMEOUTS = TimeoutOptions()
_Json = dict[str, Any]


class OpenAIBatches:
    """The batch API of a deployment that speaks OpenAI's protocol."""

    max_lines = 50_000
    max_bytes = 200_000_000
    kinds = frozenset(ENDPOINTS)

    def __init__(self, deployment: Deployment, client: HttpClient) -> None:
        """Prepare the headers of `deployment`; `client` stays its owner's to close."""
        headers = {key.lower(): value for key, value in deployment.headers.items()}
        secret = (deployment.secret() or "").strip()
        if secret:
            headers.setdefault("authorization", f"Bearer {secret}")
        self._client = BatchClient(deployment, client, headers)

    def written(self, line: Line, kind: JobKind, model: str) -> bytes:
        """The line as it stands in the file."""
        name = orjson.dumps(model).decode()
        return (
            f'{{"custom_id":"{line.custom_id}","method":"POST","url":"{ENDPOINTS[kind]}",'
            f'"body":{{"model":{name},{line.request[1:]}}}\n'
        ).encode()

    async def upload(self, order: Order) -> str:
        """Upload the file; errors as in `BatchApi`, here and below."""
        boundary = f"promptfleet-{order.batch_id.hex}"

        async def form() -> AsyncIterator[bytes]:
            yield (
                f"--{boundary}\r\n"
                'content-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
                f"--{boundary}\r\n"
                'content-disposition: form-data; name="file"; '
                f'filename="promptfleet-{order.batch_id}.jsonl"\r\n'
                "content-type: application/jsonl\r\n\r\n"
            ).encode()
            async for lines in order.lines():
                yield b"".join([self.written(line, order.kind, order.model) for line in lines])
            yield f"\r\n--{boundary}--\r\n".encode()

        data = await self._client.send(
            "POST",
            self._client.url("/files"),
            form,
            await size_of(form()),
            f"multipart/form-data; boundary={boundary}",
            within_s=UPLOAD_S,
        )
        return checked_name(data.get("id"))

    async def create(self, order: Order) -> str:
        """Have the batch made of the file."""
        body = {
            "input_file_id": order.file_id,
            "endpoint": ENDPOINTS[order.kind],
            "completion_window": "24h",
            "metadata": {OWN_KEY: str(order.batch_id)},
        }
        data = await self._client.ask("POST", "/batches", write_json(body))
        return checked_name(data.get("id"))

    async def find(self, search: Search) -> Sighting:
        """By our metadata, or by its file, which no other batch has."""
        oldest = search.since - CLOCKS_APART_S
        after = ""
        while True:
            query = f"limit={_PAGE}" + (f"&after={after}" if after else "")
            page = await self._client.ask("GET", "/batches", query=query)
            items = page.get("data")
            if not isinstance(items, list):
                raise bad_response("the provider's list of batches is none")
            for item in items:
                if _is_ours(item, search):
                    return Sighting(provider_id=checked_name(item.get("id")))
            if not items or not page.get("has_more") or _instant(items[-1]) < oldest:
                return Sighting()
            after = checked_name(items[-1].get("id"))

    async def look(self, provider_id: str) -> BatchView:
        """The batch's status, and its files once there are."""
        data = await self._client.ask("GET", f"/batches/{provider_id}")
        status = data.get("status")
        is_over = status in _OVER
        files = [data.get("output_file_id"), data.get("error_file_id")] if is_over else []
        return BatchView(
            provider_id=provider_id,
            is_over=is_over,
            sources=tuple(checked_name(name) for name in files if name),
            failure=_refusal(data) if status == "failed" else None,
        )

    async def answers(self, view: BatchView, kind: JobKind) -> AsyncIterator[LineAnswer]:
        """The lines of the output file, then those of the error file."""
        for source in view.sources:
            async for item in self._client.lines(f"/files/{source}/content"):
                custom_id = item.get("custom_id")
                if isinstance(custom_id, str):
                    yield LineAnswer(custom_id=custom_id, answer=_answer(item, kind))

    async def cancel(self, provider_id: str) -> None:
        """Ask for the batch's cancellation."""
        await self._client.ask("POST", f"/batches/{provider_id}/cancel", b"{}")


def _is_ours(item: Any, search: Search) -> bool:
    if not isinstance(item, dict):
        return False
    metadata = item.get("metadata")
    if isinstance(metadata, dict) and metadata.get(OWN_KEY) == str(search.batch_id):
        return True
    return search.file_id is not None and item.get("input_file_id") == search.file_id


def _instant(item: Any) -> float:
    at = item.get("created_at") if isinstance(item, dict) else None
    return float(at) if isinstance(at, int | float) else float("inf")


def _refusal(data: _Json) -> ProviderError:
    """Why a batch failed; one that the account has no room for now may be asked for later."""
    errors = data.get("errors")
    listed = errors.get("data") if isinstance(errors, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else {}
    code = first.get("code") if isinstance(first, dict) else None
    if code in _FULL:
        message = "the account has no room for another batch"
        return ProviderError(message, code="rate_limit_exceeded", status=429)
    return ProviderError("the provider refused the batch as a whole", code="batch_failed")


def _answer(item: _Json, kind: JobKind) -> Answer:
    """What a line of one of the files says."""
    response = item.get("response")
    if not isinstance(response, dict):
        error = item.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if code in {"batch_expired", "batch_cancelled"}:
            return ProviderError("the provider did not come to this line", code=str(code))
        return failure({"error": error or {}}, 500)
    status, body = response.get("status_code"), response.get("body")
    is_success = isinstance(status, int) and 200 <= status < 300  # noqa: PLR2004 - HTTP's numbers
    if not is_success or not isinstance(body, dict) or body.get("error"):
        return failure(body, status if isinstance(status, int) else 500)
    call = Call(kind=kind, model="", requests=[""], input_tokens=[0], timeouts=_TIMEOUTS)
    try:
        return completion_of(call, body, write_json(body))
    except ProviderError as error:
        return error
