"""Real processes, started as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from tests.waiting import eventually

from promptfleet.cli.servers import READY_LINE

PROMPTFLEET = str(Path(sys.executable).with_name("promptfleet"))
START_TIMEOUT_S = 90.0


def clean_environment() -> dict[str, str]:
    """Ours without settings of the developer's own fleet."""
    names = {name for name in os.environ if name.startswith("PROMPTFLEET_")}
    return {name: value for name, value in os.environ.items() if name not in names}


class DevFleet:
    """`promptfleet dev` as a process; its output is kept."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [PROMPTFLEET, "dev", "--data-dir", str(data_dir), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
        eventually(
            lambda: text in self.output or self.process.poll() is not None,
            f"{text!r} in:\n{self.output}",
            timeout_s=timeout_s,
        )
        assert text in self.output, f"ended with {self.process.returncode}:\n{self.output}"

    def wait_until_ready(self) -> None:
        self.wait_for(READY_LINE)

    def run(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """A command of a user who works in another terminal."""
        return subprocess.run(
            [PROMPTFLEET, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env=self.environment(),
        )

    def environment(self) -> Mapping[str, str]:
        return {**clean_environment(), "PROMPTFLEET_DATA_DIR": str(self.data_dir)}

    def family(self) -> list[psutil.Process]:
        """The process and all that it started."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = 60.0) -> int:
        code = self.process.wait(timeout=timeout_s)
        self._reader.join(timeout=10)
        return code

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevFleet]:
    """A running development fleet with a quick simulated provider."""
    fleet = DevFleet(
        tmp_path_factory.mktemp("dev") / "data",
        *("--provider", "simulated"),
        *("--provider-option", "latency-ms=200", "--provider-option", "tokens-per-s=0"),
    )
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.close()
