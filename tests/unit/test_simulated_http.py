"""The simulated provider's HTTP, fed by hand: in the pieces that a socket gives when it likes."""

from __future__ import annotations

import asyncio

from promptfleet_workers.providers.simulated.http import (
    MAX_HEAD_BYTES,
    Connection,
    Ending,
    HttpServer,
    Reply,
    Request,
    response,
)


class Written(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += bytes(data)

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return True

    def close(self) -> None:
        self.data += b"<closed>"


class Lengths:
    """Answers with the length of the body."""

    def answer(self, request: Request) -> Reply:
        return Reply(steps=[(0.0, response(200, b"%d" % len(request.body)))], ending=Ending.KEEP)


async def fed(*pieces: bytes) -> bytes:
    connection, transport = Connection(HttpServer(Lengths())), Written()
    connection.connection_made(transport)
    for piece in pieces:
        connection.data_received(piece)
    return transport.data


async def test_a_body_that_ends_in_a_large_piece_is_no_head() -> None:
    size = MAX_HEAD_BYTES + 1
    head = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size
    told = await fed(head, b"x" * size, head, b"x" * size)
    assert told.count(b"200 OK") == 2
    assert told.count(b"%d" % size) == 2
    assert b"431" not in told


async def test_a_head_that_does_not_end_is_refused() -> None:
    told = await fed(b"GET / HTTP/1.1\r\n", *[b"a: %b\r\n" % (b"x" * 1000)] * 70)
    assert told.startswith(b"HTTP/1.1 431 ")
    assert told.endswith(b"<closed>")
