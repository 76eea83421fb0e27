"""OpenAI's protocol: what is sent, and how every kind of answer is read."""

from __future__ import annotations

import json
from typing import Any, cast

import httpx
import pytest

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_workers.providers.http import Endpoint, HttpClient, HttpResponse
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Answer, Call, Completion

TIMEOUTS = TimeoutOptions()
CHAT_REQUEST = '{"max_tokens":5,"messages":[{"content":"What is \\ud800?","role":"user"}]}'


class Replies:
    """Stands in for the HTTP client: keeps what is sent, and answers with a canned response."""

    def __init__(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.headers = httpx.Headers(headers or {})
        self.sent: list[tuple[httpx.Request, bytes, TimeoutOptions]] = []

    async def post(
        self, endpoint: Endpoint, body: bytes, timeouts: TimeoutOptions, *, on_headers: object
    ) -> HttpResponse:
        self.sent.append((endpoint.request(body, {}), body, timeouts))
        return HttpResponse(self.status, self.headers, self.body)


def provider(replies: Replies, **deployment: Any) -> OpenAIProvider:
    options = {"base_url": "http://api.test/v1", **deployment}
    return OpenAIProvider(Deployment(**options), cast("HttpClient", replies))


def calling(
    *requests: str, kind: JobKind = JobKind.CHAT, model: str = "m", tokens: int = 10
) -> Call:
    return Call(
        kind=kind,
        model=model,
        requests=requests,
        input_tokens=[tokens] * len(requests),
        timeouts=TIMEOUTS,
    )


async def answer(body: Any, call: Call | None = None) -> Completion:
    answers = await provider(Replies(body)).call(call or calling(CHAT_REQUEST))
    [completion] = answers
    assert isinstance(completion, Completion)
    return completion


async def failure(
    body: Any, status: int = 200, headers: dict[str, str] | None = None
) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await provider(Replies(body, status, headers)).call(calling(CHAT_REQUEST))
    return caught.value


def chat(**changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Four."},
        "finish_reason": "stop",
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m-2024",
        "choices": [choice | changes],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    }


# -- requests


async def test_a_chat_request_is_sent_as_it_is_stored_with_the_model() -> None:
    replies = Replies(chat())

    await provider(replies, api_key=" key\n", headers={"X-Team": "a"}).call(
        calling(CHAT_REQUEST, model='a "model"')
    )

    [(request, body, timeouts)] = replies.sent
    assert body.decode() == '{"model":"a \\"model\\"",' + CHAT_REQUEST[1:]
    assert json.loads(body)["model"] == 'a "model"'
    assert timeouts is TIMEOUTS
    assert str(request.url) == "http://api.test/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer key"
    assert request.headers["x-team"] == "a"


@pytest.mark.parametrize(
    ("kind", "path"), [(JobKind.COMPLETION, "/completions"), (JobKind.EMBEDDING, "/embeddings")]
)
@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://h/v1/", "http://h/v1{}"),
        ("http://h/v1?api-version=1", "http://h/v1{}?api-version=1"),
    ],
)
async def test_each_kind_has_its_path(kind: JobKind, path: str, base: str, expected: str) -> None:
    replies = Replies({})

    with pytest.raises(ProviderError):
        await provider(replies, base_url=base).call(calling('{"prompt":"a"}', kind=kind))

    assert str(replies.sent[0][0].url) == expected.format(path)


async def test_no_key_no_authorization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    replies = Replies(chat())

    await provider(replies, api_key_env="NO_SUCH_KEY").call(calling(CHAT_REQUEST))

    assert "authorization" not in replies.sent[0][0].headers


async def test_a_configured_authorization_replaces_ours() -> None:
    replies = Replies(chat())

    await provider(replies, api_key="key", headers={"Authorization": "Basic x"}).call(
        calling(CHAT_REQUEST)
    )

    assert replies.sent[0][0].headers["authorization"] == "Basic x"


# -- one answer


async def test_a_chat_answer() -> None:
    completion = await answer(chat())

    assert completion == Completion(
        text="Four.",
        response=json.dumps(chat()).encode(),
        finish_reason="stop",
        usage=Usage(input=12, output=3),
        model="m-2024",
    )


