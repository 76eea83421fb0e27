"""Streamed answers become what would have come without streaming, or a failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_workers.providers import streams
from promptfleet_workers.providers.anthropic import AnthropicProvider
from promptfleet_workers.providers.http import Endpoint, HttpClient, HttpResponse, Take
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Answer, Call, Completion, Provider
from promptfleet_workers.retries import FailureKind, classify

DEPLOYMENT = Deployment(base_url="http://api.test/v1")
REQUESTS = {
    JobKind.CHAT: '{"max_tokens":5,"messages":[{"content":"Hi","role":"user"}]}',
    JobKind.COMPLETION: '{"prompt":"Hi"}',
    JobKind.EMBEDDING: '{"input":"Hi"}',
}


class Stream:
    """Stands in for the HTTP client: plays a stream, or gives a body that is none."""

    def __init__(
        self, *pieces: bytes, error: ProviderError | None = None, plain: HttpResponse | None = None
    ) -> None:
        self.pieces = pieces
        self.error = error
        self.plain = plain
        self.sent: dict[str, Any] = {}

    async def post(
        self,
        endpoint: Endpoint,
        body: bytes,
        timeouts: TimeoutOptions,
        take: Take | None = None,
        on_headers: object = None,
    ) -> HttpResponse:
        self.sent = json.loads(body)
        if self.plain is not None or take is None:
            return self.plain or HttpResponse(200, httpx.Headers(), b"".join(self.pieces))
        for piece in self.pieces:
            if take(piece):
                break
        if self.error is not None:
            raise self.error
        return HttpResponse(200, httpx.Headers(), b"")


def openai_of(client: Stream) -> Provider:
    return OpenAIProvider(DEPLOYMENT, cast("HttpClient", client))


def anthropic_of(client: Stream) -> Provider:
    return AnthropicProvider(DEPLOYMENT, cast("HttpClient", client))


def calling(kind: JobKind = JobKind.CHAT, *, count: int = 1, **options: Any) -> Call:
    return Call(
        kind=kind,
        model="m",
        requests=[REQUESTS[kind]] * count,
        input_tokens=[10] * count,
        timeouts=TimeoutOptions(),
        stream=True,
        **options,
    )


def sse(*chunks: Any, done: bool = True) -> bytes:
    data = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    return "".join(f"data: {item}\n\n" for item in [*data, *["[DONE]"] * done]).encode()


def chunk(delta: Any = None, finish: str | None = None, index: int = 0, **fields: Any) -> Any:
    choice = {"index": index, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    envelope = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1"}
    return {**envelope, "choices": [choice], **fields}


async def completion(client: Stream, call: Call | None = None) -> Completion:
    [answer] = await openai_of(client).call(call or calling())
    assert isinstance(answer, Completion)
    return answer


async def message(*events: Any, call: Call | None = None) -> Completion:
    pieces = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    [answer] = await anthropic_of(Stream(*pieces)).call(call or calling())
    assert isinstance(answer, Completion)
    return answer


async def failure(client: Stream, provider: Provider | None = None) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await (provider or openai_of(client)).call(calling())
    return caught.value


# -- OpenAI


async def test_a_chat_is_what_it_would_have_been_without_streaming() -> None:
    client = Stream(
        sse(
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "Fo"}, system_fingerprint="fp"),
            chunk({"content": "ur."}),
            chunk({}, "stop"),
            {**chunk(), "choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}},
        )
    )

    answer = await completion(client)

    assert client.sent["stream"] is True
    assert client.sent["stream_options"] == {"include_usage": True}
    assert client.sent["model"] == "m"
    assert client.sent["max_tokens"] == 5
    assert (answer.text, answer.finish_reason, answer.model) == ("Four.", "stop", "m-1")
    assert answer.usage == Usage(input=12, output=3)
    assert json.loads(answer.response) == {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m-1",
        "system_fingerprint": "fp",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Four."},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3},
    }


async def test_tool_calls_are_merged() -> None:
    def call(index: int | None, **parts: Any) -> Any:
        number = {} if index is None else {"index": index}
        return chunk({"tool_calls": [{**number, **parts}]})

    answer = await completion(
        Stream(
            sse(
                chunk({"role": "assistant", "content": None}),
                call(0, id="a", type="function", function={"name": "add", "arguments": ""}),
                call(0, function={"arguments": '{"x"'}),
                call(1, id="b", type="function", function={"name": "sub", "arguments": "{}"}),
                call(0, id="a", type="function", function={"arguments": ":1}"}),
                call(None, id="c", type="function", function={"name": "mul", "arguments": "{"}),
                call(None, function={"arguments": "}"}),
                chunk({}, "tool_calls"),
            )
        )
    )

    [choice] = json.loads(answer.response)["choices"]
    assert answer.text is None
    assert answer.finish_reason == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, name, arguments in (
                ("a", "add", '{"x":1}'),
                ("b", "sub", "{}"),
                ("c", "mul", "{}"),
            )
        ],
    }


async def test_several_choices_reasoning_and_logprobs() -> None:
    def logprobs(token: str) -> Any:
        return {"content": [{"token": token, "logprob": -0.5}], "refusal": None}

    first = chunk({"content": "a"})
    first["choices"][0]["logprobs"] = logprobs("a")
    second = chunk({"content": "b"}, stop_reason=7)
    second["choices"][0] |= {"logprobs": logprobs("b"), "stop_reason": 7}
    answer = await completion(
        Stream(
            sse(
                chunk({"content": "other"}, index=1),
                chunk({"reasoning_content": "hm"}),
                chunk({"reasoning_content": "m"}),
                first,
                second,
                chunk({}, "length", index=1),
                chunk({}, "stop"),
            )
        )
    )

    one, other = json.loads(answer.response)["choices"]
    assert answer.text == "ab"
    assert one["message"] == {
        "role": "assistant",
        "reasoning_content": "hmm",
        "content": "ab",
    }
    assert [item["token"] for item in one["logprobs"]["content"]] == ["a", "b"]
    assert one["stop_reason"] == 7
    assert (other["index"], other["message"]["content"], other["finish_reason"]) == (
        1,
        "other",
        "length",
    )


async def test_a_content_in_parts_and_then_in_words() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    answer = await completion(
        Stream(sse(chunk({"content": [thinking]}), chunk({"content": "Yes"}), chunk({}, "stop")))
    )

    assert answer.text == "Yes"
    content = json.loads(answer.response)["choices"][0]["message"]["content"]
    assert content == [thinking, {"type": "text", "text": "Yes"}]


async def test_a_completion_and_a_list_of_them() -> None:
    def part(text: str, finish: str | None = None, index: int = 0) -> Any:
        return {"object": "text_completion", "choices": [
            {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        ]}  # fmt: skip

    client = Stream(sse(part("a"), part("x", index=1), part("b", "stop"), part("y", "length", 1)))
    first, second = await openai_of(client).call(calling(JobKind.COMPLETION, count=2))

    assert client.sent["prompt"] == ["Hi", "Hi"]
    assert isinstance(first, Completion)
    assert isinstance(second, Completion)
    assert [first.text, second.text, second.finish_reason] == ["ab", "xy", "length"]
    assert json.loads(second.response)["object"] == "text_completion"
    [alone] = await openai_of(Stream(sse(part("a", "stop")))).call(calling(JobKind.COMPLETION))
    assert isinstance(alone, Completion)
    assert alone.text == "a"


async def test_embeddings_are_never_streamed() -> None:
    client = Stream(b'{"data":[{"embedding":[1]}]}')

    await openai_of(client).call(calling(JobKind.EMBEDDING))

    assert "stream" not in client.sent


async def test_the_text_is_heard_as_it_comes_and_surrogates_in_pairs() -> None:
    heard: list[str] = []
    answer = await completion(
        Stream(
            sse(
                chunk({"content": "a"}),
                chunk({"content": "other"}, index=1),
                chunk({"content": "b\ud83d"}),
                chunk({"content": "\ude00"}),
                chunk({}, "stop", index=1),
                chunk({}, "stop"),
            )
        ),
        calling(on_text=heard.append),
    )

    assert heard == ["a", "b", "\U0001f600"]
    assert answer.text == "ab\U0001f600"
    json.loads(answer.response)


@pytest.mark.parametrize(
    ("client", "code"),
    [
        pytest.param(Stream(sse(chunk({"content": "a"}))), "truncated", id="no finish reason"),
        pytest.param(
            Stream(sse(chunk({"content": "a"}, "stop"), done=False)), "truncated", id="no [DONE]"
        ),
        pytest.param(
            Stream(sse(chunk({"content": "a"}, "abort"))), "truncated", id="broken off there"
        ),
        pytest.param(Stream(), "truncated", id="nothing"),
        pytest.param(
            Stream(
                sse(chunk({"content": "a"}), done=False),
                error=ProviderError(code="connection_lost", unknown_outcome=True),
            ),
            "truncated",
            id="cut",
        ),
        pytest.param(
            Stream(b": hm\n", error=ProviderError(code="connection_lost", unknown_outcome=True)),
            "connection_lost",
            id="cut before it began",
        ),
        pytest.param(
            Stream(
                sse(chunk({"content": "a"}), done=False),
                error=ProviderError(code="timeout", unknown_outcome=True),
            ),
            "timeout",
            id="stalled",
        ),
        pytest.param(Stream(sse("no JSON")), "bad_response", id="no JSON"),
        pytest.param(Stream(b"data: {\xff}\n\n"), "bad_response", id="invalid UTF-8"),
        pytest.param(Stream(b"<html>hello</html>"), "bad_response", id="HTML"),
        pytest.param(Stream(sse()), "bad_response", id="no choices"),
        pytest.param(Stream(sse({"choices": [7]})), "bad_response", id="an odd choice"),
    ],
)
async def test_what_is_no_whole_answer_may_be_billed(client: Stream, code: str) -> None:
    error = await failure(client)

    assert (error.code, error.unknown_outcome) == (code, True)


async def test_a_last_event_without_its_empty_line_is_good_enough_for_done() -> None:
    stream = sse(chunk({"content": "a"}, "stop"), done=False) + b"data: [DONE]"

    assert (await completion(Stream(stream))).text == "a"


@pytest.mark.parametrize("begun", [False, True])
async def test_an_error_event(begun: bool) -> None:
    error = {"error": {"code": 429, "message": "slow down", "type": "rate_limit_error"}}
    before = [chunk({"content": "a"})] if begun else []

    caught = await failure(Stream(sse(*before, error, done=False)))

    judgement = classify(caught)
    assert (caught.code, caught.status, caught.unknown_outcome) == ("rate_limit_error", 429, begun)
    assert judgement.kind is FailureKind.RATE_LIMIT
    # a refusal after a part of the answer is not free
    assert judgement.otherwise.value == ("retry" if begun else "defer")


@pytest.mark.parametrize("plain", [False, True])
async def test_a_server_that_does_not_stream(plain: bool) -> None:
    body = json.dumps(
        {"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]}
    ).encode()
    response = HttpResponse(200, httpx.Headers(), body)
    client = Stream(plain=response) if plain else Stream(body[:9], body[9:])

    answer = await completion(client)

    assert (answer.text, answer.response) == ("whole", body)


async def test_a_refusal_has_no_stream() -> None:
    body = b'{"error":{"code":"insufficient_quota"}}'
    error = await failure(
        Stream(plain=HttpResponse(429, httpx.Headers({"retry-after": "7"}), body))
    )

    assert (error.code, error.retry_after_s) == ("insufficient_quota", 7)


async def test_an_answer_has_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ANSWER_BYTES", 1000)
    many = [chunk({"content": "x" * 10})] * 200

    assert (await failure(Stream(sse(*many, done=False)))).code == "response_too_large"


async def test_envelopes_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ANSWER_BYTES", 2000)
    many = [chunk({"content": "x"})] * 200

    assert (await completion(Stream(sse(*many, chunk({}, "stop"))))).text == "x" * 200


# -- Anthropic

START = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "cache_read_input_tokens": 3, "output_tokens": 1},
    },
}
END = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"output_tokens": 15, "input_tokens": None},
}
STOP = {"type": "message_stop"}


def block(index: int, content: Any, *deltas: Any) -> list[Any]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


TEXT = {"type": "text", "text": ""}
TOOL = {"type": "tool_use", "id": "t", "name": "add", "input": {}}


async def test_a_message_is_what_it_would_have_been_without_streaming() -> None:
    heard: list[str] = []
    answer = await message(
        START,
        {"type": "ping"},
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "h"},
            {"type": "thinking_delta", "thinking": "m"},
            {"type": "signature_delta", "signature": "sig"},
        ),
        *block(
            1,
            TEXT,
            {"type": "text_delta", "text": "Fo"},
            {"type": "text_delta", "text": "ur."},
            {"type": "citations_delta", "citation": {"cited_text": "4"}},
        ),
        *block(
            2,
            TOOL,
            {"type": "input_json_delta", "partial_json": ""},
            {"type": "input_json_delta", "partial_json": '{"x"'},
            {"type": "input_json_delta", "partial_json": ":1}"},
        ),
        {"type": "invented_later", "anything": 1},
        END,
        STOP,
        call=calling(on_text=heard.append),
    )

    assert heard == ["Fo", "ur."]
    assert (answer.text, answer.finish_reason, answer.model) == ("Four.", "end_turn", "claude")
    assert answer.usage == Usage(input=12, cached=3, output=15)
    assert json.loads(answer.response) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "sig"},
            {"type": "text", "text": "Four.", "citations": [{"cited_text": "4"}]},
            {"type": "tool_use", "id": "t", "name": "add", "input": {"x": 1}},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "cache_read_input_tokens": 3, "output_tokens": 15},
    }


async def test_a_tools_input_that_max_tokens_cut_is_kept_as_it_came() -> None:
    cut = {"type": "input_json_delta", "partial_json": '{"x'}
    end = {**END, "delta": {"stop_reason": "max_tokens"}}

    answer = await message(START, *block(0, TOOL, cut), end, STOP)

    [content] = json.loads(answer.response)["content"]
    assert content == {**TOOL, "partial_json": '{"x'}
    assert answer.finish_reason == "max_tokens"


HALF = [START, *block(0, TEXT, {"type": "text_delta", "text": "a"})]
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


@pytest.mark.parametrize(
    ("events", "code", "is_unknown"),
    [
        (HALF, "truncated", True),
        ([*HALF, END], "truncated", True),
        ([*HALF, STOP], "truncated", True),
        ([OVERLOADED], "overloaded_error", False),
        ([*HALF, OVERLOADED], "overloaded_error", True),
        ([STOP], "bad_response", True),
        ([END], "bad_response", True),
        ([{"type": "message_start"}], "bad_response", True),
        ([START, {"type": "content_block_delta", "delta": {}}], "bad_response", True),
    ],
)
async def test_what_is_no_whole_message(events: Sequence[Any], code: str, is_unknown: bool) -> None:
    with pytest.raises(ProviderError) as caught:
        await message(*events)

    assert (caught.value.code, caught.value.unknown_outcome) == (code, is_unknown)


# -- whatever comes

WORDS = st.sampled_from(["assistant", "stop", "a", "\ud83d", "\ude00", "\0", "", "text", "error"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


def like(example: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Objects with these fields or some of them, and now and then something else in one."""
    fields = {name: st.just(value) | JSON for name, value in example.items()}
    return st.fixed_dictionaries({}, optional=fields)


