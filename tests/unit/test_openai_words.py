"""OpenAI's words and the fleet's: bodies, answers, errors, and streams that begin anew."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import orjson
import pytest
from starlette.requests import Request

from promptfleet.api.errors import ApiError
from promptfleet.api.openai.answering import patience
from promptfleet.api.openai.answers import openai_answer, usage_of, with_base64
from promptfleet.api.openai.chunks import _rest_of
from promptfleet.api.openai.failures import failure
from promptfleet.api.openai.following import Retold
from promptfleet.api.openai.models import find_target
from promptfleet.api.openai.responses_input import chat_body, told_options
from promptfleet.api.openai.responses_output import output_items
from promptfleet.api.openai.translating import check_prompt, count_prompts, make_job
from promptfleet.requests import Defaults
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import CacheStatus, JobError, JobKind, JobState, Result, Usage

FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["small"]
[tiers.advanced]
models = ["large", "small"]
[models.small]
deployments = [{ base_url = "https://a.example/v1" }]
[models.large]
deployments = [{ base_url = "https://b.example/v1" }]
[models.loose]
deployments = [{ base_url = "https://c.example/v1" }]
"""
CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet(FLEET)


@pytest.fixture
def defaults(fleet: Fleet) -> Defaults:
    return Defaults(tier="basic", tiers=fleet.tier_names, models=tuple(fleet.models))


def result(**fields: Any) -> Result:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    values: dict[str, Any] = {
        "job_id": uuid.UUID(int=7),
        "state": JobState.SUCCEEDED,
        "tier": "basic",
        "text": "Hi",
        "response": {},
        "finish_reason": "stop",
        "error": None,
        "model": "m",
        "provider": "openai",
        "deployment": "d",
        "usage": Usage(input=3, output=2),
        "cost_usd": None,
        "cache": CacheStatus.OFF,
        "attempts": 1,
        "calls": 1,
        "batch_id": None,
        "batch_size": 1,
        "queued_ms": 1.0,
        "provider_ms": 2.0,
        "total_ms": 3.0,
        "metadata": {},
        "created_at": now,
        "finished_at": now,
        **fields,
    }
    return Result(**values)


class TestRetold:
    def test_what_comes_is_told(self) -> None:
        retold = Retold()
        assert [retold.next(text) for text in ("a", "", "b")] == ["a", "", "b"]

    def test_the_same_answer_again_goes_on_where_it_was(self) -> None:
        retold = Retold()
        retold.next("Hello, wor")
        retold.reset()
        assert [retold.next(t) for t in ("Hel", "lo, ", "world", "!")] == ["", "", "ld", "!"]

    def test_twice_anew(self) -> None:
        retold = Retold()
        retold.next("abc")
        retold.reset()
        assert retold.next("ab") == ""
        retold.reset()
        assert retold.next("abcd") == "d"
        retold.reset()
        assert retold.next("abcde") == "e"

    @pytest.mark.parametrize("text", ["X", "abX", "abcdX"])
    def test_another_answer_can_not_be_told(self, text: str) -> None:
        retold = Retold()
        retold.next("abcdef")
        retold.reset()
        assert retold.next(text) is None


class TestTargets:
    @pytest.mark.parametrize(
        ("name", "tier", "model"),
        [
            ("small", None, "small"),  # the default tier has it
            ("large", "advanced", "large"),
            ("loose", None, "loose"),
            ("tier/advanced", "advanced", None),
        ],
    )
    def test_names(
        self, fleet: Fleet, defaults: Defaults, name: str, tier: str | None, model: str | None
    ) -> None:
        target = find_target(name, fleet, defaults)
        assert (target.tier, target.model) == (tier, model)

    @pytest.mark.parametrize("name", ["gpt-4o", "tier/none", "tier/", "basic"])
    def test_unknown_names(self, fleet: Fleet, defaults: Defaults, name: str) -> None:
        with pytest.raises(ApiError) as raised:
            find_target(name, fleet, defaults)
        assert raised.value.status == 404
        assert name not in raised.value.message

    def test_without_a_fleet_toml_the_workers_know(self) -> None:
        assert find_target("any", Fleet(), Defaults()).model == "any"


