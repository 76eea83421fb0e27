"""The HTTP client against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp.client_reqrep import ClientRequest

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import TimeoutOptions
from promptfleet_workers.providers import http
from promptfleet_workers.providers.http import Endpoint, HttpClient, HttpResponse

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

PATIENT = TimeoutOptions()
HASTY = TimeoutOptions(first_byte_timeout_ms=100, idle_timeout_ms=100)


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server that hands each connection, its first request read, to `handler`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except ConnectionError:
            pass  # the client has gone, as it should
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1/chat/completions"


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        int(line.split(":")[1])
        for line in head.splitlines()
        if line.lower().startswith("content-length:")
    )
    return head, await reader.readexactly(length)


def replying(*pieces: bytes) -> Handler:
    """Read a request, send `pieces`, close."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return handler


async def post(handler: Handler, timeouts: TimeoutOptions = PATIENT) -> HttpResponse:
    async with serving(handler) as url:
        client = HttpClient()
        try:
            return await client.post(Endpoint(url, {}), b'{"a":1}', timeouts)
        finally:
            await client.aclose()


async def failure(handler: Handler, timeouts: TimeoutOptions = PATIENT) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await post(handler, timeouts)
    return caught.value


def with_length(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(body), headers, body)


async def test_a_whole_response_with_its_status_and_headers() -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}"

    response = await post(replying(head))

    assert (response.status, response.headers["retry-after"], response.body) == (429, "7", b"{}")


async def test_body_and_headers_arrive_and_the_connection_is_kept() -> None:
    seen: list[tuple[str, bytes]] = []
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            seen.append(await read_request(reader))
            writer.write(with_length(b"{}"))

    async with serving(handler) as url:
        client = HttpClient()
        endpoint = Endpoint(
            url, {"Content-Type": "application/x-mine", "Authorization": "Bearer s"}
        )
        await client.post(endpoint, b'{"n":1}', PATIENT)
        await client.post(endpoint, b'{"n":2}', PATIENT)
        await client.aclose()

    assert [body for _, body in seen] == [b'{"n":1}', b'{"n":2}']
    assert connections == 1
    head = seen[1][0].lower()
    assert head.startswith("post /v1/chat/completions http/1.1\r\n")
    assert "authorization: bearer s\r\n" in head
    assert head.count("content-type:") == 1
    assert "content-type: application/x-mine\r\n" in head
    assert "accept-encoding: gzip, deflate\r\n" in head


async def test_a_chunked_body_in_many_pieces_is_put_together() -> None:
    response = await post(
        replying(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            b"2\r\n{}\r\n",
            b"1\r\n \r\n0\r\n\r\n",
        )
    )

    assert response.body == b"{} "


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (b"gzip", gzip.compress(b'{"a":1}', mtime=0)),
        (b"x-gzip", gzip.compress(b'{"a"', mtime=0) + gzip.compress(b":1}")),
        (b"gzip", gzip.compress(b'{"a":1}', mtime=0) + bytes(500)),
        (b"deflate", zlib.compress(b'{"a":1}')),
        (b"deflate", zlib.compress(b'{"a":1}')[2:-4]),
    ],
    ids=["gzip", "members", "padding", "deflate", "deflate without its header"],
)
async def test_a_compressed_body_is_unpacked(encoding: bytes, body: bytes) -> None:
    response = await post(replying(with_length(body, b"content-encoding: %b\r\n" % encoding)))

    assert response.body == b'{"a":1}'


@pytest.mark.parametrize("size", [1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 137, 1_000_003])
@pytest.mark.parametrize("form", ["gzip", "deflate", "deflate without its header"])
async def test_nothing_of_a_compressed_body_is_left_behind(form: str, size: int) -> None:
    plain = b"x" * size
    packed = gzip.compress(plain, mtime=0) if form == "gzip" else zlib.compress(plain)
    if form.endswith("header"):
        packed = packed[2:-4]
    headers = b"content-encoding: %b\r\n" % form.partition(" ")[0].encode()

    response = await post(replying(with_length(packed, headers)))

    assert response.body == plain


async def test_only_encodings_are_asked_for_that_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if brotli and zstd were installed: then aiohttp asks for them by itself.
    everything = dict[str, str](ClientRequest.DEFAULT_HEADERS.items())
    everything["Accept-Encoding"] = "gzip, deflate, br, zstd"
    monkeypatch.setattr(ClientRequest, "DEFAULT_HEADERS", everything)
    heads = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await read_request(reader))[0].lower())
        writer.write(with_length(b"{}"))

    await post(handler)

    assert "accept-encoding: gzip, deflate\r\n" in heads[0]


