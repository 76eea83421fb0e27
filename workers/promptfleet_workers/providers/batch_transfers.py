"""What providers' batch APIs have in common: requests by URL, and lines of JSON piece by piece."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_workers.providers.http import (
    MAX_RESPONSE_BYTES,
    HttpClient,
    HttpResponse,
    Transfer,
)
from promptfleet_workers.providers.responses import (
    bad_response,
    read_answer,
    read_json,
)

ASK_S = 60.0
"""Seconds for a request whose body is small."""
UPLOAD_S = 1800.0
"""Seconds for one that carries a batch's lines, up to 256 MB."""
_NAME = re.compile(r"[\w.:-]{1,256}", re.ASCII)

Pieces = Callable[[], AsyncIterator[bytes]]


class BatchClient:
    """Small requests and large ones to one deployment."""

    def __init__(
        self, deployment: Deployment, client: HttpClient, headers: Mapping[str, str]
    ) -> None:
        """Prepare nothing but `headers`; `client` stays its owner's to close."""
        base, mark, query = deployment.base_url.partition("?")
        self._base = base.rstrip("/")
        self._query = f"{mark}{query}"
        self._client = client
        self._headers = dict(headers)
        self._timeouts = deployment.timeouts or TimeoutOptions()

    def url(self, path: str, query: str = "") -> str:
        """The URL of a path below the deployment's."""
        if not query:
            return f"{self._base}{path}{self._query}"
        return f"{self._base}{path}{self._query or '?'}{'&' if self._query else ''}{query}"

    async def ask(self, method: str, path: str, body: bytes | None = None, query: str = "") -> Any:
        """The decoded answer to a small request.

        Raises:
            ProviderError: It was refused, or nobody knows.
        """
        pieces = None if body is None else _one(body)
        size = 0 if body is None else len(body)
        return await self.send(
            method, self.url(path, query), pieces, size, "application/json", within_s=ASK_S
        )

    async def send(
        self,
        method: str,
        url: str,
        pieces: Pieces | None,
        size: int,
        content_type: str,
        *,
        within_s: float,
    ) -> Any:
        """The decoded answer to a request of any size; errors as for `ask`."""
        headers = {**self._headers, "content-type": content_type}
        transfer = Transfer(method=method, url=url, headers=headers, size=size, pieces=pieces)
        try:
            async with (
                asyncio.timeout(within_s),
                self._client.open(transfer, self._timeouts) as opened,
            ):
                response: HttpResponse = await opened.read()
        except TimeoutError:
            message = "the provider did not answer in time"
            raise ProviderError(message, code="timeout", unknown_outcome=True) from None
        return read_answer(response)

    async def lines(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a file of lines, as they come; what is none is left out.

        Raises:
            ProviderError: It can't be read, or not to its end.
        """
        transfer = Transfer(method="GET", url=self.url(path), headers=self._headers)
        async with self._client.open(transfer, self._timeouts) as opened:
            if not 200 <= opened.status < 300:  # noqa: PLR2004 - HTTP's numbers
                read_answer(await opened.read())
            async for line in split_lines(opened.pieces()):
                value = _object(line)
                if value is not None:
                    yield value


async def split_lines(
    pieces: AsyncIterator[bytes], longest: int = MAX_RESPONSE_BYTES
) -> AsyncIterator[bytes]:
    """The lines of a body, whichever way it is cut; one that is too long is refused."""
    rest = bytearray()
    async for piece in pieces:
        rest += piece
        if b"\n" in piece:
            *whole, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in whole:
                yield line
        if len(rest) > longest:
            raise bad_response(f"a line is longer than {longest} bytes")
    if rest:
        yield bytes(rest)


def checked_name(value: object) -> str:
    """A provider's name for something, safe to be put into a URL.

    Raises:
        ProviderError: `bad_response`.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise bad_response("the provider gave no name that can be used")
    return value


def _object(line: bytes) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        value = read_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _one(body: bytes) -> Pieces:
    async def pieces() -> AsyncIterator[bytes]:
        yield body

    return pieces


async def size_of(pieces: AsyncIterator[bytes]) -> int:
    """The bytes of a body that is never held."""
    size = 0
    async for piece in pieces:
        size += len(piece)
    return size