class TestJobs:
    def job(self, fleet: Fleet, defaults: Defaults, **body: Any) -> Any:
        asked = {"model": "small", "messages": [{"role": "user", "content": "x"}], **body}
        return make_job(JobKind.CHAT, asked, fleet=fleet, defaults=defaults, options={})

    def test_equal_requests_are_equal_bytes(self, fleet: Fleet, defaults: Defaults) -> None:
        one = self.job(fleet, defaults, a=1, b={"y": 1, "x": 2}, user=None)
        two = self.job(fleet, defaults, b={"y": 1, "x": 2}, a=1)
        assert one.request == two.request
        assert b'{"y":1,"x":2}' in one.request

    @pytest.mark.parametrize(("tier", "priority"), [("flex", 2), ("priority", 8), ("auto", 5)])
    def test_service_tiers(
        self, fleet: Fleet, defaults: Defaults, tier: str, priority: int
    ) -> None:
        job = self.job(fleet, defaults, service_tier=tier)
        assert job.priority == priority
        assert orjson.loads(job.request)["service_tier"] == tier

    def test_stored_metadata_goes_along(self, fleet: Fleet, defaults: Defaults) -> None:
        job = self.job(fleet, defaults, metadata={"a": "1"}, store=True)
        assert job.metadata == orjson.loads(job.request)["metadata"] == {"a": "1"}

    @pytest.mark.parametrize("value", [None, "", [], [""], [1, "a"], [[]], [True], 7, {"a": 1}])
    def test_what_is_no_prompt(self, value: object) -> None:
        with pytest.raises(InvalidRequestError):
            check_prompt(value, "prompt")

    @pytest.mark.parametrize(
        ("value", "count"), [("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2], [3]], 3)]
    )
    def test_prompts_are_counted(self, value: object, count: int) -> None:
        check_prompt(value, "prompt")
        assert count_prompts(value) == count


class TestAnswers:
    def test_a_provider_s_answer_stays_as_it_is(self) -> None:
        message = {"role": "assistant", "content": "Hi", "reasoning": "…"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        response = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
        whole = {**response, "choices": [choice], "usage": {"prompt_tokens": 1}, "extra": True}
        assert openai_answer(result(response=whole), JobKind.CHAT, "asked") == whole

    def test_what_a_careless_server_leaves_out(self) -> None:
        answer = openai_answer(
            result(response={"choices": [{"message": {}}]}, model=None), JobKind.CHAT, "asked"
        )
        assert answer["id"] == f"chatcmpl-{uuid.UUID(int=7).hex}"
        assert answer["object"] == "chat.completion"
        assert answer["model"] == "asked"
        assert answer["choices"][0] == {
            "index": 0,
            "message": {"role": "assistant", "content": None},
            "logprobs": None,
        }

    def test_anthropic_s_tools(self) -> None:
        response = {
            "id": "msg_1",
            "content": [
                {"type": "text", "text": "Hi"},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            ],
            "usage": {"input_tokens": 5, "output_tokens": 4, "cache_read_input_tokens": 2},
        }
        told = result(
            response=response, provider="anthropic", finish_reason="tool_use", usage=Usage()
        )
        answer = openai_answer(told, JobKind.CHAT, "claude")
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"] == {
            "name": "f",
            "arguments": '{"a":1}',
        }
        usage = usage_of(told)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 4)
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2}

    def test_vectors_in_base64(self) -> None:
        answer = with_base64({"data": [{"embedding": [1.0, -2.0]}, {"embedding": "AAAA"}]})
        assert [item["embedding"] for item in answer["data"]] == ["AACAPwAAAMA=", "AAAA"]

    def test_tool_calls_as_deltas(self) -> None:
        message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": CALLS}
        assert _rest_of(message) == {"tool_calls": [{"index": 0, **CALLS[0]}]}
        assert _rest_of({"role": "assistant", "content": "Hi", "tool_calls": []}) == {}


