"""The HTTP client of every provider: httpx's types on the httpx-aiohttp transport.

Going through `httpx.AsyncClient` merges URL, headers, cookies and auth for each request, which
costs more than sending it; a request built here and given to the transport costs about half. The
choice of the client is this module's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport
from multidict import CIMultiDict

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import TimeoutOptions
from promptfleet_workers.alarms import Alarms, this_task
from promptfleet_workers.providers.inflating import Inflater

MAX_RESPONSE_BYTES = 32 * 1024 * 1024
"""A longer response is refused while it comes, so that no provider can fill our memory."""
MAX_STREAM_BYTES = 512 * 1024 * 1024
"""The same for an event stream, which is some hundred bytes a token and is not kept."""
LINGER_S = 0.25
"""How long a stream may stay open after its last event; a connection that ends is used again."""

Take: TypeAlias = Callable[[bytes], bool]
"""Takes the next piece of an event stream; true once it was the last that matters."""


class HttpResponse(NamedTuple):
    """A whole response."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """A request that is too large, or whose response is, to be held at once.

    Attributes:
        pieces: Gives the body, `size` bytes of it, anew each time; None for none.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    size: int = 0
    pieces: Callable[[], AsyncIterator[bytes]] | None = None


class OpenResponse:
    """A response whose body is still to come."""

    def __init__(self, response: httpx.Response, idle_s: float) -> None:
        """Read nothing yet; a piece may be `idle_s` seconds away."""
        self._response = response
        self._idle_s = idle_s
        self.status = response.status_code

    async def pieces(self) -> AsyncIterator[bytes]:
        """The decoded body, a piece at a time.

        Raises:
            ProviderError: It stalls, breaks off or can't be decoded.
        """
        inflater = _inflater(_encoding(self._response))
        stream = aiter(cast("httpx.AsyncByteStream", self._response.stream))
        while True:
            try:
                async with asyncio.timeout(self._idle_s):
                    piece = await anext(stream, None)
            except TimeoutError:
                raise _late() from None
            except (httpx.TransportError, aiohttp.ClientError, OSError) as error:
                raise _connection_failure(error) from None
            if piece is None:
                break
            for plain in (piece,) if inflater is None else inflater.feed(piece):
                yield plain
        if inflater is not None and not inflater.is_whole:
            message = "the compressed response ends too early"
            raise ProviderError(message, code="connection_lost", unknown_outcome=True)

    async def read(self) -> HttpResponse:
        """The whole of it, which must not be long."""
        pieces = []
        size = 0
        async for piece in self.pieces():
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RESPONSE_BYTES:
                raise _too_large()
        return HttpResponse(self.status, self._response.headers, b"".join(pieces))


class _Post(httpx.Request):
    """A POST whose parts are ready, so that httpx need not put them together again."""

    def __init__(
        self, url: httpx.URL, headers: httpx.Headers, body: bytes, extensions: dict[str, Any]
    ) -> None:
        self.method = "POST"
        self.url = url
        self.headers = headers
        self.extensions = extensions
        self._body = body

    @property
    def content(self) -> bytes:
        """The body."""
        return self._body


