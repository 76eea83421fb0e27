"""Keeps child processes alive, shows what they say, and drains them at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.text import Text

from promptfleet.dev_stack.errors import DevStackError
from promptfleet.dev_stack.processes import Command, kill_group, spawn

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta")
_MAX_LINE_BYTES = 65_536
_LAST_LINES_S = 1.0


class ChildState(StrEnum):
    """Where a child is: running → backing_off → running … → stopping → ended."""

    RUNNING = "running"
    BACKING_OFF = "backing_off"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """A process to keep alive.

    Attributes:
        name: Its prefix in the output; unique within a supervisor.
        argv: The program and its arguments.
        env: Its whole environment; ours if None.
        cwd: Where it starts; our own working directory if None.
        restart: False for one that may end by itself.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    restart: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """How long to wait before a restart: doubled each time, forgotten after a healthy run."""

    first_s: float = 0.5
    max_s: float = 10.0
    healthy_after_s: float = 30.0

    def delay_s(self, failures: int) -> float:
        """Seconds before the restart that follows the `failures`-th exit in a row (from 1)."""
        doublings = min(failures - 1, 32)  # a float's range is finite, a crash loop is not
        return min(self.max_s, self.first_s * 2.0**doublings)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildExit:
    """A child's process ended.

    Attributes:
        name: The child.
        pid: The process that ended.
        returncode: Its exit status, or minus the signal that ended it.
        expected: Whether we were stopping it, or it was allowed to end.
        restart_in_s: Seconds until it starts again; None if it does not.
    """

    name: str
    pid: int
    returncode: int
    expected: bool
    restart_in_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildStatus:
    """A child as it is now; `pid` is None while no process of it lives."""

    name: str
    pid: int | None
    restarts: int
    state: ChildState


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """Called from the supervisor's threads as things happen; they must not raise.

    Attributes:
        on_start: A process runs: the child's name and its process id.
        on_exit: A process ended.
    """

    on_start: Callable[[str, int], None] = field(default=lambda _name, _pid: None)
    on_exit: Callable[[ChildExit], None] = field(default=lambda _exit: None)


class Supervisor:
    """Starts children, restarts those that end unexpectedly, and stops all of them in order.

    Each child leads a session of its own: a terminal's Ctrl-C reaches only us, and we drain. On
    Linux the children get SIGTERM when we die, however we die.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        backoff: Backoff | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            console: Where the children's lines go; stdout if None. Colours only on a terminal.
            backoff: The wait before restarts.
            hooks: What to call when a process starts or ends.
        """
        self._output = _PrefixedOutput(console or Console())
        self._backoff = backoff or Backoff()
        self._hooks = hooks or Hooks()
        self._groups: list[tuple[_Child, ...]] = []
        self._stopping = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, *specs: ChildSpec) -> None:
        """Start a group of children; groups are stopped in the reverse order of their start.

        Raises:
            DevStackError: A program does not exist, a name is taken, or we are stopping.
        """
        with self._lock:
            if self._stopping:
                raise DevStackError("The supervisor is stopping: it starts nothing more")
            self._check(specs)
            numbers = count(sum(len(group) for group in self._groups))
            for spec in specs:
                self._output.register(spec.name, next(numbers))
            children = tuple(
                _Child(spec, output=self._output, backoff=self._backoff, hooks=self._hooks)
                for spec in specs
            )
            # Known before it runs, so that stop() finds it whatever happens next.
            self._groups.append(children)
        for child in children:
            child.start()

    def stop(self, grace_s: float = 10.0) -> tuple[str, ...]:
        """Stop all children, the group that was started last first; may be called again.

        Each group gets SIGTERM and `grace_s` seconds to drain before SIGKILL; those who still
        need the earlier groups (a provider, say) are gone before these are stopped.

        Returns:
            The names of those that did not end in time and were killed.
        """
        with self._lock:
            self._stopping = True
            groups = list(reversed(self._groups))
        return tuple(name for group in groups for name in _stop_group(group, grace_s))

    def kill(self) -> tuple[str, ...]:
        """SIGKILL all children at once and return the names of those that still ran."""
        with self._lock:
            self._stopping = True
            children = [child for group in self._groups for child in group]
        return _stop_group(tuple(children), 0.0)

    def status(self) -> tuple[ChildStatus, ...]:
        """All children, in the order of their start."""
        with self._lock:
            return tuple(child.status() for group in self._groups for child in group)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until no child runs or will run again; False if that took too long."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            children = [child for group in self._groups for child in group]
        return all(child.wait_ended(deadline) for child in children)

    def _check(self, specs: Sequence[ChildSpec]) -> None:
        names = {child.spec.name for group in self._groups for child in group}
        for spec in specs:
            if spec.name in names:
                raise DevStackError(f"There are two children named {spec.name!r}")
            names.add(spec.name)
            path = (os.environ if spec.env is None else spec.env).get("PATH")
            if shutil.which(spec.argv[0], path=path) is None:
                raise DevStackError(f"{spec.name}: there is no program {spec.argv[0]!r}")


