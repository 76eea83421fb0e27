"""The simulated provider as a real process, spoken to over real sockets."""

from __future__ import annotations

import base64
import json
import math
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from promptfleet_workers.providers.simulated.answers import prompt_hash

DEADLINE_S = 10.0
DEFAULTS: dict[str, object] = {
    "latency_ms": 0,
    "first_token_ms": 0,
    "tokens_per_s": 0,
    "output_tokens": 16,
    "seed": 0,
    "errors": "",
    "slow_ms": 5000,
    "rpm": 0,
    "tpm": 0,
    "max_concurrent": 0,
    "limit_window_s": 60,
    "limit_kind": "window",
    "api_key": None,
    "models": [],
    "reset": True,
}


@contextmanager
def running(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "promptfleet_workers.providers.simulated", "--port", "0"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], DEADLINE_S)[0], "it never listened"
            line = process.stdout.readline()
            found = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line
            yield process, found.group(1)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as (process, url):
        yield url
        assert process.poll() is None, "the provider died during the tests"


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=DEADLINE_S) as client:
        assert client.post("/control", json=DEFAULTS).status_code == 200
        yield client


def chat(client: httpx.Client, text: str, **fields: object) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
    return client.post("/v1/chat/completions", json=body)


def stats(client: httpx.Client, query: str = "") -> dict[str, Any]:
    answer: dict[str, Any] = client.get("/stats" + query).json()
    return answer


def control(client: httpx.Client, **changes: object) -> None:
    response = client.post("/control", json=changes)
    assert response.status_code == 200, response.text


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        threading.Event().wait(0.01)


def data_events(text: str) -> list[Any]:
    lines = [line[len("data: ") :] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@contextmanager
def connection(client: httpx.Client) -> Iterator[socket.socket]:
    address = ("127.0.0.1", client.base_url.port or 0)
    with socket.create_connection(address, timeout=DEADLINE_S) as raw:
        yield raw


def read_until_closed(raw: socket.socket) -> bytes:
    received = b""
    while piece := raw.recv(65536):
        received += piece
    return received


def read_until(raw: socket.socket, condition: Callable[[bytes], bool]) -> bytes:
    received = b""
    while not condition(received):
        piece = raw.recv(65536)
        assert piece, f"closed after {received!r}"
        received += piece
    return received


def raw_chat(
    text: str, *, headers: bytes = b"", version: bytes = b"1.1", **fields: object
) -> bytes:
    fields = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
    body = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/%b\r\nhost: x\r\ncontent-length: %d\r\n%b\r\n"
    return head % (version, len(body), headers) + body


class TestChat:
    def test_answer_and_usage_are_consistent_and_repeatable(self, client: httpx.Client) -> None:
        first = chat(client, "What is a lighthouse?").json()
        second = chat(client, "What is a lighthouse?").json()

        text = first["choices"][0]["message"]["content"]
        assert "lighthouse" in text
        assert first["object"] == "chat.completion"
        assert first["model"] == "m"
        assert first["choices"][0]["finish_reason"] == "stop"
        assert first["usage"] == {
            "prompt_tokens": math.ceil(len("What is a lighthouse?") / 4),
            "completion_tokens": len(text.split()),
            "total_tokens": math.ceil(len("What is a lighthouse?") / 4) + len(text.split()),
        }
        assert second["choices"] == first["choices"]
        assert second["id"] != first["id"]

    def test_max_tokens_cuts_the_answer(self, client: httpx.Client) -> None:
        answer = chat(client, "Tell me a story", max_tokens=4).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 4
        assert len(answer["choices"][0]["message"]["content"].split()) == 4

    def test_output_tokens_sets_the_length(self, client: httpx.Client) -> None:
        control(client, output_tokens=100)
        assert chat(client, "short").json()["usage"]["completion_tokens"] == 100

    def test_content_parts_count_their_text_only(self, client: httpx.Client) -> None:
        parts = [
            {"type": "text", "text": "x" * 40},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}},
        ]
        body = {"model": "m", "messages": [{"role": "user", "content": parts}]}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == 10

    def test_json_mode_answers_json(self, client: httpx.Client) -> None:
        answer = chat(client, "hello", response_format={"type": "json_object"}).json()
        assert "answer" in json.loads(answer["choices"][0]["message"]["content"])

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [1]}, "messages"),
            ({"model": None}, "model"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"n": 1000}, "n"),
        ],
    )
    def test_a_wrong_field_is_named(
        self, client: httpx.Client, change: dict[str, object], param: str
    ) -> None:
        response = chat(client, "hello", **change)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}

    def test_stream_has_the_same_text_and_usage(self, client: httpx.Client) -> None:
        whole = chat(client, "Stream this, please").json()
        response = chat(
            client, "Stream this, please", stream=True, stream_options={"include_usage": True}
        )
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("data: [DONE]\n\n")
        events = data_events(response.text)
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == whole["choices"][0]["message"]["content"]
        assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]][-1] == "stop"
        assert events[-1]["choices"] == []
        assert events[-1]["usage"] == whole["usage"]

    def test_stream_without_include_usage_has_none(self, client: httpx.Client) -> None:
        events = data_events(chat(client, "Stream this", stream=True).text)
        assert all(event["usage"] is None for event in events)

    def test_stream_arrives_token_by_token(self, client: httpx.Client) -> None:
        control(client, first_token_ms=50, tokens_per_s=50, output_tokens=6)
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            times = [time.monotonic() for line in response.iter_lines() if '"content":' in line]
        assert len(times) == 1 + 6  # the role's event, too
        assert times[-1] - times[0] >= 0.05 + 5 * 0.02 - 0.01
        assert len({round(moment, 3) for moment in times}) >= 6


