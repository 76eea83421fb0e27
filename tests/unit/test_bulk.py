"""Files of prompts, without servers: what lines mean, and how a run finds its way back."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from promptfleet.bulk.files import LineNumbers, RowFile, fingerprint
from promptfleet.bulk.lines import MAX_LINE_BYTES, PromptLine, RawLine, parse_line, read_lines
from promptfleet.bulk.submission import CHUNK, Counts, Run, Submission
from promptfleet.client import Client
from promptfleet.testing import fake_fleet
from promptfleet_shared.errors import (
    ConfigurationError,
    InvalidRequestError,
    PromptFleetError,
    ProviderError,
    StoreUnavailableError,
)


def parse(value: object, *, keep_model: bool = True) -> PromptLine:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_line(RawLine(number=3, content=content), keep_model=keep_model)


def raw_lines(*values: object) -> Iterator[RawLine]:
    text = "".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values)
    return read_lines(io.BytesIO(text.encode()))


@pytest.mark.parametrize(
    ("value", "item", "custom_id"),
    [
        ("hello", {"prompt": "hello"}, None),
        ({"prompt": "p", "tier": "basic", "custom_id": "a"}, {"prompt": "p", "tier": "basic"}, "a"),
        ({"prompt": "p", "id": 7}, {"prompt": "p"}, 7),
        ({"messages": [{"role": "user"}]}, {"messages": [{"role": "user"}]}, None),
        (
            {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
            {"prompt": "first", "metadata": {"category": "writing"}},
            81,
        ),
        (
            {
                "custom_id": "r-1",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": [], "max_completion_tokens": 9},
            },
            {"messages": [], "kind": "chat", "model": "m", "max_tokens": 9},
            "r-1",
        ),
        (
            {"custom_id": "e", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}},
            {"prompt": "x", "kind": "embedding", "model": "m"},
            "e",
        ),
    ],
)
def test_every_form_of_a_line(value: object, item: dict[str, Any], custom_id: object) -> None:
    line = parse(value)
    assert line.item == item
    assert line.custom_id == custom_id
    assert line.number == 3


def test_a_tier_of_the_command_line_replaces_the_model_of_a_batch_line() -> None:
    value = {"custom_id": "r", "body": {"model": "gpt-4o", "messages": []}}
    assert "model" not in parse(value, keep_model=False).item


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{nope", "not JSON"),
        (b'"\xff"', "not JSON"),
        (7, "JSON string or object"),
        ([], "JSON string or object"),
        ({"prompt": "p", "id": [1]}, "id: must be"),
        ({"custom_id": "a", "body": []}, "body: must be an object"),
        ({"custom_id": "a", "url": "/v1/files", "body": {}}, "url: must be one of"),
        ({"custom_id": "a", "method": "GET", "body": {"messages": []}}, "method"),
        ({"custom_id": "a", "body": {}}, "body.messages: is missing"),
        ({"custom_id": "a", "body": {"messages": [], "stream": True}}, "does not stream"),
        ({"question_id": 1, "turns": []}, "turns"),
    ],
)
def test_a_line_that_is_none_says_why(value: object, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        parse(value)


def test_lines_are_numbered_as_an_editor_does_and_blank_ones_left_out() -> None:
    lines = list(read_lines(io.BytesIO(b'\xef\xbb\xbf"a"\n\n  \n"b"\r\n"c"')))
    assert [line.number for line in lines] == [1, 4, 5]
    assert [parse(line.content).item["prompt"] for line in lines] == ["a", "b", "c"]


def test_a_line_without_end_is_not_kept_in_memory() -> None:
    text = b"x" * (MAX_LINE_BYTES + 10) + b'\n"next"\n'
    first, second = read_lines(io.BytesIO(text))
    assert first == RawLine(number=1, content=None)
    assert second.content == b'"next"\n'
    with pytest.raises(InvalidRequestError, match="longer than"):
        parse_line(first, keep_model=True)


def test_line_numbers_are_a_set() -> None:
    numbers = LineNumbers()
    for number in (1, 8, 70_001, 8):
        numbers.add(number)
    assert len(numbers) == 3
    assert [n for n in (0, 1, 7, 8, 9, 70_000, 70_001, 10**9) if n in numbers] == [1, 8, 70_001]


def test_a_fingerprint_is_of_content_and_options_and_counts_lines() -> None:
    def of(content: bytes, salt: bytes = b"") -> tuple[str, int]:
        found = fingerprint(io.BytesIO(content), salt)
        return found.digest, found.lines

    assert of(b"a\nb") == of(b"a\nb")
    assert of(b"a\nb")[1] == of(b"a\nb\n")[1] == 2
    assert of(b"")[1] == 0
    assert len({of(b"a")[0], of(b"b")[0], of(b"a", b"s")[0]}) == 3


def test_a_row_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"line":1}\n{"line":2,"text":"' + b"x" * 200_000)
    rows = RowFile(path)
    assert [row["line"] for row in rows.rows()] == [1]
    rows.append([{"line": 3}])
    assert [row["line"] for row in rows.rows()] == [1, 3]
    rows.close()


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = RowFile(tmp_path / "rows.jsonl")
    with pytest.raises(PromptFleetError, match="another process"):
        RowFile(tmp_path / "rows.jsonl")
    first.close()
    RowFile(tmp_path / "rows.jsonl").close()


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n", encoding="utf-8")
    rows = RowFile(path)
    with pytest.raises(ConfigurationError, match=r"notes\.txt:1"):
        list(rows.rows())
    rows.close()
    assert path.read_text(encoding="utf-8") == "dear diary\n"


class Bench:
    """Starts of runs on the same two files."""

    def __init__(self, folder: Path) -> None:
        self.results_path = folder / "results.jsonl"
        self.errors_path = folder / "errors.jsonl"
        self.seen: list[Counts] = []
        self.slept: list[float] = []

    def go(self, client: Any, lines: Iterator[RawLine], **options: Any) -> Counts:
        run = Run(**{"id": "run-1", **options})
        results, errors = RowFile(self.results_path), RowFile(self.errors_path)
        try:
            submission = Submission(
                client,
                run,
                results=results,
                errors=errors,
                on_progress=self.seen.append,
                sleep=self.slept.append,
            )
            return submission.go(lines)
        finally:
            results.close()
            errors.close()

    def results(self) -> list[dict[str, Any]]:
        return _rows(self.results_path)

    def errors(self) -> list[dict[str, Any]]:
        return _rows(self.errors_path)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_good_lines_are_answered_and_bad_ones_reported(bench: Bench) -> None:
    with fake_fleet(lambda prompt: prompt.text.upper()) as fleet, Client() as client:
        counts = bench.go(
            client,
            raw_lines(
                "one\n",
                {"prompt": "two", "custom_id": "second", "metadata": {"k": 1}},
                {"prompt": "three", "temprature": 1},
                {"prompt": ""},
                {"prompt": "five", "max_tokens": 5, "on_unknown": "fail"},
            ),
            options={"tier": "basic"},
        )
        assert {prompt.tier for prompt in fleet.enqueued} == {"basic"}
        assert [prompt.on_unknown for prompt in fleet.enqueued] == ["retry", "fail"]
    assert (counts.succeeded, counts.invalid, counts.failed) == (2, 3, 0)
    rows = {row["line"]: row for row in bench.results()}
    assert rows.keys() == {2, 5}
    assert rows[2]["text"] == "TWO"
    assert rows[2]["custom_id"] == "second"
    assert rows[2]["metadata"] == {"k": 1}
    errors = {row["line"]: row["error"]["message"] for row in bench.errors()}
    assert errors.keys() == {1, 3, 4}
    assert "not JSON" in errors[1]
    assert errors[3].startswith("temprature:")
    assert errors[4].startswith("prompt:")


def test_a_second_start_asks_nothing_again(bench: Bench) -> None:
    lines = [f"prompt {n}" for n in range(10)]
    with fake_fleet() as fleet, Client() as client:
        bench.go(client, raw_lines(*map(_text, lines)))
        counts = bench.go(client, raw_lines(*map(_text, lines)))
        assert len(fleet.enqueued) == 10
    assert (counts.earlier, counts.submitted) == (10, 0)
    assert len(bench.results()) == 10


def _text(prompt: str) -> dict[str, str]:
    return {"prompt": prompt}


def test_an_interrupted_run_goes_on_with_the_same_jobs(bench: Bench) -> None:
    lines = [_text(f"prompt {n}") for n in range(2 * CHUNK)]

    class Interrupted(Client):
        looks = 0

        def get_results(self, ids: Any) -> Any:
            self.looks += 1
            if self.looks == 2:  # one chunk is written, the other one is in flight
                raise KeyboardInterrupt
            return super().get_results(ids)

    with fake_fleet() as fleet:
        with Interrupted() as interrupted, pytest.raises(KeyboardInterrupt):
            bench.go(interrupted, raw_lines(*lines))
        assert len(bench.results()) == CHUNK
        first = {prompt.id for prompt in fleet.enqueued}
        with Client() as client:
            counts = bench.go(client, raw_lines(*lines))
        assert {prompt.id for prompt in fleet.enqueued} == first
    assert (counts.earlier, counts.succeeded) == (CHUNK, CHUNK)
    rows = bench.results()
    assert sorted(row["line"] for row in rows) == list(range(1, 2 * CHUNK + 1))
    assert {uuid.UUID(row["id"]) for row in rows} == first


def test_failures_are_reported_and_asked_again_when_wished(bench: Bench) -> None:
    broken = True

    def answer(prompt: Any) -> str:
        if broken and prompt.text == "bad":
            raise ProviderError("out of order")
        return "fine"

    lines = [_text("good"), _text("bad")]
    with fake_fleet(answer) as fleet, Client() as client:
        assert bench.go(client, raw_lines(*lines)).failed == 1
        assert bench.errors()[0]["line"] == 2
        assert bench.go(client, raw_lines(*lines)).failed == 1
        assert len(fleet.enqueued) == 2  # a mere second start pays nothing
        broken = False
        counts = bench.go(client, raw_lines(*lines), retry_failed=True)
        assert len(fleet.enqueued) == 3
    assert (counts.failed, counts.succeeded, counts.earlier) == (0, 1, 1)
    assert bench.errors() == []


def test_rows_of_another_run_are_not_mixed_with_ours(bench: Bench) -> None:
    with fake_fleet(), Client() as client:
        bench.go(client, raw_lines(_text("a")))
        with pytest.raises(ConfigurationError, match="another run"):
            bench.go(client, raw_lines(_text("a")), id="run-2")


def test_no_more_jobs_are_open_than_allowed(bench: Bench) -> None:
    class Slow(Client):
        """Has the results of half of the open jobs at each look."""

        def get_results(self, ids: Any) -> Any:
            found = super().get_results(ids)
            keep = len(found) // 2 if len(found) > 1 else len(found)
            return dict(list(found.items())[:keep])

    with fake_fleet(), Slow() as client:
        counts = bench.go(client, raw_lines(*(_text(str(n)) for n in range(50))), max_in_flight=7)
    assert counts.succeeded == 50
    assert max(seen.in_flight for seen in bench.seen) <= 7


def test_a_restart_of_the_database_is_outlasted_but_a_wrong_address_is_not(bench: Bench) -> None:
    class Flaky(Client):
        failures = 2

        def get_results(self, ids: Any) -> Any:
            if self.failures:
                self.failures -= 1
                raise StoreUnavailableError
            return super().get_results(ids)

    class Never(Client):
        def enqueue_prompts(self, *_args: Any, **_options: Any) -> Any:
            raise StoreUnavailableError

    with fake_fleet():
        with Flaky() as flaky:
            assert bench.go(flaky, raw_lines(_text("a"))).succeeded == 1
        assert len(bench.slept) >= 2
        bench.slept.clear()
        with Never() as never, pytest.raises(StoreUnavailableError):
            bench.go(never, raw_lines(_text("a"), _text("b")))
        assert bench.slept == []


def test_a_key_that_was_used_for_something_else_is_that_lines_error(bench: Bench) -> None:
    with fake_fleet(), Client() as client:
        client.enqueue_prompt("taken", idempotency_key="k")
        counts = bench.go(
            client, raw_lines({"prompt": "other", "idempotency_key": "k"}, _text("fine"))
        )
    assert (counts.succeeded, counts.invalid) == (1, 1)
    assert bench.errors()[0]["error"]["code"] == "idempotency_conflict"


def test_an_openai_line_is_answered_in_its_own_form(bench: Bench) -> None:
    line = {
        "custom_id": "r-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hi"}]},
    }
    with fake_fleet("hello"), Client() as client:
        bench.go(client, raw_lines(line))
    (row,) = bench.results()
    assert row["custom_id"] == "r-1"
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