class _Child:
    """One child: its process of the moment and the thread that watches over it."""

    def __init__(
        self, spec: ChildSpec, *, output: _PrefixedOutput, backoff: Backoff, hooks: Hooks
    ) -> None:
        self.spec = spec
        self._output = output
        self._backoff = backoff
        self._hooks = hooks
        self._lock = threading.Lock()
        self._state = ChildState.ENDED
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0
        self._failures = 0
        self._stop_asked = threading.Event()
        self._ended = threading.Event()
        self._ended.set()

    def start(self) -> None:
        try:
            process = self._spawn()
        except OSError as error:
            raise DevStackError(f"{self.spec.name} could not be started: {error}") from error
        if process is None:  # stop() was faster
            return
        name = f"watch-{self.spec.name}"
        threading.Thread(target=self._watch, args=(process,), name=name, daemon=True).start()

    def status(self) -> ChildStatus:
        with self._lock:
            pid = self._process.pid if self._process is not None else None
            return ChildStatus(
                name=self.spec.name, pid=pid, restarts=self._restarts, state=self._state
            )

    def ask_to_stop(self) -> None:
        """No restart from now on, and SIGTERM to what runs."""
        with self._lock:
            self._stop_asked.set()
            if self._process is not None:
                self._state = ChildState.STOPPING
                self._process.terminate()

    def kill(self) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                kill_group(self._process.pid)

    def wait_ended(self, deadline: float | None) -> bool:
        if deadline is None:
            return self._ended.wait()
        return self._ended.wait(max(0.0, deadline - time.monotonic()))

    def _watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """Run the child's whole life: exit, wait, restart, until it may end."""
        while True:
            delay_s = self._live(process) if process is not None else self._next_delay_s(0.0)
            if delay_s is None or self._stop_asked.wait(delay_s):
                break
            try:
                process = self._spawn(restart=True)
            except OSError as error:
                self._output.line(self.spec.name, f"could not be restarted: {error}")
                process = None
                continue
            if process is None:
                break
        with self._lock:
            self._state = ChildState.ENDED
        self._ended.set()

    def _spawn(self, *, restart: bool = False) -> subprocess.Popen[bytes] | None:
        """Start the process; None if we are to stop."""
        env = dict(os.environ if self.spec.env is None else self.spec.env)
        env.setdefault("PYTHONUNBUFFERED", "1")  # line by line, though it writes to a pipe
        command = Command(argv=self.spec.argv, env=env, cwd=self.spec.cwd)
        with self._lock:
            if self._stop_asked.is_set():
                return None
            self._process = spawn(command, output=subprocess.PIPE)
            self._ended.clear()
            self._restarts += restart
            self._state = ChildState.RUNNING
            process = self._process
        self._hooks.on_start(self.spec.name, process.pid)
        return process

    def _live(self, process: subprocess.Popen[bytes]) -> float | None:
        """Follow the process to its end; the seconds until its restart, None for no restart."""
        started = time.monotonic()
        name = self.spec.name
        reader = threading.Thread(
            target=self._output.forward, args=(name, process), name=f"read-{name}", daemon=True
        )
        reader.start()
        returncode = process.wait()
        kill_group(process.pid)  # what it left behind must not live beside its successor
        reader.join(_LAST_LINES_S)
        with self._lock:
            self._process = None
            expected = self._stop_asked.is_set() or not self.spec.restart
            delay_s = None if expected else self._next_delay_s(time.monotonic() - started)
            self._state = ChildState.ENDED if expected else ChildState.BACKING_OFF
        if delay_s is not None:
            self._output.line(name, f"{_describe(returncode)}; restarting in {delay_s:g} s")
        self._hooks.on_exit(
            ChildExit(
                name=name,
                pid=process.pid,
                returncode=returncode,
                expected=expected,
                restart_in_s=delay_s,
            )
        )
        return delay_s

    def _next_delay_s(self, lived_s: float) -> float:
        healthy = lived_s >= self._backoff.healthy_after_s
        self._failures = 1 if healthy else self._failures + 1
        return self._backoff.delay_s(self._failures)


class _PrefixedOutput:
    """Prints whole lines, each after its child's name in its colour, all names equally wide."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._colours: dict[str, str] = {}
        self._width = 0
        self._lock = threading.Lock()

    def register(self, name: str, number: int) -> None:
        with self._lock:
            self._colours[name] = _COLOURS[number % len(_COLOURS)]
            self._width = max(self._width, len(name))

    def forward(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Print what the process writes, until it closes its output."""
        if process.stdout is None:
            return
        with process.stdout as lines:
            while chunk := lines.readline(_MAX_LINE_BYTES):
                self.line(name, chunk.decode("utf-8", "replace").rstrip("\r\n"))

    def line(self, name: str, text: str) -> None:
        with self._lock:
            prefix = (f"{name:<{self._width}} | ", self._colours[name])
            whole = Text.assemble(prefix, Text.from_ansi(text))
            # Nobody reads our output any more (rich leaves on a broken pipe): the children's
            # pipes must be emptied all the same, or they would block.
            with suppress(OSError, ValueError, SystemExit):
                self._console.print(whole, soft_wrap=True, highlight=False)


def _stop_group(group: Sequence[_Child], grace_s: float) -> tuple[str, ...]:
    for child in group:
        child.ask_to_stop()
    deadline = time.monotonic() + grace_s
    late = [child for child in group if not child.wait_ended(deadline)]
    for child in late:
        child.kill()
    for child in late:
        child.wait_ended(None)
    return tuple(child.spec.name for child in late)


def _describe(returncode: int) -> str:
    if returncode < 0:
        return f"killed by signal {-returncode}"
    return f"exited with {returncode}"