class TestOtherEndpoints:
    def test_completions_of_a_list(self, client: httpx.Client) -> None:
        body = {"model": "m", "prompt": ["first one", "second"], "max_tokens": 50}
        answer = client.post("/v1/completions", json=body).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert "first" in answer["choices"][0]["text"]
        assert "second" in answer["choices"][1]["text"]
        words = sum(len(choice["text"].split()) for choice in answer["choices"])
        assert answer["usage"] == {
            "prompt_tokens": 3 + 2,
            "completion_tokens": words,
            "total_tokens": 5 + words,
        }
        assert stats(client)["prompts"] == 2

    def test_completions_of_one_text_and_as_a_stream(self, client: httpx.Client) -> None:
        body = {"model": "m", "prompt": "only one"}
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        events = data_events(client.post("/v1/completions", json={**body, "stream": True}).text)
        assert "".join(event["choices"][0]["text"] for event in events) == whole

    def test_embeddings_are_unit_vectors_that_the_text_decides(self, client: httpx.Client) -> None:
        body = {"model": "m", "input": ["one", "two", "one"]}
        answer = client.post("/v1/embeddings", json=body).json()
        one, two, again = (row["embedding"] for row in answer["data"])
        assert len(one) == 64
        assert math.isclose(math.hypot(*one), 1, abs_tol=1e-5)
        assert one == again
        assert one != two
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}

    def test_embeddings_with_dimensions_and_base64(self, client: httpx.Client) -> None:
        body = {"model": "m", "input": "one", "dimensions": 8}
        plain = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        body["encoding_format"] = "base64"
        packed = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        assert list(struct.unpack("<8f", base64.b64decode(packed))) == pytest.approx(plain)

    def test_messages(self, client: httpx.Client) -> None:
        body = {"model": "c", "max_tokens": 3, "messages": [{"role": "user", "content": "hi you"}]}
        answer = client.post("/v1/messages", json=body).json()
        assert answer["type"] == "message"
        assert answer["content"][0]["type"] == "text"
        assert answer["stop_reason"] == "max_tokens"
        assert answer["usage"] == {"input_tokens": 2, "output_tokens": 3}

    def test_messages_as_a_stream(self, client: httpx.Client) -> None:
        body = {"model": "c", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
        whole = client.post("/v1/messages", json=body).json()
        events = data_events(client.post("/v1/messages", json={**body, "stream": True}).text)
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
        assert text == whole["content"][0]["text"]
        assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]

    def test_messages_have_errors_in_their_own_shape(self, client: httpx.Client) -> None:
        body = {"model": "c", "messages": [{"role": "user", "content": "hi"}]}
        response = client.post("/v1/messages", json=body)
        assert response.status_code == 400
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "invalid_request_error"

    def test_models_and_health(self, client: httpx.Client) -> None:
        control(client, models="a,b")
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["a", "b"]
        assert client.get("/health").status_code == 200
        response = chat(client, "x")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert chat(client, "x", model="b").status_code == 200

    def test_unknown_path_and_method(self, client: httpx.Client) -> None:
        assert client.get("/v2/nothing").status_code == 404
        assert client.get("/v1/chat/completions").status_code == 405
        assert client.delete("/stats").status_code == 405
        assert client.head("/health").headers["connection"] == "close"
        assert client.get("/health").json() == {"status": "ok"}

    def test_api_key(self, client: httpx.Client) -> None:
        control(client, api_key="secret")
        refused = chat(client, "x")
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        client.headers["authorization"] = "Bearer secret"
        assert chat(client, "x").status_code == 200
        del client.headers["authorization"]
        client.headers["x-api-key"] = "secret"
        assert chat(client, "x").status_code == 200


