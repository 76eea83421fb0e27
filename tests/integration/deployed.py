"""The deployment files as data, and their commands as plain processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from promptfleet.dev_stack import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 60.0
STOP_S = 45.0
_VARIABLE = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


def read_env_file(text: str) -> dict[str, str]:
    """The variables of an env file, those without a value included."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def variables_of(text: str) -> set[str]:
    """The variables that a compose file asks of its environment."""
    return {match[1] for match in _VARIABLE.finditer(text)}


def compose(environment: Mapping[str, str]) -> dict[str, Any]:
    """docker-compose.yml as Compose reads it: anchors, merges and variables resolved."""

    def value(match: re.Match[str]) -> str:
        name, mark, rest = match[1], match[2], match[3]
        found = environment.get(name)
        if not found and mark == "?":
            raise KeyError(f"{name} {rest}")
        return found or rest or ""

    def resolve(node: Any) -> Any:
        if isinstance(node, str):
            text = _VARIABLE.sub(value, node)
            return int(text) if text != node and text.isdecimal() else text
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if isinstance(node, dict):
            return {name: resolve(item) for name, item in node.items()}
        return node

    resolved: dict[str, Any] = resolve(
        yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    )
    return resolved


def dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continuation lines joined."""
    text = (ROOT / "infra/Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines() if line.strip())
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def copied_into_image() -> list[tuple[str, str]]:
    """Pairs of a path in the repository and where the Dockerfile puts it."""
    pairs = []
    for name, rest in dockerfile():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, target = shlex.split(rest)
            for source in sources:
                path = f"{target}{Path(source).name}" if target.endswith("/") else target
                pairs.append((source, path))
    return pairs


def in_checkout(text: str) -> str:
    """A word of a command with the image's paths replaced by what was copied there."""
    for source, target in copied_into_image():
        if target.startswith("/etc/"):
            text = text.replace(target, str(ROOT / source))
    return text


class Process:
    """A command of the deployment, started as it stands."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PROMPTFLEET_")}
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                env={**inherited, "PATH": path, **environment},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout_s: float = START_S) -> int:
        """Its exit status, once it ends by itself."""
        return self._process.wait(timeout_s)

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        """What `ready` returns once that is true, while the process lives."""
        deadline = time.monotonic() + START_S
        while not (found := ready()):
            assert time.monotonic() < deadline, f"no {what} in {START_S} s:\n{self.output()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.1)
                raise AssertionError(f"ended with {code} before {what}:\n{self.output()}")
        return found

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it by force if it still lives."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def started(
    commands: Mapping[str, Sequence[str]], environments: Mapping[str, Mapping[str, str]], logs: Path
) -> Iterator[dict[str, Process]]:
    """Processes by name; none of them outlives the block."""
    processes: dict[str, Process] = {}
    try:
        for name, command in commands.items():
            log = logs / f"{name}.log"
            processes[name] = Process(command, environments[name], log)
        yield processes
    finally:
        for process in processes.values():
            process.kill()


@contextlib.contextmanager
def simulated_fleet(tmp_path: Path, tiers: Sequence[str]) -> Iterator[Path]:
    """A fleet.toml whose models are answered by our simulated provider."""
    port = free_port()
    command = ["python", "-m", "promptfleet_workers.providers.simulated", "--port", str(port)]
    with started({"provider": command}, {"provider": {}}, tmp_path) as processes:
        provider = processes["provider"]
        provider.until(lambda: "listening on" in provider.output(), "provider")
        path = tmp_path / "fleet.toml"
        sections = "".join(f'[tiers.{tier}]\nmodels = ["simulated"]\n' for tier in tiers)
        path.write_text(
            f'{sections}[models.simulated]\nprice_as = "free"\n'
            f'[[models.simulated.deployments]]\nbase_url = "http://127.0.0.1:{port}/v1"\n',
            encoding="utf-8",
        )
        yield path


def get(url: str, *, login: str | None = None) -> str | None:
    """The body of a page; None while nobody answers well."""
    request = urllib.request.Request(url)  # noqa: S310 - http:// of our own
    if login is not None:
        request.add_header("Authorization", "Basic " + b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310
            body: bytes = response.read()
    except OSError:
        return None
    return body.decode()


def get_json(url: str, *, login: str | None = None) -> Any:
    """The JSON of a page; None while nobody answers well."""
    body = get(url, login=login)
    return None if body is None else json.loads(body)
