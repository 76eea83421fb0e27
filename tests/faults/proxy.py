"""TCP proxies between the parts of a fleet, which lose, cut, delay and hold back what they carry.

Each client has a wire of its own to each server, so that one worker can be cut off alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from tests.faults.pgwire import READY, Statements

CHUNK = 65_536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Mode(enum.StrEnum):
    """What a wire does with what it is given."""

    OPEN = "open"
    SILENT = "silent"  # a black hole: connections are accepted, and nothing passes
    DEAF = "deaf"  # requests are lost
    MUTE = "mute"  # replies are lost: the server does it, and nobody hears
    REFUSE = "refuse"  # new connections are reset


class Reply(enum.StrEnum):
    """What becomes of the reply to a statement that sprang a trap."""

    PASSES = "passes"
    RESET = "reset"  # it is lost, and the client is told that the connection broke
    SILENCE = "silence"  # it is lost, and the client waits


@dataclasses.dataclass(kw_only=True, slots=True)
class Trap:
    """Waits for a statement on its way to Postgres, which is carried out in any case.

    Attributes:
        match: A part of the statement's text.
        reply: What becomes of its reply.
        then: Called, quickly, just after the statement was forwarded.
        times: How often it springs.
        sprung: How often it did.
    """

    match: str
    reply: Reply = Reply.PASSES
    then: Callable[[], None] | None = None
    times: int = 1
    sprung: int = 0


class Wire:
    """The connections of one client to one server; any thread may change how it behaves."""

    def __init__(self, name: str, target: Callable[[], tuple[str, int]], *, postgres: bool) -> None:
        """Lead nowhere yet.

        Args:
            name: Client and server, for people.
            target: Where the server is now.
            postgres: True to look for statements.
        """
        self.name = name
        self.target = target
        self.postgres = postgres
        self.mode = Mode.OPEN
        self.delay_s = 0.0
        self.trap: Trap | None = None
        self.address = ("127.0.0.1", 0)
        self._links: set[_Link] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def url(self, direct: str) -> str:
        """The same URL by way of this wire."""
        parts = urlsplit(direct)
        user, at, _ = parts.netloc.rpartition("@")
        host, port = self.address
        return urlunsplit(parts._replace(netloc=f"{user}{at}{host}:{port}"))

    def heal(self) -> None:
        """Carry everything again; connections that have lost something stay as dead as they are."""
        self.mode, self.delay_s, self.trap = Mode.OPEN, 0.0, None

    def reset(self) -> None:
        """Break all connections."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._reset)

    async def listen(self) -> asyncio.Server:
        """Accept connections, on the loop that runs."""
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._accept, *self.address, backlog=256)
        self.address = server.sockets[0].getsockname()[:2]
        return server

    def springs(self, statements: list[str]) -> Trap | None:
        """The trap, if one of the statements is for it; on the loop."""
        trap = self.trap
        if trap is None or trap.sprung >= trap.times:
            return None
        if not any(trap.match in statement for statement in statements):
            return None
        trap.sprung += 1
        return trap

    def _reset(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode is Mode.REFUSE:
            _break(writer)
            return
        try:
            server = await asyncio.open_connection(*self.target())
        except OSError:
            _break(writer)
            return
        link = _Link(self, (reader, writer), server)
        self._links.add(link)
        with contextlib.suppress(asyncio.CancelledError):  # asyncio would print it, at the end
            await link.run()
        self._links.discard(link)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One connection of a client, and its twin to the server."""

    def __init__(self, wire: Wire, client: Stream, server: Stream) -> None:
        self._wire = wire
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._statements = Statements() if wire.postgres else None
        self._fate = Reply.PASSES
        self._requests_lost = False  # bytes are missing: it can never work again
        self._replies_lost = False

    async def run(self) -> None:
        """Carry both ways until one end closes."""
        ways = [asyncio.create_task(self._carry_requests()), asyncio.create_task(self._carry())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._to_client.close()
            self._to_server.close()

    def reset(self) -> None:
        """Break both ends."""
        _break(self._to_client)
        _break(self._to_server)

    async def _carry_requests(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._from_client.read(CHUNK):
                await self._dawdle()
                if self._wire.mode in {Mode.SILENT, Mode.DEAF}:
                    self._requests_lost = True
                if self._requests_lost:
                    continue
                trap = self._look(data)
                self._to_server.write(data)
                await self._to_server.drain()
                if trap is not None and trap.then is not None:
                    trap.then()

    def _look(self, data: bytes) -> Trap | None:
        if self._statements is None:
            return None
        trap = self._wire.springs(self._statements.feed(data))
        if trap is not None:
            self._fate = trap.reply
        return trap

    async def _carry(self) -> None:
        end = b""
        with contextlib.suppress(OSError):
            while data := await self._from_server.read(CHUNK):
                await self._dawdle()
                if self._wire.mode in {Mode.SILENT, Mode.MUTE} or self._fate is Reply.SILENCE:
                    self._replies_lost = True
                end = (end + data)[-len(READY[0]) :]
                if self._fate is Reply.RESET:
                    if end in READY:
                        self.reset()
                        return
                elif not self._replies_lost:
                    self._to_client.write(data)
                    await self._to_client.drain()
        lost = self._replies_lost or self._wire.mode in {Mode.SILENT, Mode.MUTE}
        if lost:  # who is in a black hole does not hear the end either
            await asyncio.Event().wait()

    async def _dawdle(self) -> None:
        if self._wire.delay_s:
            await asyncio.sleep(self._wire.delay_s)


def _break(writer: asyncio.StreamWriter) -> None:
    """End with a reset instead of a farewell."""
    handle = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


class Exchange:
    """All wires, on an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._servers: list[asyncio.Server] = []
        self.wires: dict[str, Wire] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def wire(self, name: str, target: Callable[[], tuple[str, int]], *, postgres: bool) -> Wire:
        """A new wire, which already listens."""
        wire = Wire(name, target, postgres=postgres)
        listening = asyncio.run_coroutine_threadsafe(wire.listen(), self._loop)
        self._servers.append(listening.result(10))
        self.wires[name] = wire
        return wire

    def of(self, server: str) -> Iterator[Wire]:
        """The wires that lead to a server."""
        return (wire for name, wire in self.wires.items() if name.endswith(f"->{server}"))

    def heal(self) -> None:
        """Make all wires good again, and break what hangs in them."""
        for wire in self.wires.values():
            wire.heal()
            wire.reset()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