class TestMarkers:
    def test_status_times_and_retry_after(self, client: httpx.Client) -> None:
        prompt = "please [[sim:status=429,retry-after-ms=200,times=2]]"
        first = chat(client, prompt)
        assert first.status_code == 429
        assert first.headers["retry-after-ms"] == "200"
        assert first.headers["retry-after"] == "1"
        assert first.json()["error"]["code"] == "rate_limit_exceeded"
        assert chat(client, prompt).status_code == 429
        third = chat(client, prompt)
        assert third.status_code == 200
        assert "[[" not in third.text
        seen = stats(client, "?prompts=1")
        key = prompt_hash([{"role": "user", "content": prompt}])
        assert seen["calls_by_prompt"] == {key: 3}
        assert seen["failures_by_prompt"] == {key: 2}

    def test_status_with_a_code(self, client: httpx.Client) -> None:
        response = chat(client, "[[sim:status=400,code=context_length_exceeded]]")
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"

    def test_text_finish_and_output_tokens(self, client: httpx.Client) -> None:
        choice = chat(client, "[[sim:finish=length,text=one, two]]").json()["choices"][0]
        assert choice["message"]["content"] == "one, two"
        assert choice["finish_reason"] == "length"
        answer = chat(client, "[[sim:output-tokens=40]] words")
        assert answer.json()["usage"]["completion_tokens"] == 40

    def test_latency(self, client: httpx.Client) -> None:
        began = time.monotonic()
        assert chat(client, "[[sim:latency-ms=150]]").status_code == 200
        assert time.monotonic() - began >= 0.15

    def test_hang_lasts_until_the_client_leaves(self, client: httpx.Client) -> None:
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/v1/completions", json={"model": "m", "prompt": "[[sim:hang]]"}, timeout=0.2
            )
        wait_until(lambda: stats(client)["in_flight"] == 0, "the hung call ends")
        assert stats(client)["client_disconnects"] == 1

    def test_disconnect_and_truncate(self, client: httpx.Client) -> None:
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            chat(client, "[[sim:disconnect]]")
        with pytest.raises(httpx.RemoteProtocolError):
            chat(client, "[[sim:truncate]]")
        with pytest.raises(httpx.RemoteProtocolError):
            chat(client, "[[sim:truncate]]", stream=True)

    def test_html(self, client: httpx.Client) -> None:
        response = chat(client, "[[sim:html]]")
        assert response.status_code == 502
        assert response.headers["content-type"] == "text/html"
        assert chat(client, "[[sim:html,status=200]]").status_code == 200

    def test_slow_trickles_a_whole_answer(self, client: httpx.Client) -> None:
        control(client, slow_ms=180)
        began = time.monotonic()
        assert chat(client, "[[sim:slow]]").json()["choices"]
        assert time.monotonic() - began >= 0.18

    @pytest.mark.parametrize("marker", ["statsu=400", "status=99", "status=200", "times=x"])
    def test_a_marker_that_means_nothing_is_an_error(
        self, client: httpx.Client, marker: str
    ) -> None:
        response = chat(client, f"[[sim:{marker}]]")
        assert response.status_code == 400
        assert "[[sim:" in response.json()["error"]["message"]

    def test_a_failing_prompt_fails_its_list(self, client: httpx.Client) -> None:
        body = {"model": "m", "prompt": ["fine", "[[sim:status=503,times=1]]"]}
        assert client.post("/v1/completions", json=body).status_code == 503
        assert client.post("/v1/completions", json=body).status_code == 200