async def test_a_refused_connection_cost_nothing() -> None:
    async with serving(replying()) as url:
        pass  # now nobody listens there

    client = HttpClient()
    with pytest.raises(ProviderError) as caught:
        await client.post(Endpoint(url, {}), b"{}", PATIENT)
    await client.aclose()

    assert (caught.value.code, caught.value.unknown_outcome) == ("connect_error", False)


async def test_an_unknown_host_cost_nothing() -> None:
    client = HttpClient()
    with pytest.raises(ProviderError) as caught:
        await client.post(Endpoint("http://nowhere.invalid/v1", {}), b"{}", PATIENT)
    await client.aclose()

    assert (caught.value.code, caught.value.unknown_outcome) == ("connect_error", False)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param((), id="before the response"),
        pytest.param((b"HTTP/1.1 200 OK\r\ncontent-le",), id="in the headers"),
        pytest.param((b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"a"',), id="in the body"),
        pytest.param(
            (b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{"a"\r\n',), id="in chunks"
        ),
        pytest.param((b"220 mail.example ESMTP\r\n",), id="with another protocol"),
    ],
)
async def test_a_connection_lost_in_mid_call_may_have_cost_something(
    pieces: tuple[bytes, ...],
) -> None:
    error = await failure(replying(*pieces))

    assert (error.code, error.unknown_outcome) == ("connection_lost", True)


@pytest.mark.parametrize(
    "beginning", [b"", b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"a"'], ids=["head", "body"]
)
async def test_a_stall_ends_at_its_timer(beginning: bytes) -> None:
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(beginning)
        assert await reader.read() == b""  # until the client gives up
        gone.set()

    async with asyncio.timeout(10):
        error = await failure(handler, HASTY)
        await gone.wait()

    assert (error.code, error.unknown_outcome) == ("timeout", True)


async def test_the_idle_timer_starts_anew_with_each_piece() -> None:
    pieces = 5

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % pieces)
        for _ in range(pieces):
            await asyncio.sleep(0.15)  # the behaviour under test is one in time
            writer.write(b"x")

    response = await post(handler, TimeoutOptions(idle_timeout_ms=600))

    assert response.body == b"x" * pieces


async def test_an_endless_body_is_refused_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_RESPONSE_BYTES", 100_000)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
        while True:
            writer.write(b" " * 16_384)
            await writer.drain()

    async with asyncio.timeout(10):
        error = await failure(handler)

    assert (error.code, error.unknown_outcome) == ("response_too_large", True)


async def test_a_small_body_that_unpacks_to_a_huge_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "MAX_RESPONSE_BYTES", 100_000)
    member = gzip.compress(b" " * 50_001, mtime=0)
    bomb = member * 2
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n"
    for response in (
        with_length(bomb, b"content-encoding: gzip\r\n"),
        head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(bomb), bomb),
    ):
        error = await failure(replying(response))

        assert (error.code, error.unknown_outcome) == ("response_too_large", True)


@pytest.mark.parametrize(
    ("body", "encoding", "code"),
    [
        (gzip.compress(b'{"a":1}', mtime=0)[:-4], b"gzip", "connection_lost"),
        (b"no gzip at all", b"gzip", "bad_response"),
        (gzip.compress(b"{}", mtime=0) + b"rubbish", b"gzip", "bad_response"),
        (b"no deflate at all", b"deflate", "bad_response"),
        (b"anything", b"br", "bad_response"),
    ],
)
async def test_a_damaged_compressed_body_may_have_cost_something(
    body: bytes, encoding: bytes, code: str
) -> None:
    error = await failure(replying(with_length(body, b"content-encoding: %b\r\n" % encoding)))

    assert (error.code, error.unknown_outcome) == (code, True)


async def test_a_cancelled_call_closes_its_connection() -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.set()
        assert await reader.read() == b""
        gone.set()

    async with serving(handler) as url, asyncio.timeout(10):
        client = HttpClient()
        task = asyncio.create_task(client.post(Endpoint(url, {}), b"{}", PATIENT))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()
        await client.aclose()


