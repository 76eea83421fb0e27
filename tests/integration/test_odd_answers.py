"""Answers that are hard to store: they end up whole in Postgres, or are refused before it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rows import claim_one, insert, outcome, spec

from promptfleet.dev_stack import EmbeddedPostgres
from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind, Result
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.results import read_results
from promptfleet_workers.providers.http import HttpClient, HttpResponse
from promptfleet_workers.providers.openai import OpenAIProvider
from promptfleet_workers.providers.protocol import Call, Completion


@pytest.fixture(scope="module")
def database(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[sa.Engine]:
    """One for all of them: each looks at its own rows."""
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE odd TEMPLATE {template} STRATEGY file_copy"))
    url = sa.make_url(postgres.url).set(database="odd").render_as_string(hide_password=False)
    engine = make_engine(url, application_name="tests", pool_size=2)
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(sa.text("DROP DATABASE odd WITH (FORCE)"))


def ask(body: bytes, *, stream: bool = False) -> Completion | ProviderError:
    """What our provider makes of a response with this body."""

    class Replies:
        async def post(self, *arguments: Any, **_: Any) -> HttpResponse:
            take = arguments[3] if stream else None
            if take is None:
                return HttpResponse(200, httpx.Headers(), body)
            take(b"data: " + body + b"\n\ndata: [DONE]\n\n")
            return HttpResponse(200, httpx.Headers(), b"")

    provider = OpenAIProvider(
        Deployment(base_url="http://api.test/v1"), cast("HttpClient", Replies())
    )
    call = Call(
        kind=JobKind.CHAT,
        model="m",
        requests=['{"messages":[]}'],
        input_tokens=[1],
        timeouts=TimeoutOptions(),
        stream=stream,
    )
    try:
        [answer] = asyncio.run(provider.call(call))
    except ProviderError as error:
        return error
    return answer


def stored(database: sa.Engine, answer: Completion) -> Result:
    """The results row of a job that was answered so."""
    job = spec()
    insert(database, job)
    end = outcome(
        claim_one(database, job.id),
        text=answer.text,
        response=answer.response,
        finish_reason=answer.finish_reason,
        model=answer.model,
        usage=answer.usage,
    )
    with database.begin() as connection:
        assert finish(connection, [end]) == {job.id}
    with database.connect() as connection:
        return read_results(connection, [job.id], tenant="default")[job.id]


def body_of(content: str = "a", extra: str = "0", finish: str = "stop") -> bytes:
    part = f'"content":"{content}"'
    return (
        f'{{"model":"m","x":{extra},"choices":[{{"index":0,"message":{{{part}}},'
        f'"delta":{{{part}}},"finish_reason":"{finish}"}}]}}'
    ).encode("utf-8", "surrogatepass")


streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@streamed
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (r"a\u0000b", "a\ufffdb"),
        (r"a\ud800b", "a\ufffdb"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\ude00\ud83d", "\ufffd\ufffd"),
        ("\u2028 \U0001f600 \uffff", "\u2028 \U0001f600 \uffff"),
    ],
)
def test_a_text_that_is_hard_to_store(
    database: sa.Engine, content: str, text: str, stream: bool
) -> None:
    answer = ask(body_of(content), stream=stream)

    assert isinstance(answer, Completion)
    result = stored(database, answer)
    assert result.text == text
    [choice] = result.response["choices"]
    assert choice["message"]["content"] == json.loads(f'"{content}"')


@streamed
@pytest.mark.parametrize(
    "extra",
    ["[" * 900 + "]" * 900, "1e400", "9" * 400, "-0.0", '{"a":1,"a":2}', r'"\u0000\ud800"'],
    ids=["nested", "infinite", "long", "minus zero", "twice", "text"],
)
def test_json_that_is_hard_to_store(database: sa.Engine, extra: str, stream: bool) -> None:
    answer = ask(body_of(extra=extra), stream=stream)

    if isinstance(answer, ProviderError):
        assert answer.code == "bad_response"
    else:
        assert stored(database, answer).text == "a"


@streamed
@pytest.mark.parametrize(
    "body",
    [
        body_of("\xff").decode().encode("latin-1"),
        body_of("a\0b"),
        body_of("a\ud800b"),
        b"\xef\xbb\xbf" + body_of(),
        body_of(extra="NaN"),
        body_of(extra="9" * 5000),
        body_of(extra="[" * 100_000 + "]" * 100_000),
    ],
    ids=["UTF-8", "NUL", "surrogate", "BOM", "NaN", "number", "nested"],
)
def test_what_is_no_json_is_refused_clearly(body: bytes, stream: bool) -> None:
    answer = ask(body, stream=stream)

    assert isinstance(answer, ProviderError)
    assert (answer.code, answer.unknown_outcome) == ("bad_response", True)


@streamed
def test_names_that_are_hard_to_store(database: sa.Engine, stream: bool) -> None:
    answer = ask(body_of(finish=r"\u0000\ud800" + "x" * 500), stream=stream)

    assert isinstance(answer, Completion)
    assert (stored(database, answer).finish_reason or "").startswith("\ufffd\ufffdxxx")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters()) | st.text("a\0\ud800\udc00\ue000"), extra=JSON)
def test_any_answer_ends_up_in_its_row(database: sa.Engine, text: str, extra: Any) -> None:
    body = json.dumps(
        {"x": extra, "choices": [{"message": {"content": text}, "finish_reason": "stop"}]},
        allow_nan=True,
    ).encode()
    answer = ask(body)

    if isinstance(answer, ProviderError):
        assert answer.code == "bad_response"
        assert b"Infinity" in body
        return
    assert stored(database, answer).response == json.loads(body)
