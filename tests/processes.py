"""Real processes for tests: the simulated provider and workers, always ended at the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from tests.forking import ForkedProcess, can_be_forked
from tests.waiting import eventually

from promptfleet_workers.providers.simulated.answers import prompt_hash

START_S = 60.0
STOP_S = 40.0
_LISTENING = re.compile(r"listening on (http://\S+)")


class Process:
    """A child whose output goes to a file; `ready` appears there once it serves."""

    def __init__(
        self, argv: Sequence[str], *, log: Path, ready: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self._process = _started(argv, log=log, env=os.environ if env is None else env)
        try:
            eventually(lambda: self._is_ready(ready), f"{log.name} is ready", timeout_s=START_S)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self) -> None:
        """SIGTERM, and go on."""
        self._process.terminate()

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait(STOP_S)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.running:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(STOP_S)

    def _is_ready(self, ready: str) -> bool:
        output = self.output
        assert self.running or ready in output, f"it ended:\n{output[-4000:]}"
        return ready in output


def _started(
    argv: Sequence[str], *, log: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes] | ForkedProcess:
    """The process, in the directory of its log, where no fleet.toml lies about."""
    with log.open("ab") as output:
        if can_be_forked(argv, env):
            return ForkedProcess(argv, log=log, env=env)
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


class Provider:
    """The simulated provider in a process of its own."""

    def __init__(self, directory: Path, *flags: str) -> None:
        argv = [sys.executable, "-m", "promptfleet_workers.providers.simulated", "--port", "0"]
        self.process = Process(
            [*argv, *flags], log=directory / "provider.log", ready="listening on "
        )
        found = _LISTENING.search(self.process.output)
        assert found
        self.url = found[1]
        self._client = httpx.Client(base_url=self.url, timeout=10)

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self._client.get("/stats?prompts=1").json()
        return stats

    def calls_of(self, text: str) -> int:
        """How many calls carried this chat prompt."""
        key = prompt_hash([{"role": "user", "content": text}])
        return int(self.stats()["calls_by_prompt"].get(key, 0))

    def close(self) -> None:
        self._client.close()
        self.process.kill()


@contextmanager
def provider(directory: Path, *flags: str) -> Iterator[Provider]:
    running = Provider(directory, *flags)
    try:
        yield running
    finally:
        running.close()


def worker_environment(
    *, database_url: str, broker_url: str, config: Path, **settings: object
) -> dict[str, str]:
    """What a worker needs to know; `settings` by their lower-case names."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PROMPTFLEET_")}
    values = {
        "database_url": database_url,
        "broker_url": broker_url,
        "config": config,
        "lease_s": 2,
        "sweep_interval_s": 0.2,
        **settings,
    }
    return own | {f"PROMPTFLEET_{name.upper()}": str(value) for name, value in values.items()}


def start_worker(
    tiers: Sequence[str], *options: str, name: str, env: Mapping[str, str], log: Path
) -> Process:
    """A Celery worker for these tiers, once it is ready."""
    queues = ",".join(f"prompts.{tier}" for tier in tiers)
    argv = [sys.executable, "-m", "celery", "-A", "promptfleet_workers.app", "worker"]
    usual = ["-Q", queues, "-n", f"{name}@%h", "--loglevel", "INFO"]
    return Process([*argv, *usual, *options], log=log, ready=" ready.", env=env)
