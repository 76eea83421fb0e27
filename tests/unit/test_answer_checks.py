# ruff: noqa: RUF001 - words of many alphabets
"""What is found wrong with answers, and what is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orjson
import pytest

from promptfleet_shared.policies.routing import EscalateOn
from promptfleet_workers.answer_checks import AnswerChecks, is_refusal
from promptfleet_workers.providers.protocol import Completion
from promptfleet_workers.tiering import bounded

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def answer(text: str | None, finish_reason: str = "stop", **response: Any) -> Completion:
    return Completion(text=text, response=orjson.dumps(response), finish_reason=finish_reason)


def failed(completion: Completion, request: dict[str, Any] | None = None, **checks: Any) -> Any:
    made = AnswerChecks({"nice": "mine:nice"}, find=lambda path: FUNCTIONS[path])
    return made.failed(EscalateOn(**checks), orjson.dumps(request or {}).decode(), completion)


def explode(text: str, request: dict[str, Any]) -> bool:
    raise ValueError(text)


FUNCTIONS = {
    "mine:nice": lambda text, request: "nice" in text and request == {"a": 1},
    "mine:broken": explode,
}

REFUSALS = (
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, I cannot help with this.",
    "I cannot provide that information.",
    "Sorry, but I can't do that.",
    "As an AI language model, I don't have opinions.",
    "I'm unable to help with that.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Lo siento, pero no puedo ayudar con eso.",
    "Desculpe, mas não posso ajudar com isso.",
    "Mi dispiace, ma non posso aiutarti.",
    "Извините, но я не могу помочь с этим.",
    "抱歉，我无法协助您完成这个请求。",
    "申し訳ありませんが、お手伝いできません。",
    "죄송하지만 도와드릴 수 없습니다.",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_known_by_their_words(text: str) -> None:
    assert is_refusal(answer(text))


@pytest.mark.parametrize(
    "text",
    [
        "Paris is the capital of France.",
        "I can help with that: first, open the file.",
        "You can't divide by zero, since no number fits.",
        "The error says: cannot open file. It means the path is wrong.",
        "Sorry for the delay! Here is the summary.",
        "Penguins are birds that cannot fly." + " They swim well." * 80,
        "I can't believe how good that poem is. " + "Here is another one. " * 80,
        "",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(answer(text))


def test_a_provider_may_say_itself_that_it_refuses() -> None:
    assert is_refusal(answer("", "content_filter"))
    assert is_refusal(answer("No.", "refusal"))
    choice = {"message": {"refusal": "I must not."}}
    assert is_refusal(answer(None, choices=[choice]))
    assert not is_refusal(answer("Yes.", choices=[{"message": {"refusal": None}}]))
    assert not is_refusal(answer("Yes.", refusal="?"))


def test_the_schema_of_the_request_must_be_followed() -> None:
    request = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    assert failed(answer('{"n": 1}'), request, json_schema=True) is None
    assert failed(answer('{"n": "1"}'), request, json_schema=True) == "json_schema"
    assert failed(answer('```json\n{"n": 1}\n```'), request, json_schema=True) == "json_schema"
    anything = {"response_format": {"type": "json_object"}}
    assert failed(answer("[]"), anything, json_schema=True) == "json_schema"
    assert failed(answer("{}"), anything, json_schema=True) is None
    assert failed(answer("no JSON"), {}, json_schema=True) is None


def test_a_schema_of_ones_own_must_be_followed() -> None:
    assert failed(answer('{"n": 1}'), json_schema=SCHEMA) is None
    assert failed(answer("{}"), json_schema=SCHEMA) == "json_schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$ref": "file:///etc/passwd"},
        {"pattern": "(?=look)around"},
    ],
)
def test_a_schema_that_is_none_fails_nobody_and_fetches_nothing(
    schema: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert failed(answer("{}"), json_schema=schema) is None
    assert [record.message for record in caplog.records] == ["schema_refused"]


def test_a_schema_elsewhere_is_not_read(tmp_path: Path) -> None:
    other = tmp_path / "schema.json"
    other.write_text('{"type": "string"}', encoding="utf-8")
    assert failed(answer("{}"), json_schema={"$ref": other.as_uri()}) is None


def test_a_hostile_pattern_takes_no_time() -> None:
    schema = {"properties": {"a": {"pattern": "^(a+)+$"}}}
    text = orjson.dumps({"a": "a" * 100_000 + "b"}).decode()
    assert failed(answer(text), json_schema=schema) == "json_schema"


def test_the_other_checks() -> None:
    assert failed(answer("  ab  "), min_chars=3) == "min_chars"
    assert failed(answer("abc"), min_chars=3) is None
    assert failed(answer("ab", "length"), cut_off=True) == "cut_off"
    assert failed(answer("ab", "max_tokens"), cut_off=True) == "cut_off"
    assert failed(answer("ab"), cut_off=True) is None
    assert failed(answer(None), min_chars=3, json_schema=SCHEMA, function="nice") is None


def test_a_users_check_is_given_the_text_and_the_request() -> None:
    assert failed(answer("nice"), {"a": 1}, function="nice") is None
    assert failed(answer("bad"), {"a": 1}, function="nice") == "function"
    assert failed(answer("nice"), {"a": 1}, function="mine:nice") is None


def test_a_users_check_that_raises_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert failed(answer("a secret"), function="mine:broken") is None
    (record,) = caplog.records
    assert "secret" not in str(record.__dict__)


def test_bounds_are_added_in_front_and_lowered_in_place() -> None:
    assert bounded('{"messages":[]}', 9) == '{"max_tokens":9,"messages":[]}'
    assert bounded('{"max_tokens":5,"messages":[]}', 9) == '{"max_tokens":5,"messages":[]}'
    assert bounded('{"max_tokens":50,"messages":[]}', 9) == '{"max_tokens":9,"messages":[]}'
    lowered = bounded('{"max_completion_tokens":50,"messages":[]}', 9)
    assert lowered == '{"max_completion_tokens":9,"messages":[]}'
    nested = '{"messages":[],"tools":[{"z":{"max_tokens":1},"a":1}]}'
    assert bounded(nested, 9) == '{"max_tokens":9,' + nested[1:]
    ordered = '{"max_tokens":50,"response_format":{"z":1,"a":2}}'
    assert bounded(ordered, 9) == '{"max_tokens":9,"response_format":{"z":1,"a":2}}'
