"""What the embedded servers have in common: lock, port, process, readiness, log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from promptfleet.dev_stack.data_directory import DataDirectory
from promptfleet.dev_stack.errors import DevStackError, PortTakenError, ServerStartError
from promptfleet.dev_stack.ports import choose_port, is_free
from promptfleet.dev_stack.processes import (
    Command,
    living_in,
    send_signal,
    spawn,
    wait_until,
)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
_LEFTOVER_TIMEOUT_S = 10.0
_PORT_ATTEMPTS = 5
_POLL_S = 0.01


class EmbeddedServer(ABC):
    """A server process on loopback whose data live in a private directory.

    Its password and port are kept there, so `url` stays the same over restarts unless another
    process takes the port while the server is down. On Linux the server ends with the process
    that started it, even if that one is killed; elsewhere the next `start` ends what was left
    behind. One thread at a time may use an instance.
    """

    name: ClassVar[str]
    usual_port: ClassVar[int]
    process_name: ClassVar[str]

    def __init__(
        self, data_dir: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        """Nothing is started or written before `start`.

        Args:
            data_dir: The private directory; created with mode 0700 if missing.
            port: Insist on this port. If None: the port used last time if it is free, else the
                usual one if that is free, else any.
            settings: Further entries of the server's own configuration; they win over ours.
        """
        self._directory = DataDirectory(data_dir)
        self._fixed_port = port
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    @abstractmethod
    def url(self) -> str:
        """How clients reach the server, password included.

        Raises:
            DevStackError: It never ran on this data directory.
        """

    @property
    def data_dir(self) -> Path:
        """The private directory, absolute."""
        return self._directory.path

    @property
    def log_path(self) -> Path:
        """Where the server's own log is."""
        return self.data_dir / f"{self.name}.log"

    @property
    def running(self) -> bool:
        """Whether the process that we started lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def port(self) -> int:
        """The port it listens on, or listened on last.

        Raises:
            DevStackError: It never ran on this data directory.
        """
        port = self._directory.read_int("port")
        if port is None:
            raise DevStackError(f"{self.name} was never started in {self.data_dir}")
        return port

    @property
    def password(self) -> str:
        """The generated password.

        Raises:
            DevStackError: It never ran on this data directory.
        """
        password = self._directory.read("password")
        if password is None:
            raise DevStackError(f"{self.name} was never started in {self.data_dir}")
        return password

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            DataDirectoryInUseError: Another server runs on the directory, be it ours.
            DataDirectoryError: The directory is not ours.
            PortTakenError: The port that was insisted on is in use.
            ServerMissingError: Its wheel is not installed.
            ServerStartError: It ended or stayed silent; carries the end of its log.
        """
        if self._process is not None and not self.running:
            self._forget()
        self._directory.acquire()
        try:
            self._directory.secret()
            self._end_leftovers()
            self._prepare()
            self._start_on_a_port()
        except BaseException:
            self.kill()
            raise

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and wait for its end; does nothing if it does not run.

        Args:
            mode: One of the server's ways to stop. One that takes longer than 30 s is killed.
        """
        number = self._stop_signal(mode)
        self._end(number)
        self._forget()

    def restart(self, mode: str = "fast") -> None:
        """Stop and start again, on the same port unless someone takes it in between."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL the server and its children, as a crash of the machine's would."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            self._kill_leftovers()
        self._forget()

    @abstractmethod
    def _prepare(self) -> None:
        """Create the data at the first start and do what each start needs."""

    @abstractmethod
    def _command(self, port: int) -> Command:
        """Write the configuration for `port` and say what to start."""

    @abstractmethod
    def _answers(self, pid: int, port: int) -> bool:
        """Whether the server, and no other, accepts clients."""

    @property
    @abstractmethod
    def _work_dir(self) -> Path:
        """The directory the server works in."""

    @abstractmethod
    def _stop_signal(self, mode: str) -> signal.Signals:
        """The signal that stops the server this way."""

    def _forget(self) -> None:
        self._process = None
        self._directory.release()

    def _start_on_a_port(self) -> None:
        preferred = [self._directory.read_int("port"), self.usual_port]
        failure = ""
        for _ in range(_PORT_ATTEMPTS):
            port = self._fixed_port or choose_port(*preferred)
            if self._fixed_port is not None and not is_free(port):
                raise PortTakenError(f"Port {port} is in use by another process", port=port)
            self._process = self._launch(self._command(port))
            failure = self._wait_until_it_answers(self._process, port)
            if not failure:
                self._directory.write("port", str(port))
                return
            # Another process took the port after we had looked.
            if self._fixed_port is not None or "Address already in use" not in failure:
                break
            preferred = []
        raise ServerStartError(
            f"{self.name} did not start. The end of its log, {self.log_path}:\n{failure}",
            log=failure,
        )

    def _launch(self, command: Command) -> subprocess.Popen[bytes]:
        log, self._log_start = self._directory.open_log(self.log_path.name)
        with os.fdopen(log, "ab") as output:
            process = spawn(command, output=output)
        self._directory.write("pid", str(process.pid))
        return process

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes], port: int) -> str:
        """Nothing once it answers, otherwise the end of its log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._answers(process.pid, port):
                return ""
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=_POLL_S)  # a sleep that its end cuts short
                return f"{self._log_tail()}\n(it ended with code {code})"
        return f"{self._log_tail()}\n(it did not answer within {START_TIMEOUT_S:.0f} s)"

    def _log_tail(self) -> str:
        return self._directory.log_tail(self.log_path.name, since=self._log_start)

    def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _leftovers(self) -> list[int]:
        last_pid = self._directory.read_int("pid")
        return living_in(self._work_dir, name=self.process_name, last_pid=last_pid)

    def _end_leftovers(self) -> None:
        """End what a killed parent left on our data; we hold the lock, so it is nobody's."""
        left = self._leftovers()
        for pid in left:
            send_signal(pid, self._stop_signal("fast"))
        if left and not wait_until(lambda: not self._leftovers(), _LEFTOVER_TIMEOUT_S):
            self._kill_leftovers()

    def _kill_leftovers(self) -> None:
        def none_left() -> bool:
            left = self._leftovers()
            for pid in left:
                send_signal(pid, signal.SIGKILL)
            return not left

        if not wait_until(none_left, _LEFTOVER_TIMEOUT_S):
            raise DevStackError(f"{self.name} processes {self._leftovers()} can't be killed")
