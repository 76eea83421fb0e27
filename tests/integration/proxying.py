"""A small TCP proxy for tests, which loses what it is told to lose."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

# Postgres' ReadyForQuery, outside of a transaction or in one: the statement is all done.
_READY = (b"Z\0\0\0\x05I", b"Z\0\0\0\x05T")


@dataclasses.dataclass(kw_only=True, slots=True)
class Trap:
    """What becomes of the next `times` requests that hold `match`.

    Attributes:
        lose: The request, which the server never sees, or its reply, after it was carried out.
        then: Whether both ends are told (close) or the client waits for ever (silence).
        sprung: How often it was.
    """

    match: bytes
    lose: Literal["request", "reply"]
    then: Literal["close", "silence"] = "close"
    times: int = 1
    sprung: int = 0


class Proxy:
    """Forwards connections to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self.trap: Trap | None = None
        self.silent = False
        """Swallow everything: connections are accepted, and nobody answers."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def url(self, direct: str) -> str:
        """The same URL by way of the proxy."""
        parts = urlsplit(direct)
        user, at, _ = parts.netloc.rpartition("@")
        host, port = self._address
        return urlunsplit(parts._replace(netloc=f"{user}{at}{host}:{port}"))

    def refuse(self) -> None:
        """Close all connections, and refuse new ones."""
        # shutdown() wakes the thread that accepts; close() alone would let it take one more.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def heal(self) -> None:
        """Be a good proxy again."""
        self.trap, self.silent = None, False
        if self._listener.fileno() == -1:
            self._listener = socket.create_server(self._address)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Close all connections."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def springs(self, data: bytes) -> Trap | None:
        """The trap, if this request is one for it."""
        with self._lock:
            trap = self.trap
            if trap is None or trap.match not in data or trap.sprung >= trap.times:
                return None
            trap.sprung += 1
            return trap

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                link = _Link(self, client, server)
                with self._lock:
                    self._links.append(link)
                link.start()


class _Link:
    """One connection of a client, and its twin to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._trap: Trap | None = None  # its reply is to be lost

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        back = threading.Thread(target=self._run_back, daemon=True)
        with self._client, self._server:
            back.start()
            with contextlib.suppress(OSError):
                self._forward()
            self.close()
            back.join()

    def _run_back(self) -> None:
        with contextlib.suppress(OSError):
            self._return()
        self.close()

    def _forward(self) -> None:
        while data := self._client.recv(65_536):
            if self._proxy.silent:
                continue
            trap = self._proxy.springs(data)
            if trap is None or trap.lose == "reply":
                self._trap = trap or self._trap
                self._server.sendall(data)
            elif trap.then == "close":
                return
            else:
                self._swallow(self._client)
                return

    def _return(self) -> None:
        swallowed = b""
        while data := self._server.recv(65_536):
            if self._trap is not None:
                swallowed += data
                if self._trap.then == "close" and swallowed.endswith(_READY):
                    return
            elif not self._proxy.silent:
                self._client.sendall(data)

    def _swallow(self, end: socket.socket) -> None:
        while end.recv(65_536):
            pass


@contextlib.contextmanager
def proxy_to(url: str) -> Iterator[Proxy]:
    """A proxy to the server of a URL."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    proxy = Proxy(parts.hostname, parts.port)
    try:
        yield proxy
    finally:
        proxy.refuse()
