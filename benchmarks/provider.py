"""The provider that all contestants call: our simulated one, in a process of its own."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import machine
from promptfleet.dev_stack import free_port

START_TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunningProvider:
    """A provider that answers at `url` (without a path)."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_provider(latency_ms: str, log_dir: Path) -> Iterator[RunningProvider]:
    """A provider for the length of the block.

    Args:
        latency_ms: How long each answer takes: "0", "1000" or, spread evenly, "100..10000".
        log_dir: Where its output goes.
    """
    port = free_port()
    arguments = ["promptfleet_workers.providers.simulated"]
    arguments += ["--port", str(port), "--latency-ms", latency_ms]
    process = machine.start(arguments, env={}, log=log_dir / "provider.log")
    with machine.running([process]):
        machine.wait_for(
            lambda: machine.accepts_connections(port),
            "start of the provider",
            processes=[process],
            timeout_s=START_TIMEOUT_S,
        )
        yield RunningProvider(url=f"http://127.0.0.1:{port}", process=process)
