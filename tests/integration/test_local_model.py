"""The real model, served by the real process."""

from __future__ import annotations

import json
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from promptfleet.local_model import available
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Call, Completion

DEADLINE_S = 60.0
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ready = available()
    assert ready, ready.reason
    log = tmp_path_factory.mktemp("local-model") / "stderr"
    flags = ["--port", "0", "--slots", "2", "--ctx", "2048"]
    command = [sys.executable, "-m", "promptfleet.local_model", *flags]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], DEADLINE_S)[0], log.read_text()
            line = process.stdout.readline()
            found = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", line)
            assert found, (line, log.read_text())
            yield found.group(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=DEADLINE_S) as client:
        yield client


def test_chat_with_usage(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "What colour is grass? One word."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["model"] == MODEL
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["choices"][0]["finish_reason"] in {"stop", "length"}
    assert answer["usage"]["prompt_tokens"] > 5
    assert 1 <= answer["usage"]["completion_tokens"] <= 8


def test_chat_as_a_stream(client: httpx.Client) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count to three."}],
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    pieces = [delta["content"] for delta in deltas if delta.get("content")]
    assert len(pieces) > 1
    assert events[-1]["usage"]["completion_tokens"] <= 6


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [("openai", JobKind.CHAT), ("openai", JobKind.COMPLETION), ("anthropic", JobKind.CHAT)],
)
async def test_our_providers_get_the_same_streamed_and_whole(
    server: str, protocol: str, kind: JobKind
) -> None:
    client, heard = HttpClient(), list[str]()
    whole = await _ask(client, server, protocol, kind)
    streamed = await _ask(client, server, protocol, kind, stream=True, on_text=heard.append)
    await client.aclose()

    assert streamed.text == whole.text == "".join(heard)
    assert len(heard) > 1
    assert streamed.finish_reason == whole.finish_reason
    assert streamed.usage.output == whole.usage.output > 1
    assert streamed.usage.input == whole.usage.input > 1
    assert _fields(orjson.loads(whole.response)) <= _fields(orjson.loads(streamed.response))


async def _ask(
    client: HttpClient, server: str, protocol: str, kind: JobKind, **options: Any
) -> Completion:
    deployment = Deployment(provider=protocol, base_url=f"{server}/v1")
    asked: dict[str, object] = {"messages": [{"role": "user", "content": "Count to five."}]}
    if kind is JobKind.COMPLETION:
        asked = {"prompt": "One, two,"}
    request = {"max_tokens": 12, "temperature": 0, **asked}
    call = Call(
        kind=kind,
        model=MODEL,
        requests=[orjson.dumps(request).decode()],
        input_tokens=[5],
        timeouts=TimeoutOptions(),
        **options,
    )
    [answer] = await build_provider(deployment, client).call(call)
    assert isinstance(answer, Completion)
    return answer


def _fields(value: Any, path: str = "") -> set[str]:
    """The paths of all that a response says; its timings differ, and no null says anything."""
    if isinstance(value, dict):
        inner = [_fields(item, f"{path}.{key}") for key, item in value.items() if key != "timings"]
        return set().union(*inner)
    if isinstance(value, list):
        return set().union(*(_fields(item, f"{path}[]") for item in value))
    return set() if value is None else {path}


def test_list_of_prompts(client: httpx.Client) -> None:
    prompts = ["The sky is", "Two plus two is"]
    body = {"model": MODEL, "prompt": prompts, "max_tokens": 4, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1]
    assert all(choice["text"] for choice in answer["choices"])


def test_a_second_server_on_the_port_fails_with_a_sentence(server: str) -> None:
    command = [sys.executable, "-m", "promptfleet.local_model", "--port", server.rpartition(":")[2]]
    ended = subprocess.run(
        [*command, "--ctx", "512", "--slots", "1"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 1
    assert "cannot serve the local model on port" in ended.stderr


def test_without_the_packages_it_says_what_to_install() -> None:
    hidden = (
        "import importlib.util, runpy, sys\n"
        "importlib.util.find_spec = lambda name, *rest: None\n"
        "from promptfleet.local_model import main\n"
        "sys.exit(main([]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", hidden],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 1
    assert "pip install xllamacpp" in ended.stderr


def test_a_model_file_that_is_missing() -> None:
    ready = available(Path("no-such-file.gguf"))
    assert not ready
    assert "no-such-file.gguf" in (ready.reason or "")
