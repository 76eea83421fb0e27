"""The HTTP API as a real process, and tenants with keys of their own."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from tests.processes import START_S, Process
from tests.waiting import eventually

from promptfleet_shared.store.keys import create_key

_LISTENING = re.compile(r"running on (http://[^\s\"]+)")
_numbers = itertools.count(1)


class ApiServer:
    """`promptfleet api` on a free port."""

    def __init__(self, directory: Path, env: Mapping[str, str], *flags: str) -> None:
        argv = [sys.executable, "-m", "promptfleet.cli", "api", "--port", "0", *flags]
        log = directory / f"api-{next(_numbers)}.log"
        self.process = Process(argv, log=log, ready="running on http://", env=env)
        found = _LISTENING.search(self.process.output)
        assert found
        self.url = found[1]
        try:  # with several processes, its socket is there before they are
            eventually(self._answers, "the API answers", timeout_s=START_S)
        except BaseException:
            self.stop()
            raise

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, **options)

    def stop(self) -> None:
        """Ask it to end, and its processes with it: they would outlive it if it were killed."""
        if self.process.running:
            self.process.terminate()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).is_success
        except httpx.TransportError:
            return False


@contextmanager
def api_server(directory: Path, env: Mapping[str, str], *flags: str) -> Iterator[ApiServer]:
    server = ApiServer(directory, env, *flags)
    try:
        yield server
    finally:
        server.stop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tenant:
    """A tenant that nobody else has, with a key for everything."""

    name: str
    key: str


def new_tenant(database: sa.Engine, *scopes: str) -> Tenant:
    name = f"tenant-{next(_numbers)}"
    with database.begin() as connection:
        made = create_key(
            connection, tenant=name, scopes=scopes or ("submit", "read", "admin"), name="tests"
        )
    return Tenant(name=name, key=made.secret)
