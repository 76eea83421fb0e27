"""The guarded client against a real TLS server, and against names that lead where they must not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import email.utils
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import trustme

import promptfleet_workers.egress
from promptfleet_shared import egress
from promptfleet_shared.errors import BlockedAddressError, InvalidRequestError
from promptfleet_workers.egress import DeliveryError, GuardedClient, Reply, Resolve

NAME = "hooks.example.com"
PATIENCE_S = 10.0
OK = b"HTTP/1.1 204 No Content\r\n\r\n"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Trusts the tests' own authority alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@dataclasses.dataclass(kw_only=True)
class Server:
    """What a server of the tests saw.

    Attributes:
        names: Whom the clients' TLS asked for.
        requests: Heads and bodies.
    """

    port: int = 0
    connections: int = 0
    names: list[str | None] = dataclasses.field(default_factory=list)
    requests: list[tuple[str, bytes]] = dataclasses.field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.port}/hook?x=1"

    async def take(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(
            int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-le")
        )
        self.requests.append((head, await reader.readexactly(length)))


@contextlib.asynccontextmanager
async def serving(
    handler: Handler | bytes, certificate: trustme.LeafCert | None
) -> AsyncIterator[Server]:
    """A server on 127.0.0.1 that takes a request and then answers, or lets `handler` do it."""
    seen = Server()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await seen.take(reader)
            if isinstance(handler, bytes):
                writer.write(handler)
                await writer.drain()
            else:
                await handler(reader, writer)
        writer.close()

    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        context.sni_callback = lambda _socket, name, _context: seen.names.append(name)
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    async with server:
        seen.port = server.sockets[0].getsockname()[1]
        yield seen


@pytest.fixture
def serve(
    authority: trustme.CA,
) -> Callable[[Handler | bytes], contextlib.AbstractAsyncContextManager[Server]]:
    return lambda handler: serving(handler, authority.issue_cert(NAME))


Serve = Callable[[Handler | bytes], contextlib.AbstractAsyncContextManager[Server]]


def answers(*each: Sequence[str]) -> Resolve:
    """A resolver that gives these addresses, call after call; the last ones ever after."""
    left = list(each)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


def public_here(address: str) -> bool:
    """Takes the address of the tests' server for a public one."""
    return address == "127.0.0.1" or egress.is_public(address)


@contextlib.asynccontextmanager
async def guarded(trusting: ssl.SSLContext, **options: Any) -> AsyncIterator[GuardedClient]:
    """A client for which the name of the tests' server is a public one."""
    given = {"resolve": answers(["127.0.0.1"]), "is_public": public_here} | options
    client = GuardedClient(ssl_context=trusting, **given)
    try:
        async with asyncio.timeout(60):
            yield client
    finally:
        await client.aclose()


async def post(client: GuardedClient, url: str, timeout_s: float = PATIENCE_S) -> Reply:
    headers = {"Content-Type": "application/json", "webhook-id": "evt_1"}
    return await client.post(url, headers, b'{"a":1}', timeout_s)


async def failure(client: GuardedClient, url: str, timeout_s: float = PATIENCE_S) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        await post(client, url, timeout_s)
    return caught.value


async def test_pinned_to_an_address_the_name_stays_in_tls_and_host(
    serve: Serve, trusting: ssl.SSLContext
) -> None:
    async with serve(OK) as server, guarded(trusting) as client:
        assert await post(client, server.url) == Reply(status=204)

    ((head, body),) = server.requests
    assert server.names == [NAME]
    assert head.startswith("post /hook?x=1 http/1.1\r\n")
    assert f"\r\nhost: {NAME}:{server.port}\r\n" in head
    assert "\r\ncontent-type: application/json\r\n" in head
    assert "\r\nwebhook-id: evt_1\r\n" in head
    assert "\r\naccept-encoding: identity\r\n" in head
    assert "\r\nconnection: close\r\n" in head
    assert body == b'{"a":1}'