class TestErrorMix:
    def outcomes(self, client: httpx.Client) -> list[int]:
        return [chat(client, f"prompt {number}").status_code for number in range(200)]

    def test_fractions_hold_and_the_seed_repeats_them(self, client: httpx.Client) -> None:
        control(client, errors="429:0.2,500:0.1", seed=7)
        first = self.outcomes(client)
        assert 20 <= first.count(429) <= 60
        assert 5 <= first.count(500) <= 40
        assert first.count(200) >= 100
        control(client, reset=True)
        assert self.outcomes(client) == first
        control(client, reset=True, seed=8)
        assert self.outcomes(client) != first

    def test_every_kind(self, client: httpx.Client) -> None:
        control(client, errors={"html": 1})
        assert chat(client, "x").status_code == 502
        control(client, errors={"disconnect": 1})
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            chat(client, "x")
        control(client, errors={"truncate": 1})
        with pytest.raises(httpx.RemoteProtocolError):
            chat(client, "x")
        control(client, errors={"timeout": 1})
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"model": "m", "prompt": "x"}, timeout=0.1)
        control(client, errors={"slow": 1}, slow_ms=50)
        assert chat(client, "x").status_code == 200
        faults = stats(client)["faults"]
        assert faults == {"html": 1, "disconnect": 1, "truncate": 1, "timeout": 1, "slow": 1}

    def test_latency_spread_is_seeded(self, client: httpx.Client) -> None:
        control(client, latency_ms="20..60")
        began = time.monotonic()
        for number in range(5):
            chat(client, f"prompt {number}")
        assert time.monotonic() - began >= 5 * 0.02