class Endpoint:
    """A URL with its prepared headers; what is the same for every request is done once."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """Prepare `url` and `headers`."""
        self._url = httpx.URL(url)
        # aiohttp takes its own kind of headers as they are and converts any other, item by item.
        # What encodings it asks for by itself depends on what is installed: some we can't read.
        ours = {"content-type": "application/json", "accept-encoding": "gzip, deflate"}
        self._headers = cast("httpx.Headers", CIMultiDict({**ours, **_lower(headers)}))

    def request(self, body: bytes, extensions: dict[str, Any]) -> httpx.Request:
        """A POST of `body`."""
        return _Post(self._url, self._headers, body, extensions)


class HttpClient:
    """One pool of connections for all the calls of a worker; made on the loop that uses it."""

    def __init__(self) -> None:
        """Open nothing yet; connections come with the first requests."""
        session = aiohttp.ClientSession(
            # Calls are bounded by the batcher; a second, hidden bound would only make them wait.
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._transport = AiohttpTransport(client=session)
        self._alarms = Alarms()

    async def post(
        self,
        endpoint: Endpoint,
        body: bytes,
        timeouts: TimeoutOptions,
        take: Take | None = None,
        on_headers: Callable[[Mapping[str, str]], None] | None = None,
    ) -> HttpResponse:
        """Send `body` and read the whole response; the total time is the caller's to bound.

        Args:
            endpoint: Where to.
            body: What to send.
            timeouts: Of these, the connection's, the first byte's and the idle one.
            take: Given the pieces of an event stream as they come, decoded; such a response has
                no body afterwards. Whatever is no event stream is read whole.
            on_headers: Hears the response's headers before its body comes.

        Raises:
            ProviderError: Nothing or not everything came back: `connect_error` (nothing was sent),
                `timeout`, `connection_lost` or `response_too_large` (the outcome is unknown). Also
                whatever `take` raises.
        """
        extensions = {"timeout": {"connect": timeouts.connect_timeout_ms / 1000}}
        loop = self._alarms.loop
        task = this_task(loop)
        self._alarms.set(task, loop.time() + timeouts.first_byte_timeout_ms / 1000)
        try:
            request = endpoint.request(body, extensions)
            response = await self._transport.handle_async_request(request)
            if on_headers is not None:
                on_headers(response.headers)
            idle_s = timeouts.idle_timeout_ms / 1000
            if take is not None and _is_event_stream(response):
                await self._pass_on(task, response, idle_s, take)
                return HttpResponse(response.status_code, response.headers, b"")
            received = await self._read(task, response, idle_s)
            return HttpResponse(response.status_code, response.headers, received)
        except asyncio.CancelledError:
            if not self._alarms.went_off(task):
                raise
            raise _late() from None
        except (httpx.TransportError, aiohttp.ClientError, OSError) as error:
            raise _connection_failure(error) from None
        finally:
            self._alarms.clear(task)

    @contextlib.asynccontextmanager
    async def open(
        self, transfer: Transfer, timeouts: TimeoutOptions
    ) -> AsyncIterator[OpenResponse]:
        """Send a request piece by piece, and give its response before its body; for large ones.

        The time until the response begins is the caller's to bound; the connection's and each
        piece's are bounded by `timeouts`.

        Raises:
            ProviderError: As for `post`.
        """
        given = {"accept-encoding": "gzip, deflate", **_lower(transfer.headers)}
        if transfer.pieces is not None:
            given["content-length"] = str(transfer.size)
        request = httpx.Request(
            transfer.method,
            transfer.url,
            headers=given,
            content=None if transfer.pieces is None else transfer.pieces(),
            extensions={"timeout": {"connect": timeouts.connect_timeout_ms / 1000}},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx.TransportError, aiohttp.ClientError, OSError) as error:
            raise _connection_failure(error) from None
        try:
            yield OpenResponse(response, timeouts.idle_timeout_ms / 1000)
        finally:
            await cast("httpx.AsyncByteStream", response.stream).aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()

    async def _read(
        self, task: asyncio.Task[Any], response: httpx.Response, idle_s: float
    ) -> bytes:
        """The decoded body, refused once it is too long, given up once it stalls."""
        stream = cast("httpx.AsyncByteStream", response.stream)
        pieces = []
        size = 0
        clock = self._alarms.loop.time
        self._alarms.set(task, clock() + idle_s)
        try:
            async for piece in stream:
                self._alarms.set(task, clock() + idle_s)
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RESPONSE_BYTES:
                    raise _too_large()
        finally:
            await stream.aclose()
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        encoding = _encoding(response)
        return body if encoding == "identity" else _decompressed(body, encoding)

    async def _pass_on(
        self, task: asyncio.Task[Any], response: httpx.Response, idle_s: float, take: Take
    ) -> None:
        """Give each piece to `take`, until the stream ends or lingers after its last event."""
        inflater = _inflater(_encoding(response))
        stream = cast("httpx.AsyncByteStream", response.stream)
        size = 0
        is_over = False
        clock = self._alarms.loop.time
        self._alarms.set(task, clock() + idle_s)
        try:
            async for piece in stream:
                if is_over:
                    continue  # what comes after the last event matters to nobody
                self._alarms.set(task, clock() + idle_s)
                for plain in (piece,) if inflater is None else inflater.feed(piece):
                    size += len(plain)
                    if size > MAX_STREAM_BYTES:
                        raise _too_large(MAX_STREAM_BYTES)
                    is_over = is_over or take(plain)
                if is_over:
                    self._alarms.set(task, clock() + LINGER_S)
        except asyncio.CancelledError:
            if not is_over or not self._alarms.went_off(task):
                raise
        except (httpx.TransportError, aiohttp.ClientError, OSError):
            if not is_over:
                raise
        finally:
            await stream.aclose()


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers by lower-case names, so that those of a configuration replace ours."""
    return {name.lower(): value for name, value in headers.items()}


def _encoding(response: httpx.Response) -> str:
    """The response's content encoding; httpx would decode every header to find it."""
    for name, value in response.headers.raw:
        if name.lower() == b"content-encoding":
            return value.decode("latin-1").strip().lower()
    return "identity"


def _is_event_stream(response: httpx.Response) -> bool:
    """True for a success that may be one; not every server names the type rightly."""
    if not 200 <= response.status_code < 300:  # noqa: PLR2004 - HTTP's numbers
        return False
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind not in {"application/json", "text/html"}


def _inflater(encoding: str) -> Inflater | None:
    """What undoes the encoding; None where there is none."""
    if encoding == "identity":
        return None
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        message = "the response is encoded in a way that was not asked for"
        raise ProviderError(message, code="bad_response", unknown_outcome=True)
    return Inflater(is_deflate=encoding == "deflate")


def _decompressed(body: bytes, encoding: str) -> bytes:
    """The body of a compressed response: no longer than the cap, however small it came."""
    inflater = _inflater(encoding)
    if inflater is None:
        return body
    pieces = []
    size = 0
    for piece in inflater.feed(body):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_RESPONSE_BYTES:
            raise _too_large()
    if not inflater.is_whole:
        message = "the compressed response ends too early"
        raise ProviderError(message, code="connection_lost", unknown_outcome=True)
    return b"".join(pieces)


def _late() -> ProviderError:
    message = "the provider did not answer in time"
    return ProviderError(message, code="timeout", unknown_outcome=True)


def _too_large(limit: int | None = None) -> ProviderError:
    message = f"the response is longer than {limit or MAX_RESPONSE_BYTES} bytes"
    return ProviderError(message, code="response_too_large", unknown_outcome=True)


def _connection_failure(error: Exception) -> ProviderError:
    """Tell apart what can't have cost anything from what may have.

    The transport maps a connection that the server closed in mid-call to a connect error too, so
    only aiohttp's own exception, which it keeps as the cause, says whether anything was sent.
    """
    cause = error.__cause__ or error
    if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        message = f"no connection to the provider ({type(cause).__name__})"
        return ProviderError(message, code="connect_error")
    message = f"the connection broke in mid-call ({type(cause).__name__})"
    return ProviderError(message, code="connection_lost", unknown_outcome=True)