async def test_a_certificate_for_another_name_is_refused(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    for other in ("other.example.com", "127.0.0.1"):
        async with (
            serving(OK, authority.issue_cert(other)) as server,
            guarded(trusting) as client,
        ):
            assert (await failure(client, server.url)).code == "tls_error"
        assert server.requests == []


async def test_a_server_that_never_shakes_hands_is_given_up_early(
    trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that there is time for the next of a name's addresses."""
    monkeypatch.setattr(promptfleet_workers.egress, "CONNECT_S", 0.1)
    silent = socket.create_server(("127.0.0.1", 0))
    async with guarded(trusting) as client:
        error = await failure(client, f"https://{NAME}:{silent.getsockname()[1]}/")
    silent.close()
    assert error.code == "connect_error"


async def test_an_unknown_authority_is_refused(serve: Serve) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trustme.CA().configure_trust(stranger)
    async with serve(OK) as server, guarded(stranger) as client:
        assert (await failure(client, server.url)).code == "tls_error"
    assert server.requests == []


async def test_a_server_without_tls_is_refused(trusting: ssl.SSLContext) -> None:
    greeted = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        with contextlib.suppress(ConnectionError):
            greeted.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server, guarded(trusting) as client:
        port = server.sockets[0].getsockname()[1]
        assert (await failure(client, f"https://{NAME}:{port}/")).code == "tls_error"
    assert not any(b"POST" in received for received in greeted)


@pytest.mark.parametrize("later", ["10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"])
async def test_a_name_that_leads_inside_at_the_next_attempt_is_blocked(
    serve: Serve, trusting: ssl.SSLContext, later: str
) -> None:
    resolve = answers(["127.0.0.1"], [later])
    async with serve(OK) as server, guarded(trusting, resolve=resolve) as client:
        assert (await post(client, server.url)).status == 204
        for _ in range(2):
            with pytest.raises(BlockedAddressError) as caught:
                await post(client, server.url)
            assert NAME in caught.value.message
            assert later not in f"{caught.value.message} {caught.value.facts}"
    assert server.connections == 1


async def test_a_name_of_ours_is_blocked_before_anything_is_sent(
    serve: Serve, trusting: ssl.SSLContext
) -> None:
    async with serve(OK) as server, guarded(trusting, is_public=egress.is_public) as client:
        with pytest.raises(BlockedAddressError):
            await post(client, server.url)
    assert server.connections == 0


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_one_address_that_is_not_public_blocks_the_name(
    serve: Serve, trusting: ssl.SSLContext, place: int
) -> None:
    addresses = ["127.0.0.1", "127.0.0.1"]
    addresses.insert(place, "192.168.0.1")
    resolve = answers(addresses)
    async with serve(OK) as server, guarded(trusting, resolve=resolve) as client:
        with pytest.raises(BlockedAddressError):
            await post(client, server.url)
    assert server.connections == 0


async def test_every_attempt_asks_anew_and_connects_anew(
    serve: Serve, trusting: ssl.SSLContext
) -> None:
    asked = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"]

    kept = b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n"
    async with serve(kept) as server, guarded(trusting, resolve=resolve) as client:
        for _ in range(3):
            await post(client, server.url)
    assert asked == [(NAME, server.port)] * 3
    assert server.connections == 3


async def test_literal_addresses_pass_the_guard_too(trusting: ssl.SSLContext) -> None:
    """aiohttp resolves no literal address, so the guard has to look at the sockets as well."""
    async with guarded(trusting, is_public=lambda _: False) as client:
        with pytest.raises(BlockedAddressError):
            await post(client, "https://8.8.8.8/")
        for url in ("https://127.0.0.1/", "https://[::1]/", "https://localhost/"):
            with pytest.raises(BlockedAddressError):
                await post(client, url)


async def test_a_url_is_judged_again_before_it_is_used(trusting: ssl.SSLContext) -> None:
    async with guarded(trusting) as client:
        for url in ("http://hooks.example.com/", "https://a@hooks.example.com/", "https://0x7f.1/"):
            with pytest.raises(InvalidRequestError):
                await post(client, url)


async def test_addresses_are_tried_in_order(serve: Serve, trusting: ssl.SSLContext) -> None:
    tried = []

    def judge(address: str) -> bool:
        tried.append(address)
        return True

    # Nobody listens on ::1, or there is no IPv6 at all.
    options = {"resolve": answers(["::1", "127.0.0.1", "127.0.0.1"]), "is_public": judge}
    async with serve(OK) as server, guarded(trusting, **options) as client:
        assert (await post(client, server.url)).status == 204
    assert tried == ["::1", "127.0.0.1", "::1", "127.0.0.1"]  # when resolved, when connected


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(
    serve: Serve, trusting: ssl.SSLContext, status: int
) -> None:
    answer = b"HTTP/1.1 %d Moved\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n" % status
    async with serve(answer) as server, guarded(trusting) as client:
        assert (await post(client, server.url)).status == status
    assert server.connections == 1


async def test_proxies_of_the_environment_are_not_used(
    serve: Serve, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(OK, None) as proxy, serve(OK) as server, guarded(trusting) as client:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for variable in (name, name.lower()):
                monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert (await post(client, server.url)).status == 204
    assert (proxy.connections, server.connections) == (0, 1)


async def test_cookies_are_not_kept(serve: Serve, trusting: ssl.SSLContext) -> None:
    answer = b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n"
    async with serve(answer) as server, guarded(trusting) as client:
        for _ in range(2):
            await post(client, server.url)
    assert not any("cookie" in head for head, _ in server.requests)


def with_retry_after(value: str) -> bytes:
    sent = email.utils.format_datetime(dt.datetime(2030, 1, 1, tzinfo=dt.UTC), usegmt=True)
    return (
        f"HTTP/1.1 503 Busy\r\nretry-after: {value}\r\ndate: {sent}\r\ncontent-length: 0\r\n\r\n"
    ).encode()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        ("Tue, 01 Jan 2030 00:01:00 GMT", 60.0),
        ("Mon, 31 Dec 2029 23:00:00 GMT", 0.0),
        ("99999999", 7 * 86_400.0),
        ("soon", None),
        ("-1", None),
    ],
)
async def test_retry_after(
    serve: Serve, trusting: ssl.SSLContext, value: str, seconds: float | None
) -> None:
    async with serve(with_retry_after(value)) as server, guarded(trusting) as client:
        assert await post(client, server.url) == Reply(status=503, retry_after_s=seconds)


@pytest.mark.parametrize(
    "beginning",
    [b"", b"HTTP/1.1 200 OK\r\nx-", b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n"],
    ids=["nothing", "in the head", "in the body"],
)
async def test_an_answer_that_drips_is_cut_by_the_time_limit(
    serve: Serve, trusting: ssl.SSLContext, beginning: bytes
) -> None:
    gone = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(beginning)
            while beginning:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)  # the behaviour under test is one in time
            await reader.read()
        finally:
            gone.set()

    async with serve(drip) as server, guarded(trusting) as client:
        error = await failure(client, server.url, timeout_s=0.4)
        await gone.wait()
    assert error.code == "timeout"


async def test_a_lookup_that_hangs_is_cut_by_the_time_limit(trusting: ssl.SSLContext) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async with guarded(trusting, resolve=resolve) as client:
        error = await failure(client, f"https://{NAME}/", timeout_s=0.05)
    assert error.code == "timeout"


@pytest.mark.parametrize("ending", [b"", b"transfer-encoding: chunked\r\n"])
async def test_an_endless_body_is_cut_off_and_its_status_counts(
    serve: Serve, trusting: ssl.SSLContext, ending: bytes
) -> None:
    written = 0
    gone = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\n" + ending + b"\r\n")
        try:
            while True:
                writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                await writer.drain()
                written += 0x4000
        finally:
            gone.set()

    async with serve(endless) as server, guarded(trusting) as client:
        assert await post(client, server.url) == Reply(status=200)
        await gone.wait()
    assert written < 64 * 1024 * 1024  # what sockets and TLS hold, and no more


async def test_endless_headers_are_refused(serve: Serve, trusting: ssl.SSLContext) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x-more: and more\r\n" * 1000)
            await writer.drain()

    async with serve(endless) as server, guarded(trusting) as client:
        assert (await failure(client, server.url)).code == "connection_lost"


async def test_a_compressed_body_is_not_unpacked(serve: Serve, trusting: ssl.SSLContext) -> None:
    body = b"no gzip at all"
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with serve(head + body) as server, guarded(trusting) as client:
        assert await post(client, server.url) == Reply(status=200)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-le", id="half a head"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx", id="half a body"),
        pytest.param(b"220 mail.example ESMTP the secret\r\n", id="another protocol"),
    ],
)
async def test_half_an_answer_is_none(
    serve: Serve, trusting: ssl.SSLContext, answer: bytes
) -> None:
    async with serve(answer) as server, guarded(trusting) as client:
        error = await failure(client, server.url)
    assert error.code == "connection_lost"
    assert "secret" not in error.message