class TestRateLimits:
    def test_rpm_is_strict_and_comes_back(self, client: httpx.Client) -> None:
        control(client, rpm=3, limit_window_s=0.8)
        first = chat(client, "x")
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-requests"].endswith("ms")
        codes = [chat(client, "x").status_code for _ in range(5)]
        assert codes[:2] == [200, 200]
        assert 429 in codes
        refused = chat(client, "x")
        if refused.status_code == 200:  # the window had just moved on: fill it again
            while (refused := chat(client, "x")).status_code == 200:
                pass
        error = refused.json()["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert error["type"] == "requests"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        wait_ms = int(refused.headers["retry-after-ms"])
        assert 1 <= wait_ms <= 801
        threading.Event().wait(wait_ms / 1000)
        assert chat(client, "x").status_code == 200

    def test_no_window_admits_more_than_the_limit(self, client: httpx.Client) -> None:
        control(client, rpm=10, limit_window_s=0.3)
        admitted = []
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            sent = time.monotonic()
            if chat(client, "x").status_code == 200:
                admitted.append((sent, time.monotonic()))
        assert len(admitted) > 10
        # Each was admitted between being sent and being answered: eleven that surely fell into
        # one window are a breach.
        for (sent, _), (_, answered) in zip(admitted, admitted[10:], strict=False):
            assert answered - sent >= 0.3

    def test_a_bucket_is_full_at_the_start_and_filled_all_the_time(
        self, client: httpx.Client
    ) -> None:
        control(client, rpm=20, limit_window_s=60, limit_kind="bucket")
        codes = [chat(client, "hi").status_code for _ in range(40)]
        assert codes[:20] == [200] * 20
        assert 429 in codes
        while (refused := chat(client, "hi")).status_code == 200:
            pass
        assert 0 < int(refused.headers["retry-after-ms"]) <= 3001  # a twentieth of the window
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"

    def test_tpm(self, client: httpx.Client) -> None:
        control(client, tpm=40)
        assert chat(client, "x" * 40, max_tokens=4).status_code == 200
        assert (stats(client)["input_tokens"], stats(client)["output_tokens"]) == (10, 4)
        headers = chat(client, "[[sim:text=a]]").headers
        used = stats(client)["input_tokens"] + stats(client)["output_tokens"]
        assert headers["x-ratelimit-remaining-tokens"] == str(40 - used)
        refused = chat(client, "y" * 160)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "tokens"

    def test_concurrency(self, client: httpx.Client) -> None:
        control(client, max_concurrent=2)
        with ThreadPoolExecutor(2) as pool:
            slow = [pool.submit(chat, client, "[[sim:latency-ms=400]]") for _ in range(2)]
            wait_until(lambda: stats(client)["in_flight"] == 2, "two calls are in flight")
            assert chat(client, "x").status_code == 429
            assert [call.result().status_code for call in slow] == [200, 200]
        assert chat(client, "x").status_code == 200
        assert stats(client)["max_in_flight"] == 2
        assert stats(client)["rejected"] == {"429": 1}


class TestControlAndStats:
    def test_control_shows_and_changes(self, client: httpx.Client) -> None:
        control(client, latency_ms=5, errors="429:0.5,html:0.25")
        shown = client.get("/control").json()
        assert shown["latency_ms"] == "5..5"
        assert shown["errors"] == {"429": 0.5, "html": 0.25}

    @pytest.mark.parametrize(
        "change",
        [
            {"latency": 5},
            {"latency_ms": "fast"},
            {"latency_ms": "9..1"},
            {"errors": "429:0.9,500:0.2"},
            {"errors": "teapot:0.1"},
            {"rpm": -1},
            {"tpm": 1.5},
            {"models": 3},
            {"tokens_per_s": "nan"},
        ],
    )
    def test_a_wrong_option_is_named_and_changes_nothing(
        self, client: httpx.Client, change: dict[str, object]
    ) -> None:
        before = client.get("/control").json()
        response = client.post("/control", json={"output_tokens": 99, **change})
        assert response.status_code == 400
        assert next(iter(change)) in response.json()["error"]["message"]
        assert client.get("/control").json() == before

    def test_stats_count_and_reset(self, client: httpx.Client) -> None:
        chat(client, "a")
        chat(client, "a")
        client.post("/v1/embeddings", json={"model": "m", "input": ["p", "q"]})
        seen = stats(client, "?prompts=1")
        assert seen["requests"] == {"/v1/chat/completions": 2, "/v1/embeddings": 1}
        assert seen["prompts"] == 4
        assert seen["calls_by_prompt"] == {
            prompt_hash([{"role": "user", "content": "a"}]): 2,
            prompt_hash("p"): 1,
            prompt_hash("q"): 1,
        }
        control(client, reset=True)
        assert stats(client)["requests"] == {}
        assert "calls_by_prompt" not in stats(client)


class TestHttp:
    def test_pipelined_requests_are_answered_in_order(self, client: httpx.Client) -> None:
        texts = ["[[sim:latency-ms=80,text=first]]", "[[sim:text=second]]", "[[sim:text=third]]"]
        with connection(client) as raw:
            raw.sendall(b"".join(raw_chat(text) for text in texts))
            received = read_until(raw, lambda got: got.count(b'"usage"') == 3)
        places = [received.index(word) for word in (b"first", b"second", b"third")]
        assert places == sorted(places)

    def test_many_pipelined_requests(self, client: httpx.Client) -> None:
        with connection(client) as raw:
            sender = threading.Thread(target=raw.sendall, args=(raw_chat("x") * 2000,))
            sender.start()
            read_until(raw, lambda got: got.count(b"HTTP/1.1 200 OK") == 2000)
            sender.join()

    def test_a_request_in_single_bytes(self, client: httpx.Client) -> None:
        with connection(client) as raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in raw_chat("slowly", headers=b"connection: close\r\n"):
                raw.sendall(bytes([byte]))
            assert b"slowly" in read_until_closed(raw)

    def test_chunked_request_body(self, client: httpx.Client) -> None:
        body = json.dumps({"model": "m", "prompt": "in pieces"}).encode()
        response = client.post("/v1/completions", content=iter([body[:10], body[10:20], body[20:]]))
        assert response.request.headers["transfer-encoding"] == "chunked"
        assert "pieces" in response.json()["choices"][0]["text"]

    def test_expect_continue(self, client: httpx.Client) -> None:
        request = raw_chat("x", headers=b"expect: 100-continue\r\n")
        head, _, body = request.partition(b"\r\n\r\n")
        with connection(client) as raw:
            raw.sendall(head + b"\r\n\r\n")
            assert read_until(raw, lambda got: got.endswith(b"\r\n\r\n")).startswith(
                b"HTTP/1.1 100 Continue"
            )
            raw.sendall(body)
            assert read_until(raw, lambda got: b'"usage"' in got).startswith(b"HTTP/1.1 200 OK")

    def test_http_1_0_gets_a_stream_without_chunks(self, client: httpx.Client) -> None:
        with connection(client) as raw:
            raw.sendall(raw_chat("x", version=b"1.0", stream=True))
            received = read_until_closed(raw)
        assert b"chunked" not in received
        assert received.endswith(b"data: [DONE]\n\n")

    @pytest.mark.parametrize(
        ("request_bytes", "status"),
        [
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS greeting\r\n\r\n", 400),
            (b"GET / HTTP/9.9\r\n\r\n", 400),
            (b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nx: " + b"a" * 200_000, 431),
            (b"GET /" + b"a" * 200_000, 431),
        ],
        ids=["tls", "version", "length", "header", "target"],
    )
    def test_garbage_is_refused(
        self, client: httpx.Client, request_bytes: bytes, status: int
    ) -> None:
        with connection(client) as raw:
            sender = threading.Thread(target=send_ignoring_errors, args=(raw, request_bytes))
            sender.start()
            received = read_until(raw, lambda got: b"\r\n\r\n" in got)
            sender.join()
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert client.get("/health").status_code == 200

    def test_garbage_after_a_slow_request_comes_after_its_answer(
        self, client: httpx.Client
    ) -> None:
        with connection(client) as raw:
            raw.sendall(raw_chat("[[sim:latency-ms=60]]") + b"\x00\x01garbage\r\n\r\n")
            received = read_until_closed(raw)
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert received.count(b"HTTP/1.1 400") == 1

    def test_a_body_over_the_limit_is_refused(self, client: httpx.Client) -> None:
        with connection(client) as raw:
            raw.sendall(b"POST /control HTTP/1.1\r\ncontent-length: 40000000\r\n\r\n")
            sender = threading.Thread(target=send_ignoring_errors, args=(raw, b" " * 40_000_000))
            sender.start()
            received = read_until(raw, lambda got: b"\r\n\r\n" in got)
            sender.join()
        assert received.startswith(b"HTTP/1.1 413 ")
        assert client.get("/health").status_code == 200

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"null", b'"\\ud800"', b"[" * 100_000, b"\xff\xfe"],
    )
    def test_a_body_that_is_no_object(self, client: httpx.Client, body: bytes) -> None:
        for path in ("/v1/chat/completions", "/v1/messages", "/control"):
            response = client.post(path, content=body)
            assert response.status_code == 400, path
            assert response.json()["error"]["message"]

    def test_deeply_nested_content(self, client: httpx.Client) -> None:
        nested = b'{"model":"m","messages":[{"role":"user","content":%b1%b}]}'
        body = nested % (b"[" * 500, b"]" * 500)
        assert client.post("/v1/chat/completions", content=body).status_code == 400

    def test_a_client_that_leaves_early(self, client: httpx.Client) -> None:
        with connection(client) as raw:
            raw.sendall(raw_chat("[[sim:latency-ms=60000]]"))
            wait_until(lambda: stats(client)["in_flight"] == 1, "the call is in flight")
        wait_until(lambda: stats(client)["in_flight"] == 0, "the call is given up")


