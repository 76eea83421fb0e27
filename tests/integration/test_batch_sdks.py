"""The simulated batch APIs, judged by the providers' own SDKs."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any, TypeVar

import anthropic
import openai
import orjson
import pytest
from openai.types import Batch
from tests.integration.provider_batching import DEADLINE_S, simulated

T = TypeVar("T")


def chat_line(custom_id: str, text: str, model: str = "m") -> bytes:
    """A line of OpenAI's input file."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return orjson.dumps(line) + b"\n"


def request(custom_id: str, text: str) -> Any:
    """A request of Anthropic's."""
    messages = [{"role": "user", "content": text}]
    return {"custom_id": custom_id, "params": {"model": "m", "max_tokens": 9, "messages": messages}}


async def until(look: Callable[[], Any], is_so: Callable[[Any], bool]) -> Any:
    """Look again and again, until it is so."""
    async with asyncio.timeout(DEADLINE_S):
        while not is_so(found := await look()):
            await asyncio.sleep(0.01)
        return found


class TestOpenAI:
    async def submitted(self, client: openai.AsyncOpenAI, lines: bytes) -> Batch:
        file = await client.files.create(file=("in.jsonl", io.BytesIO(lines)), purpose="batch")
        assert (file.purpose, file.bytes) == ("batch", len(lines))
        return await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"ours": "7"},
        )

    async def lines(self, client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
        assert file_id is not None
        content = await client.files.content(file_id)
        found = [orjson.loads(line) for line in content.content.splitlines()]
        assert found != sorted(found, key=lambda line: str(line["custom_id"]))  # in no order
        return {line["custom_id"]: line for line in found}

    async def test_a_batch_from_its_file_to_its_answers(self) -> None:
        lines = b"".join(chat_line(f"l{n:02}", f"Say {n}") for n in range(20))
        bad = b"".join(chat_line(f"x{n}", "[[sim:status=429]] " + "x" * n) for n in range(5))
        async with (
            simulated(batch_ms=100) as (_, url),
            openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client,
        ):
            batch = await self.submitted(client, lines + bad)
            assert batch.status == "in_progress"
            assert batch.metadata == {"ours": "7"}
            assert batch.output_file_id is None

            batch = await until(
                lambda: client.batches.retrieve(batch.id), lambda b: b.status == "completed"
            )
            assert batch.request_counts is not None
            assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 5)
            answers = await self.lines(client, batch.output_file_id)
            errors = await self.lines(client, batch.error_file_id)

        assert set(answers) == {f"l{n:02}" for n in range(20)}
        assert {line["response"]["status_code"] for line in errors.values()} == {429}
        body = answers["l07"]["response"]["body"]
        assert body["choices"][0]["message"]["content"].startswith("Simulated answer to: Say 7")

    async def test_what_is_wrong_with_a_file_fails_its_batch(self) -> None:
        cases = {
            "duplicate_custom_id": chat_line("a", "1") + chat_line("a", "2"),
            "invalid_json_line": b"{\n",
            "mismatched_model": chat_line("a", "1") + chat_line("b", "2", model="n"),
        }
        async with (
            simulated() as (there, url),
            openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client,
        ):
            batch = await self.submitted(client, chat_line("a", "1"))
            assert batch.status == "completed"
            for code, lines in cases.items():
                batch = await self.submitted(client, lines)
                assert batch.status == "failed"
                assert batch.errors is not None
                assert batch.errors.data is not None
                assert [error.code for error in batch.errors.data] == [code]
            with pytest.raises(openai.BadRequestError):
                await client.batches.create(
                    input_file_id=batch.input_file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="1h",  # type: ignore[arg-type]
                )
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve("batch_none")
        assert list(there.stats.calls.values()) == [1]

    async def test_lists_come_in_pages_the_newest_first(self) -> None:
        async with (
            simulated() as (_, url),
            openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client,
        ):
            made = [(await self.submitted(client, chat_line("a", f"{n}"))).id for n in range(5)]
            listed = [batch.id async for batch in client.batches.list(limit=2)]

        assert listed == made[::-1]

    async def test_cancelling_and_expiring_keep_what_was_done(self) -> None:
        lines = b"".join(chat_line(f"l{n:02}", f"{n}") for n in range(20))
        async with (
            simulated(batch_ms=400, batch_cancel_ms=30) as (there, url),
            openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client,
        ):
            batch = await self.submitted(client, lines)
            await until(
                lambda: client.batches.retrieve(batch.id),
                lambda b: b.request_counts.completed >= 2,
            )
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            batch = await until(
                lambda: client.batches.retrieve(batch.id), lambda b: b.status == "cancelled"
            )
            done = await self.lines(client, batch.output_file_id)
            undone = await self.lines(client, batch.error_file_id)
            there.options = there.options.changed({"batch_expires_s": 0.21})
            expired = await self.submitted(client, lines)
            expired = await until(
                lambda: client.batches.retrieve(expired.id), lambda b: b.status == "expired"
            )
            left = await self.lines(client, expired.error_file_id)

        assert len(done) >= 2
        assert len(done) + len(undone) == 20
        assert {line["error"]["code"] for line in undone.values()} == {"batch_cancelled"}
        assert {line["error"]["code"] for line in left.values()} == {"batch_expired"}
        assert len(left) == 10


