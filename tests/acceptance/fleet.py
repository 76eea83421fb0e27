"""The Procfile's workers under a supervisor, and what the database says of their jobs."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from sqlalchemy.exc import OperationalError
from tests.waiting import eventually

from promptfleet.dev_stack import Backoff, ChildExit, ChildSpec, Hooks, Supervisor
from promptfleet_shared.store.engines import make_engine

ROOT = Path(__file__).parents[2]
READY = re.compile(r"\bready\.")


def procfile_commands() -> dict[str, list[str]]:
    """The commands of the Procfile, by name."""
    lines = (ROOT / "Procfile").read_text(encoding="utf-8").splitlines()
    return {name: shlex.split(command) for name, command in (s.split(":", 1) for s in lines)}


def procfile_workers() -> dict[str, list[str]]:
    """The worker commands of the Procfile, by name."""
    commands = procfile_commands()
    return {name: argv for name, argv in commands.items() if name.startswith("worker_")}


class Fleet:
    """The Procfile's workers under a supervisor."""

    def __init__(
        self,
        env: Mapping[str, str],
        cwd: Path,
        commands: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Start `commands`, by default a worker a tier, and wait until they are ready."""
        self._said = io.StringIO()
        self.exits: list[ChildExit] = []
        self.supervisor = Supervisor(
            console=Console(file=self._said, width=10_000),
            backoff=Backoff(first_s=0.2, max_s=1.0),
            hooks=Hooks(on_exit=self.exits.append),
        )
        path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        self._env = {**env, "PATH": path}
        self._cwd = cwd
        self._commands = commands or procfile_workers()
        self.supervisor.start(*(self._spec(name, argv) for name, argv in self._commands.items()))
        self.wait_until_ready(len(self._commands))

    @property
    def output(self) -> str:
        return self._said.getvalue()

    def wait_until_ready(self, times: int) -> None:
        """Wait until workers have become ready so often, restarts included."""
        try:
            eventually(
                lambda: len(READY.findall(self.output)) >= times, "all are ready", timeout_s=60
            )
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.output[-4000:]}") from None

    def pid(self, name: str) -> int:
        (status,) = [s for s in self.supervisor.status() if s.name == name]
        assert status.pid is not None
        return status.pid

    def _spec(self, name: str, argv: Sequence[str]) -> ChildSpec:
        return ChildSpec(name=name, argv=argv, env=self._env, cwd=self._cwd)


class Watch:
    """What the database says of the jobs, whether it is there or not."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url, application_name="tests")

    def rows(self, statement: str, **parameters: object) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(statement), parameters))

    def finished(self) -> int:
        try:
            return int(self.rows("SELECT count(*) FROM results")[0][0])
        except OperationalError:
            return -1  # it is just being restarted