class TestProcess:
    def test_flags_and_a_graceful_end(self) -> None:
        flags = ["--latency-ms", "1000", "--output-tokens", "5", "--models", "a,b"]
        with (
            running(*flags) as (process, url),
            httpx.Client(base_url=url, timeout=DEADLINE_S) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            call = pool.submit(chat, client, "x", model="a")
            with httpx.Client(base_url=url) as other:
                wait_until(lambda: stats(other)["in_flight"] == 1, "the call is in flight")
            process.send_signal(signal.SIGTERM)
            assert call.result().json()["usage"]["completion_tokens"] == 5
            assert process.wait(DEADLINE_S) == 0

    def test_a_wrong_flag_is_named(self) -> None:
        command = [sys.executable, "-m", "promptfleet_workers.providers.simulated"]
        ended = subprocess.run(
            [*command, "--errors", "429:2"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ended.returncode == 2
        assert "errors" in ended.stderr

    def test_a_port_in_use_is_named(self, server: str) -> None:
        port = server.rpartition(":")[2]
        command = [sys.executable, "-m", "promptfleet_workers.providers.simulated"]
        ended = subprocess.run(
            [*command, "--port", port], capture_output=True, text=True, timeout=30, check=False
        )
        assert ended.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr


def send_ignoring_errors(raw: socket.socket, data: bytes) -> None:
    try:
        raw.sendall(data)
    except OSError:
        return  # the server has refused and closed before it had everything