async def test_a_closed_port_and_a_name_without_addresses(
    serve: Serve, trusting: ssl.SSLContext
) -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with serve(OK) as server:
        pass  # now nobody listens there
    async with guarded(trusting) as client:
        assert (await failure(client, server.url)).code == "connect_error"
    for resolve in (unknown, answers([])):
        async with guarded(trusting, resolve=resolve) as client:
            assert (await failure(client, server.url)).code == "dns_error"


async def test_a_cancelled_post_closes_its_connection(
    serve: Serve, trusting: ssl.SSLContext
) -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await reader.read()
        gone.set()

    async with serve(hang) as server, guarded(trusting) as client:
        task = asyncio.create_task(post(client, server.url))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()


# -- development -----------------------------------------------------------------------------


async def test_loopback_is_reached_where_it_is_allowed() -> None:
    client = GuardedClient(allow_loopback=True)
    async with serving(OK, None) as server, asyncio.timeout(30):
        for host in ("localhost", "127.0.0.1"):
            assert (await post(client, f"http://{host}:{server.port}/")).status == 204
    await client.aclose()


async def test_loopback_is_reached_nowhere_else() -> None:
    client = GuardedClient()
    async with serving(OK, None) as server, asyncio.timeout(30):
        for host in ("localhost", "127.0.0.1"):
            with pytest.raises(InvalidRequestError, match="scheme is not https"):
                await post(client, f"http://{host}:{server.port}/")
            with pytest.raises(BlockedAddressError):
                await post(client, f"https://{host}:{server.port}/")
    await client.aclose()
    assert server.connections == 0


@pytest.mark.parametrize(
    ("url", "address"),
    [
        (f"https://{NAME}/", "127.0.0.1"),  # another's name is no way in
        ("http://localhost/", "10.0.0.1"),
        ("http://localhost/", "8.8.8.8"),  # not even out, without TLS
    ],
)
async def test_allowing_loopback_opens_nothing_else(url: str, address: str) -> None:
    client = GuardedClient(allow_loopback=True, resolve=answers([address]))
    async with asyncio.timeout(30):
        with pytest.raises(BlockedAddressError):
            await post(client, url)
    await client.aclose()
