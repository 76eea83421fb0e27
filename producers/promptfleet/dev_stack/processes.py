"""Starting processes that end with us, and finding those that an earlier run left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_LAUNCHER = Path(__file__).with_name("launcher.py")
_PROC = Path("/proc")
_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A process to start.

    Attributes:
        argv: The program and its arguments.
        env: Its whole environment.
        cwd: Where it starts; our own working directory if None.
        death_signal: What Linux sends it when we die, however we die. Elsewhere it lives on.
        identity: Who it runs as; see `launcher`.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path | None = None
    death_signal: signal.Signals = signal.SIGTERM
    identity: str = "same"


class _Spawner:
    """The one thread that starts processes.

    Linux sends a death signal when the *thread* that started the child ends, so a child that is
    started from a short-lived thread would be killed with it. This one lives as long as we do.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="promptfleet-spawner", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()

    def popen(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()

        def work() -> None:
            try:
                future.set_result(start())
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                future.set_exception(error)

        self._work.put(work)
        return future.result()


_spawner_lock = threading.Lock()
_spawner: _Spawner | None = None


def _current_spawner() -> _Spawner:
    global _spawner  # noqa: PLW0603  # one thread a process, made at first use
    with _spawner_lock:
        if _spawner is None or _spawner.owner != os.getpid():  # a fork copies no threads
            _spawner = _Spawner()
        return _spawner


def spawn(command: Command, *, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Args:
        command: What to start.
        output: Where stdout and stderr go: a file, or `subprocess.PIPE`.

    Raises:
        OSError: The process could not be started.
    """
    argv = list(command.argv)
    if sys.platform == "linux" or command.identity != "same":
        argv = launcher_argv(command.identity, command.death_signal, argv)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            env=dict(command.env),
            cwd=command.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return _current_spawner().popen(start)


def launcher_argv(identity: str, death_signal: int, argv: Sequence[str] = ()) -> list[str]:
    """The command line that runs `argv` through the launcher."""
    python = [sys.executable, "-I", "-S", str(_LAUNCHER)]
    return [*python, str(os.getpid()), str(int(death_signal)), identity, *argv]


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_group(pid: int) -> None:
    """SIGKILL what is left of the process group that `pid` leads."""
    # macOS answers EPERM where the group consists of zombies only.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def living_in(directory: Path, *, name: str, last_pid: int | None) -> list[int]:
    """The processes called `name` whose working directory is `directory`.

    Both servers work inside their data. Where there is no /proc, the answer is `last_pid` if it
    still has that name.
    """
    if _PROC.joinpath("self/cwd").exists():
        pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
        return [pid for pid in pids if _proc_matches(pid, directory, name)]
    if last_pid is None:
        return []
    found = subprocess.run(
        ["ps", "-o", "comm=", "-p", str(last_pid)], capture_output=True, text=True, check=False
    )
    return [last_pid] if Path(found.stdout.strip()).name == name else []


def _proc_matches(pid: int, directory: Path, name: str) -> bool:
    entry = _PROC / str(pid)
    try:
        if entry.joinpath("comm").read_text(encoding="utf-8").strip() != name:
            return False
        return entry.joinpath("cwd").samefile(directory)
    except OSError:  # gone meanwhile, another user's, or a zombie, which has no directory
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll `condition` (for what sends us no signal); False if it did not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