TOOL_CALLS = st.lists(
    like({"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}),
    max_size=3,
)
DELTAS = like({"role": "assistant", "content": "a", "reasoning_content": "b"}) | st.builds(
    lambda calls: {"tool_calls": calls}, TOOL_CALLS
)
CHOICES = st.builds(
    lambda choice, delta: {**choice, "delta": delta},
    like({"index": 0, "text": "a", "finish_reason": "stop", "logprobs": {"content": [1]}}),
    DELTAS | JSON,
)
CHUNKS = (
    st.builds(
        lambda head, choices: {**head, "choices": choices},
        like({"id": "c", "usage": {"prompt_tokens": 1}, "error": None}),
        st.lists(CHOICES, max_size=2) | JSON,
    )
    | JSON
)
EVENTS = st.sampled_from([START, END, STOP, *HALF, *block(1, TOOL)]) | like(
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": "a"},
        "message": START["message"],
        "content_block": TEXT,
        "usage": {"output_tokens": 1},
    }
)
ANY_LINES = st.lists(
    st.sampled_from([b"data: [DONE]\n\n", b"event: error\n", b"data: \xff\n\n", b"\n", b": c\n"])
    | st.one_of(CHUNKS, EVENTS, JSON).map(lambda item: f"data: {json.dumps(item)}\n\n".encode()),
    max_size=12,
)


@pytest.mark.parametrize("build", [openai_of, anthropic_of])
@pytest.mark.parametrize("kind", [JobKind.CHAT, JobKind.COMPLETION])
@given(lines=ANY_LINES)
async def test_any_stream_is_an_answer_or_a_failure(
    build: Any, kind: JobKind, lines: list[bytes]
) -> None:
    heard: list[str] = []
    try:
        answers: Sequence[Answer] = await build(Stream(*lines)).call(
            calling(kind, on_text=heard.append)
        )
    except ProviderError as error:
        classify(error)
        return

    [answer] = answers
    assert isinstance(answer, Completion)
    assert answer.finish_reason
    json.loads(answer.response)
    answer.response.decode()
    "".join(heard).encode()


@pytest.mark.parametrize("depth", [20, 300, 500, 1000, 2000])
@pytest.mark.parametrize("place", ["delta", "tools", "logprobs", "other", "head"])
@pytest.mark.parametrize("ends", ["[]", '{"a":0}'], ids=["lists", "objects"])
async def test_nested_too_deeply_is_no_crash(depth: int, place: str, ends: str) -> None:
    begin, end = ("[", "]") if ends == "[]" else ('{"a":', "}")
    deep = begin * depth + "0" + end * depth
    if place == "tools":
        deep = '{"tool_calls":[' * depth + "{}" + "]}" * depth
    nests = {
        "delta": f'{{"a":{deep}}}',
        "tools": deep,
        "logprobs": f'{{"a":{deep}}}',
        "other": deep,
    }
    name = "delta" if place == "tools" else place
    fields = f'"{name}":{nests[place]},' if place in nests else ""
    head = f'"x":{deep},' if place == "head" else ""
    data = f'{{{head}"choices":[{{{fields}"index":0,"finish_reason":"stop"}}]}}'
    try:
        answer = await completion(Stream(sse(data)))
    except ProviderError as error:
        assert error.code == "bad_response"  # noqa: PT017 - either end is fine
    else:
        json.loads(answer.response)