class TestAnthropic:
    async def results(self, client: anthropic.AsyncAnthropic, name: str) -> dict[str, Any]:
        found = await client.messages.batches.results(name)
        return {item.custom_id: item.result async for item in found}

    async def test_a_batch_from_its_requests_to_its_results(self) -> None:
        requests = [request(f"l{n}", f"Say {n}") for n in range(10)]
        requests.append(request("bad", "[[sim:status=400]]"))
        async with (
            simulated(batch_ms=100) as (there, url),
            anthropic.AsyncAnthropic(api_key="k", base_url=url) as client,
        ):
            batch = await client.messages.batches.create(requests=requests)
            assert batch.processing_status == "in_progress"
            assert batch.request_counts.processing == 11
            assert batch.results_url is None
            batch = await until(
                lambda: client.messages.batches.retrieve(batch.id),
                lambda b: b.processing_status == "ended",
            )
            assert (batch.request_counts.succeeded, batch.request_counts.errored) == (10, 1)
            found = await self.results(client, batch.id)

        assert set(found) == {*(f"l{n}" for n in range(10)), "bad"}
        assert found["l3"].message.content[0].text.startswith("Simulated answer to: Say 3")
        assert found["bad"].type == "errored"
        assert found["bad"].error.error.type == "invalid_request_error"
        assert there.stats.batch_lines == 11

    async def test_custom_ids_are_checked_at_once(self) -> None:
        async with (
            simulated() as (there, url),
            anthropic.AsyncAnthropic(api_key="k", base_url=url, max_retries=0) as client,
        ):
            for requests in (
                [request("a", "1"), request("a", "2")],
                [request("a b", "1")],
                [request("a" * 65, "1")],
                [],
            ):
                with pytest.raises(anthropic.BadRequestError):
                    await client.messages.batches.create(requests=requests)
        assert there.stats.batches == 0

    async def test_lists_and_cancelling(self) -> None:
        async with (
            simulated(batch_ms=10_000) as (_, url),
            anthropic.AsyncAnthropic(api_key="k", base_url=url) as client,
        ):
            made = [
                (await client.messages.batches.create(requests=[request("a", f"{n}")])).id
                for n in range(5)
            ]
            listed = [batch.id async for batch in client.messages.batches.list(limit=2)]
            assert listed == made[::-1]
            batch = await client.messages.batches.cancel(made[0])
            assert batch.processing_status == "ended"
            assert batch.request_counts.canceled == 1