async def test_an_answer_of_tool_calls_has_no_text() -> None:
    completion = await answer(
        chat(message={"content": None, "tool_calls": [{"id": "c"}]}, finish_reason="tool_calls")
    )

    assert (completion.text, completion.finish_reason) == (None, "tool_calls")


async def test_an_empty_text_is_a_text() -> None:
    assert (await answer(chat(message={"content": ""}))).text == ""


async def test_a_text_in_parts_is_joined() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Fo"}, {"text": "ur"}]

    assert (await answer(chat(message={"content": parts}))).text == "Four"


async def test_details_of_the_usage() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 40},
    }

    completion = await answer({**chat(), "usage": usage})

    assert completion.usage == Usage(input=100, cached=64, output=50, reasoning=40)


async def test_reasoning_that_is_counted_apart_is_output_too() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 190,
        "completion_tokens_details": {"reasoning_tokens": 40},
    }

    assert (await answer({**chat(), "usage": usage})).usage == Usage(
        input=100, output=90, reasoning=40
    )


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "12",
        {},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": -1, "completion_tokens": "3"},
        {"prompt_tokens": 2**40},
    ],
)
async def test_without_a_sensible_usage_our_own_estimate_stands(usage: Any) -> None:
    completion = await answer({**chat(), "usage": usage})

    assert completion.usage == Usage(input=10, output=2)


async def test_details_never_exceed_what_they_are_part_of() -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 99},
        "completion_tokens_details": {"reasoning_tokens": 99},
    }

    assert (await answer({**chat(), "usage": usage})).usage == Usage(
        input=10, cached=10, output=5, reasoning=5
    )


async def test_a_lone_surrogate_becomes_a_replacement_character_in_the_text_only() -> None:
    body = json.dumps(chat(message={"content": "a\ud800b\U0001f600"})).encode()

    completion = await answer(body)

    assert completion.text == "a\ufffdb\U0001f600"
    assert completion.response == body


async def test_names_that_postgres_could_not_hold_are_mended() -> None:
    completion = await answer({**chat(finish_reason="st\0op"), "model": "m" * 5000})

    assert completion.finish_reason == "st\ufffdop"
    assert completion.model == "m" * 200


async def test_an_embedding() -> None:
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2]}],
        "model": "e",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }

    completion = await answer(body, calling('{"input":"a"}', kind=JobKind.EMBEDDING))

    assert completion == Completion(
        text=None,
        response=json.dumps(body).encode(),
        finish_reason=None,
        usage=Usage(input=3),
        model="e",
    )


# -- answers that are none


@pytest.mark.parametrize("reason", [None, "", 7])
async def test_without_a_finish_reason_the_answer_is_truncated(reason: Any) -> None:
    error = await failure(chat(finish_reason=reason))

    assert (error.code, error.unknown_outcome) == ("truncated", True)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>hello</html>", id="HTML"),
        pytest.param(b"\xff\xfe{}", id="no UTF-8"),
        pytest.param(json.dumps(chat()).encode("utf-16"), id="UTF-16"),
        pytest.param(json.dumps(chat()).encode()[:-20], id="cut off"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"choices":NaN}', id="NaN"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="no choices"),
        pytest.param(b'{"choices":[]}', id="an empty list of choices"),
        pytest.param(b'{"choices":["text"]}', id="a choice that is none"),
    ],
)
async def test_a_body_without_an_answer_never_succeeds(body: bytes) -> None:
    error = await failure(body)

    assert (error.code, error.unknown_outcome) == ("bad_response", True)


