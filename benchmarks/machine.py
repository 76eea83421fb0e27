"""The machine under measurement: processes, their readiness, and the CPU time they use."""

from __future__ import annotations

import bisect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from promptfleet.dev_stack.processes import Command, kill_group, spawn

REPOSITORY = Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = 20.0
SAMPLE_S = 0.1
_POLL_S = 0.02
_MACHINE = "(machine)"


class BenchmarkError(Exception):
    """A contestant did not do what is to be measured."""


def start(
    arguments: Sequence[str], *, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Run `python -m ARGUMENTS` in the repository's root, its output added to `log`.

    The process ends with us, however we end (on Linux).
    """
    command = Command(
        argv=[sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        cwd=REPOSITORY,
        death_signal=signal.SIGKILL,
    )
    with log.open("ab") as output:
        return spawn(command, output=output)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM all of them; who has not ended after 20 s is killed with its children."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        kill_group(process.pid)
        process.wait()


@contextmanager
def running(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Stop `processes` at the end of the block."""
    try:
        yield
    finally:
        stop(processes)


def wait_for(
    condition: Callable[[], bool],
    what: str,
    *,
    processes: Sequence[subprocess.Popen[bytes]],
    timeout_s: float,
    poll_s: float = _POLL_S,
) -> None:
    """Poll `condition` until it holds.

    Raises:
        BenchmarkError: It did not hold in time, or one of `processes` failed before.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        for process in processes:
            if process.poll() not in {None, 0}:
                raise BenchmarkError(f"{what}: a process ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(poll_s)


def accepts_connections(port: int) -> bool:
    """Whether somebody listens on `port` of the loopback address."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


class CpuTrace:
    """The CPU time that groups of process trees have used, sampled from a thread of its own.

    Sampled along the way, so that it can be asked afterwards for instants that only the database
    knows. The CPU time of processes that ended stays in the sum, as last seen.
    """

    def __init__(self, roots: Mapping[str, Sequence[int]]) -> None:
        """Nothing is read before the block is entered.

        Args:
            roots: For each group the process ids whose trees belong to it.
        """
        self._roots = {name: [psutil.Process(pid) for pid in pids] for name, pids in roots.items()}
        self._seen: dict[str, dict[int, float]] = {name: {} for name in roots}
        self._instants: list[float] = []
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpu-trace", daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def used_s(self, group: str, begin: float, end: float) -> float:
        """Seconds of CPU that `group` used between two instants in Unix seconds."""
        return self._at(group, end) - self._at(group, begin)

    def foreign_cores(self, begin: float, end: float) -> float:
        """How many cores, on average, were busy with anything that belongs to no group."""
        ours = sum(self.used_s(group, begin, end) for group in self._roots)
        return max(self.used_s(_MACHINE, begin, end) - ours, 0.0) / (end - begin)

    def _at(self, group: str, instant: float) -> float:
        """Read between the two samples around `instant`, as if the use had been even there."""
        times, sums = self._instants, self._sums[group]
        after = min(max(bisect.bisect_left(times, instant), 1), len(times) - 1)
        begin, end = times[after - 1], times[after]
        share = min(max((instant - begin) / (end - begin), 0.0), 1.0)
        return sums[after - 1] + share * (sums[after] - sums[after - 1])

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        self._instants.append(time.time())
        self._sums[_MACHINE].append(_busy_s())
        for name, roots in self._roots.items():
            seen = self._seen[name]
            for root in roots:
                for process in _tree(root):
                    with suppress(psutil.NoSuchProcess):
                        used = process.cpu_times()
                        seen[process.pid] = used.user + used.system
            self._sums[name].append(sum(seen.values()))


def _busy_s() -> float:
    """Seconds that all cores together were busy since the start of the machine."""
    times = psutil.cpu_times()
    # Guests' time is contained in `user`; waiting for the disk is being idle.
    return float(times.user + times.nice + times.system)


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
