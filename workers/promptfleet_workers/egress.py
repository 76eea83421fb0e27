"""Requests to URLs that strangers gave: guarded at every attempt, by address and not by name.

A name is resolved once an attempt, every address it has must be public, and the connection goes to
exactly those addresses, with the name for TLS and `Host`. So a name that leads elsewhere a moment
later (DNS rebinding) leads nowhere. No redirect is followed, no proxy of the environment used, no
cookie kept, and no connection used twice, since a kept one would have been checked long ago.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from promptfleet_shared import egress
from promptfleet_shared.errors import BlockedAddressError, PromptFleetError
from promptfleet_workers.providers.waits import retry_after_s

MAX_BODY_BYTES: Final = 16 * 1024
"""A longer answer is cut off: nobody reads it, and its status has been told."""
CONNECT_S: Final = 5.0
"""Seconds that one address may take to accept; then the next one is tried."""
RESOLVER_THREADS: Final = 64
"""Lookups at once. One that was given up holds its thread until the system gives it up, too."""

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host name, in the order in which to try them; OSError where it has none."""


class DeliveryError(PromptFleetError):
    """The request got no answer."""

    code = "delivery_failed"

    def __init__(self, code: str, message: str) -> None:
        """Say why.

        Args:
            code: "dns_error", "connect_error", "tls_error", "timeout" or "connection_lost".
            message: The same in words.
        """
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # per failure here, per class elsewhere


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What matters of an answer.

    Attributes:
        status: HTTP's.
        retry_after_s: Seconds that we are asked to wait, where we are, up to a week.
    """

    status: int
    retry_after_s: float | None = None


class GuardedClient:
    """Posts to URLs of strangers; made on the loop that uses it."""

    def __init__(
        self,
        *,
        allow_loopback: bool = False,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] = egress.is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            allow_loopback: Allow `localhost` and loopback addresses, even with http; for
                development.
            resolve: Looks names up; by default the system does.
            is_public: Judges addresses; another one is for tests.
            ssl_context: Whom to trust; by default whom the system trusts.
        """
        self._allow_loopback = allow_loopback
        self._lookup = _SystemLookup()  # starts its threads at the first use
        guard = _Guard(resolve or self._lookup, is_public, allow_loopback=allow_loopback)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # bounded by who calls
                resolver=guard,
                use_dns_cache=False,
                force_close=True,
                happy_eyeballs_delay=None,  # one after the other, in order
                socket_factory=guard.socket,
                ssl=ssl_context or True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
        )

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> Reply:
        """Post once; any status is an answer.

        Args:
            url: Judged again, as if it had never been.
            headers: Beside `Host`, `Content-Length` and `Accept-Encoding`, which are ours.
            body: What to send.
            timeout_s: Seconds for all of it: the lookup, the connection, the answer to its end.

        Raises:
            InvalidRequestError: The URL is not one that may be posted to.
            BlockedAddressError: Its host has an address that is not public.
            DeliveryError: There was no whole answer in time; see its `code`.
        """
        checked = egress.check_url(url, field="url", allow_loopback=self._allow_loopback)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._post(checked, headers, body)
        except aiohttp.ClientError as error:  # of which some are TimeoutErrors too
            raise _failure(error) from None
        except TimeoutError:
            raise DeliveryError("timeout", f"no whole answer within {timeout_s:g} s") from None
        except OSError as error:
            raise _failure(error) from None

    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()
        self._lookup.close()

    async def _post(
        self, checked: egress.CheckedUrl, headers: Mapping[str, str], body: bytes
    ) -> Reply:
        async with self._session.post(
            URL(checked.url, encoded=True),
            data=body,
            headers={**headers, "Accept-Encoding": "identity"},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        ) as response:
            await _drain(response)
            lower = {name.lower(): value for name, value in response.headers.items()}
            return Reply(status=response.status, retry_after_s=retry_after_s(lower, time.time()))


class _Guard(AbstractResolver):
    """Lets nobody connect to what is not public; aiohttp asks it for addresses and for sockets."""

    def __init__(
        self, resolve: Resolve, is_public: Callable[[str], bool], *, allow_loopback: bool
    ) -> None:
        self._resolve = resolve
        self._is_public = is_public
        self._allow_loopback = allow_loopback

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: int = socket.AF_UNSPEC,  # noqa: ARG002 - of both kinds, as aiohttp is told
    ) -> list[ResolveResult]:
        """The addresses of `host`, each of them allowed, or else none at all."""
        addresses = list(dict.fromkeys(await self._resolve(host, port)))
        is_allowed = self._is_public
        if self._allow_loopback and egress.names_loopback(host):
            is_allowed = egress.is_loopback
        if not all(is_allowed(address) for address in addresses):
            raise _blocked(host)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "the host has no address")
        return [_pinned(host, address, port) for address in addresses]

    def socket(self, info: Any) -> socket.socket:
        """A socket for a connection: where every connection passes, literal addresses too."""
        family, kind, protocol, _, (address, *_) = info
        if not (self._is_public(address) or (self._allow_loopback and egress.is_loopback(address))):
            raise BlockedAddressError(field="url")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Nothing to close."""


class _SystemLookup:
    """The system's resolver, on threads of its own.

    A name's owner decides how long a lookup takes, and the loop's own few threads also look up the
    providers' names.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, "promptfleet-lookup")

    async def __call__(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]

    def close(self) -> None:
        """Wait for no lookup."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _pinned(host: str, address: str, port: int) -> ResolveResult:
    return ResolveResult(
        hostname=host,
        host=address,
        port=port,
        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
        proto=socket.IPPROTO_TCP,
        flags=socket.AI_NUMERICHOST,
    )


def _blocked(host: str) -> BlockedAddressError:
    return BlockedAddressError(
        f"url: the host {host} has an address that is not public", field="url", host=host
    )


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Take the answer's body and drop it; cut off a long one."""
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            response.close()
            return


def _failure(error: Exception) -> DeliveryError:
    """What went wrong, without what the other side said."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return DeliveryError("dns_error", "the host's name leads nowhere")
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return DeliveryError("tls_error", "no trusted TLS connection to the host")
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return DeliveryError("connect_error", "no connection to the host")
        case _:
            name = type(error).__name__
            return DeliveryError("connection_lost", f"no whole answer, or none of HTTP ({name})")