@pytest.mark.parametrize(
    ("body", "code", "status"),
    [
        ({"error": {"code": "rate_limit_exceeded", "type": "tokens"}}, "rate_limit_exceeded", 200),
        ({"error": {"message": "m", "code": 429}}, "http_429", 429),
        ([{"error": {"code": 503, "status": "UNAVAILABLE"}}], "unavailable", 503),
        ({"error": "busy", "error_type": "overloaded"}, "overloaded", 200),
        (
            {"object": "error", "message": "m", "type": "ServerError", "code": 500},
            "servererror",
            500,
        ),
        (chat(error={"code": 502, "message": "m"}, finish_reason="error"), "http_502", 502),
    ],
)
async def test_an_error_in_a_success_is_a_failure(body: Any, code: str, status: int) -> None:
    error = await failure(body)

    assert (error.code, error.status) == (code, status)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (401, {"error": {"code": "invalid_api_key", "type": "x"}}, "invalid_api_key"),
        (500, {"error": {"code": None, "type": "server_error"}}, "server_error"),
        (429, {"error": {"code": "insufficient_quota"}}, "insufficient_quota"),
        (404, {"error": "model 'x' not found"}, "http_404"),
        (502, b"<html>Bad Gateway</html>", "http_502"),
        (503, b"", "http_503"),
        (307, b"", "http_307"),
        (400, {"error": {"type": "A whole sentence about the prompt"}}, "http_400"),
        (400, {"error": {"code": "x" * 65}}, "http_400"),
        (
            400,
            {"error": {"type": "BadRequestError", "message": "maximum context length is 5"}},
            "context_length_exceeded",
        ),
        (
            400,
            {"error": {"code": 400, "type": "exceed_context_size_error"}},
            "exceed_context_size_error",
        ),
        (400, {"error": ["surprise"]}, "http_400"),
        (400, {"error": {"code": ["a"], "type": {"b": 1}}}, "http_400"),
    ],
)
async def test_the_code_of_a_refusal(status: int, body: Any, code: str) -> None:
    error = await failure(body, status)

    assert (error.code, error.status) == (code, status)


async def test_a_message_never_repeats_the_providers_words() -> None:
    error = await failure({"error": {"message": "bad prompt: SECRET", "type": "is SECRET"}}, 400)

    assert "SECRET" not in str(error)
    assert "SECRET" not in error.code


@pytest.mark.parametrize(("status", "is_unknown"), [(504, True), (408, True), (429, False)])
async def test_behind_a_gateway_the_work_may_have_been_done(status: int, is_unknown: bool) -> None:
    assert (await failure(b"", status)).unknown_outcome is is_unknown


async def test_a_refusal_says_how_long_to_wait() -> None:
    assert (await failure({}, 429, {"Retry-After": "3"})).retry_after_s == 3


# -- many prompts in one request


def choices(*texts: str, usage: Any = None) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "fp",
        "choices": [
            {"index": n, "text": text, "logprobs": None, "finish_reason": "stop"}
            for n, text in enumerate(texts)
        ],
        "usage": usage,
    }


def completions_of(answers: list[Answer]) -> list[Completion]:
    assert all(isinstance(item, Completion) for item in answers)
    return [item for item in answers if isinstance(item, Completion)]


def prompts(*texts: str, **others: Any) -> list[str]:
    return [json.dumps({**others, "prompt": text}, separators=(",", ":")) for text in texts]


async def shares(body: Any, *requests: str, kind: JobKind = JobKind.COMPLETION) -> list[Answer]:
    return await provider(Replies(body)).call(calling(*requests, kind=kind))


async def test_prompts_are_sent_as_a_list() -> None:
    replies = Replies(choices("one", "two"))

    await provider(replies).call(
        calling(*prompts("1?", "2? \ud800", max_tokens=4), kind=JobKind.COMPLETION)
    )

    assert json.loads(replies.sent[0][1]) == {
        "max_tokens": 4,
        "model": "m",
        "prompt": ["1?", "2? \ud800"],
    }