@pytest.mark.parametrize(
    ("state", "error", "status", "repeats"),
    [
        (JobState.FAILED, ("http_400", 400), 400, False),
        (JobState.FAILED, ("invalid_api_key", 401), 502, False),
        (JobState.FAILED, ("context_length_exceeded", 200), 400, False),
        (JobState.FAILED, ("unsupported", None), 400, False),
        (JobState.FAILED, ("http_529", 529), 502, False),
        (JobState.FAILED, ("timeout", None), 504, False),
        (JobState.FAILED, ("internal", None), 500, False),
        (JobState.EXPIRED, ("expired", None), 504, False),
        (JobState.EXPIRED, ("overloaded", 503), 504, False),
        (JobState.EXPIRED, ("rate_limit_exceeded", 429), 429, True),
        (JobState.EXPIRED, ("insufficient_quota", 429), 429, False),
        (JobState.CANCELLED, None, 409, False),
    ],
)
def test_failures(
    state: JobState, error: tuple[str, int | None] | None, status: int, *, repeats: bool
) -> None:
    facts = None if error is None else JobError(code=error[0], message="why", status=error[1])
    told = failure(result(state=state, error=facts, text=None))
    assert told.status == status
    assert told.body.keys() == {"message", "type", "param", "code"}
    assert told.headers["x-promptfleet-job"] == str(uuid.UUID(int=7))
    assert ("x-should-retry" not in told.headers) == repeats
    assert ("retry-after" in told.headers) == (status == 429)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 600),
        ({"x-stainless-read-timeout": "60"}, 59),
        ({"x-stainless-read-timeout": "2"}, 1.8),
        ({"x-stainless-read-timeout": "9000"}, 600),
        ({"x-stainless-read-timeout": "None", "x-stainless-timeout": "10"}, 9),
        ({"x-stainless-timeout": "nan"}, 600),
        ({"x-stainless-timeout": "-1"}, 600),
    ],
)
def test_patience(headers: dict[str, str], seconds: float) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert patience(Request({"type": "http", "headers": raw}), 600) == pytest.approx(seconds)


class TestResponses:
    def test_there_and_back(self) -> None:
        asked = {
            "input": "Hi",
            "instructions": "Be brief",
            "max_output_tokens": 9,
            "temperature": 0.5,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": {"type": "function", "name": "f"},
            "reasoning": {"effort": "low"},
        }
        told = told_options(chat_body(asked))
        assert told["reasoning"]["effort"] == "low"
        for name in asked.keys() - {"input", "reasoning"}:
            assert told[name] == asked[name]

    def test_calls_join_the_message_before_them(self) -> None:
        call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
        said = {"type": "message", "role": "assistant", "content": "Let me look"}
        messages = chat_body({"input": [{"role": "user", "content": "?"}, said, call, call]})[
            "messages"
        ]
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert len(messages[1]["tool_calls"]) == 2

    def test_images_and_files(self) -> None:
        parts = [
            {"type": "input_text", "text": "What is it?"},
            {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
            {"type": "input_file", "file_data": "AA", "filename": "a.pdf"},
        ]
        [message] = chat_body({"input": [{"role": "user", "content": parts}]})["messages"]
        assert message["content"] == [
            {"type": "text", "text": "What is it?"},
            {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64,AA", "detail": "low"},
            },
            {"type": "file", "file": {"file_data": "AA", "filename": "a.pdf"}},
        ]

    def test_items_of_an_answer(self) -> None:
        message = {"content": "Hi", "tool_calls": CALLS}
        items = output_items(uuid.UUID(int=7), {"message": message}, "completed")
        assert [item["type"] for item in items] == ["message", "function_call"]
        assert items[1]["call_id"] == "c1"
        only_calls = output_items(
            uuid.UUID(int=7), {"message": {**message, "content": None}}, "completed"
        )
        assert [item["type"] for item in only_calls] == ["function_call"]