# -- event streams

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
LAST = b"data: [DONE]\n\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Listener:
    """Keeps the pieces that come; the stream is over with the last event."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def __call__(self, piece: bytes) -> bool:
        self.pieces.append(piece)
        return LAST in b"".join(self.pieces)

    @property
    def heard(self) -> bytes:
        return b"".join(self.pieces)


async def listen(
    handler: Handler, timeouts: TimeoutOptions = PATIENT
) -> tuple[HttpResponse, Listener]:
    listener = Listener()
    async with serving(handler) as url:
        client = HttpClient()
        try:
            return await client.post(Endpoint(url, {}), b"{}", timeouts, listener), listener
        finally:
            await client.aclose()


async def test_a_stream_is_given_piece_by_piece_and_has_no_body() -> None:
    taken = asyncio.Event()
    heard: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunked(b"data: 1\n\n"))
        await taken.wait()  # the second piece comes only after the first one was heard
        writer.write(chunked(LAST) + b"0\r\n\r\n")

    def take(piece: bytes) -> bool:
        heard.append(piece)
        taken.set()
        return len(heard) == 2

    async with serving(handler) as url, asyncio.timeout(10):
        client = HttpClient()
        response = await client.post(Endpoint(url, {}), b"{}", PATIENT, take)
        await client.aclose()

    assert heard == [b"data: 1\n\n", LAST]
    assert (response.status, response.body) == (200, b"")


async def test_the_connection_of_a_stream_is_used_again() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(STREAM_HEAD + chunked(LAST))
            await writer.drain()
            writer.write(b"0\r\n\r\n")

    async with serving(handler) as url:
        client = HttpClient()
        for _ in range(3):
            await client.post(Endpoint(url, {}), b"{}", PATIENT, Listener())
        await client.aclose()

    assert connections == 1


@pytest.mark.parametrize("more", [b"", chunked(b": bye\n")], ids=["silence", "more"])
async def test_a_stream_that_stays_open_after_its_last_event_is_left(more: bytes) -> None:
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunked(LAST) + more)
        assert await reader.read() == b""
        gone.set()

    async with asyncio.timeout(10):
        response, listener = await listen(handler)
        await gone.wait()

    assert (response.status, listener.heard[: len(LAST)]) == (200, LAST)


async def test_what_is_no_event_stream_is_read_whole() -> None:
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: text/event-stream\r\n"
    for head in (refusal, b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\n"):
        response, listener = await listen(replying(head + b"content-length: 2\r\n\r\n{}"))

        assert (response.body, listener.heard) == (b"{}", b"")


@pytest.mark.parametrize("beginning", [b"", STREAM_HEAD, STREAM_HEAD + chunked(b"data: 1\n\n")])
async def test_a_stream_that_stalls_is_closed_at_its_timer(beginning: bytes) -> None:
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(beginning)
        assert await reader.read() == b""
        gone.set()

    async with asyncio.timeout(10):
        with pytest.raises(ProviderError) as caught:
            await listen(handler, HASTY)
        await gone.wait()

    assert (caught.value.code, caught.value.unknown_outcome) == ("timeout", True)


async def test_a_stream_that_breaks_off_may_have_cost_something() -> None:
    with pytest.raises(ProviderError) as caught:
        await listen(replying(STREAM_HEAD, chunked(b"data: 1\n\n")))

    assert (caught.value.code, caught.value.unknown_outcome) == ("connection_lost", True)


async def test_a_compressed_stream_is_unpacked_as_it_comes() -> None:
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    packed = gzip.compress(b"data: 1\n\n", mtime=0) + gzip.compress(LAST)

    _, listener = await listen(
        replying(head, chunked(packed[:9]), chunked(packed[9:]), b"0\r\n\r\n")
    )

    assert listener.heard == b"data: 1\n\n" + LAST


async def test_an_endless_stream_is_refused_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_STREAM_BYTES", 100_000)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD)
        while True:
            writer.write(chunked(b": hm\n" * 1000))
            await writer.drain()

    async with asyncio.timeout(10):
        with pytest.raises(ProviderError) as caught:
            await listen(handler)

    assert caught.value.code == "response_too_large"


@pytest.mark.parametrize("is_over", [False, True])
async def test_a_cancelled_stream_closes_its_connection(is_over: bool) -> None:
    heard, gone = asyncio.Event(), asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunked(b"data: 1\n\n"))
        assert await reader.read() == b""
        gone.set()

    def take(piece: bytes) -> bool:
        heard.set()
        return is_over

    async with serving(handler) as url, asyncio.timeout(10):
        client = HttpClient()
        task = asyncio.create_task(client.post(Endpoint(url, {}), b"{}", PATIENT, take))
        await heard.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()
        await client.aclose()


async def test_a_listeners_refusal_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunked(b"data: 1\n\n"))
        assert await reader.read() == b""
        gone.set()

    def refuse(piece: bytes) -> bool:
        raise ProviderError(code="bad_response")

    async with serving(handler) as url, asyncio.timeout(10):
        client = HttpClient()
        with pytest.raises(ProviderError):
            await client.post(Endpoint(url, {}), b"{}", PATIENT, refuse)
        await gone.wait()
        await client.aclose()


async def test_a_message_shows_nothing_of_the_response() -> None:
    error = await failure(replying(b"HTTP/1.1 200 OK\r\nthe secret prompt\r\n\r\n"))

    assert "secret" not in error.message