async def test_each_prompt_gets_a_response_of_its_own() -> None:
    usage = {"prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 26}

    answers = completions_of(await shares(choices("one", "two", usage=usage), *prompts("a", "b")))

    assert [item.text for item in answers] == ["one", "two"]
    assert [json.loads(item.response) for item in answers] == [
        {
            **choices("one"),
            "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
        },
        {
            **choices("two"),
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        },
    ]
    assert [item.usage for item in answers] == [
        Usage(input=11, output=3),
        Usage(input=10, output=2),
    ]


async def test_choices_in_any_order_find_their_prompts() -> None:
    body = choices("one", "two", "three")
    body["choices"].reverse()

    answers = completions_of(await shares(body, *prompts("a", "b", "c")))

    assert [item.text for item in answers] == ["one", "two", "three"]


async def test_a_usage_of_one_prompt_only_gives_way_to_our_estimates() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}

    answers = completions_of(
        await shares(choices("one.", "two.", "3333 4444", usage=usage), *prompts("a", "b", "c"))
    )

    assert [item.usage for item in answers] == [
        Usage(input=10, output=1),
        Usage(input=10, output=1),
        Usage(input=10, output=3),
    ]


async def test_several_choices_a_prompt_stay_together() -> None:
    answers = completions_of(await shares(choices("a1", "a2", "b1", "b2"), *prompts("a", "b", n=2)))

    assert [item.text for item in answers] == ["a1", "b1"]
    own = json.loads(answers[1].response)["choices"]
    assert [(choice["index"], choice["text"]) for choice in own] == [(0, "b1"), (1, "b2")]


async def test_a_request_that_is_a_list_itself_gets_all_its_choices() -> None:
    requests = ['{"prompt":["a","b"]}', '{"prompt":"c"}', '{"prompt":[1,2,3]}']
    replies = Replies(choices("A", "B", "C", "D"))

    answers = completions_of(
        await provider(replies).call(calling(*requests, kind=JobKind.COMPLETION))
    )

    assert json.loads(replies.sent[0][1])["prompt"] == ["a", "b", "c", [1, 2, 3]]
    assert [len(json.loads(item.response)["choices"]) for item in answers] == [2, 1, 1]
    assert [item.text for item in answers] == ["A", "C", "D"]


async def test_one_prompts_truncation_is_its_own() -> None:
    body = choices("one", "two")
    body["choices"][1]["finish_reason"] = None

    first, second = await shares(body, *prompts("a", "b"))

    assert isinstance(first, Completion)
    assert isinstance(second, ProviderError)
    assert second.code == "truncated"


@pytest.mark.parametrize("indexes", [(0, 0), (0, 2), (1, 2), ("0", "1"), (0, None), (-1, 0)])
async def test_answers_that_cannot_be_told_apart_are_none(indexes: tuple[Any, Any]) -> None:
    body = choices("one", "two")
    for choice, index in zip(body["choices"], indexes, strict=True):
        choice["index"] = index

    with pytest.raises(ProviderError) as caught:
        await shares(body, *prompts("a", "b"))

    assert (caught.value.code, caught.value.unknown_outcome) == ("bad_response", True)


@pytest.mark.parametrize("texts", [(), ("one",), ("one", "two", "three")])
async def test_another_number_of_answers_than_of_prompts_is_none(texts: tuple[str, ...]) -> None:
    with pytest.raises(ProviderError) as caught:
        await shares(choices(*texts), *prompts("a", "b"))

    assert caught.value.code == "bad_response"


async def test_embeddings_of_a_list() -> None:
    body = {
        "object": "list",
        "model": "e",
        "data": [
            {"object": "embedding", "index": 1, "embedding": [0.25]},
            {"object": "embedding", "index": 0, "embedding": [0.1234567890123456]},
        ],
        "usage": {"prompt_tokens": 30, "total_tokens": 30},
    }

    answers = completions_of(
        await shares(body, '{"input":"a"}', '{"input":"b"}', kind=JobKind.EMBEDDING)
    )

    assert json.loads(answers[0].response) == {
        "object": "list",
        "model": "e",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1234567890123456]}],
        "usage": {"prompt_tokens": 15, "total_tokens": 15},
    }
    assert [(item.text, item.finish_reason) for item in answers] == [(None, None)] * 2


async def test_chats_are_never_sent_together() -> None:
    with pytest.raises(ValueError, match="one request a call"):
        await shares({}, CHAT_REQUEST, CHAT_REQUEST, kind=JobKind.CHAT)
