"""What users write, as mypy and pyright see it; it runs too, without servers."""

from __future__ import annotations

import datetime as dt
import time
from typing import assert_type

from starlette.datastructures import Headers as StarletteHeaders
from werkzeug.datastructures import Headers as WerkzeugHeaders

from promptfleet import (
    AsyncClient,
    AsyncPromptJob,
    CacheOptions,
    CallbackEvent,
    Client,
    InvalidRequestError,
    JobState,
    OnUnknown,
    Prompt,
    PromptJob,
    PromptOptions,
    Result,
    StoreUnavailableError,
    Token,
    cancel,
    enqueue_prompt,
    enqueue_prompts,
    get_result,
    verify_callback,
    wait_for_result,
)
from promptfleet.testing import EnqueuedPrompt, FakeFleet, fake_fleet
from promptfleet_shared.signing import new_secret, sign


def test_functions() -> None:
    with fake_fleet("yes") as fleet:
        assert_type(fleet, FakeFleet)
        job = enqueue_prompt(
            [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
            tier="basic",
            temperature=0,
            stop=["a"],
            deadline=dt.timedelta(hours=1),
            cache=CacheOptions(ttl_s=60),
        )
        assert_type(job, PromptJob)
        assert_type(job.state(), JobState)
        assert_type(job.result(timeout=1), Result)
        assert_type(job.cancel(), bool)
        assert_type(get_result(job.id), Result | None)
        assert_type(wait_for_result(str(job.id), 1.5), Result)
        assert_type(cancel(job.id), bool)
        assert_type(StoreUnavailableError().unknown_outcome, bool)
        assert_type(fleet.assert_enqueued(tier="basic"), EnqueuedPrompt)


def test_options_are_checked() -> None:
    shared: PromptOptions = {"tier": "basic", "max_tokens": 100, "on_unknown": OnUnknown.FAIL}
    own: Prompt = {"prompt": "b", "idempotency_key": "k", "on_unknown": "retry"}
    with fake_fleet():
        jobs = enqueue_prompts(["a", own, [{"role": "user", "content": "c"}]], **shared)
        assert_type(jobs, list[PromptJob])
        try:
            enqueue_prompt("a", on_unknown="never")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except InvalidRequestError as error:
            assert_type(error.field, str)
        try:
            enqueue_prompt("a", tier=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except InvalidRequestError as error:
            assert_type(error.field, str)
        else:
            raise AssertionError


async def test_clients() -> None:
    with fake_fleet(lambda prompt: prompt.text):
        with Client() as client:
            assert_type(client.enqueue_prompt("a", cache=False), PromptJob)
            for result in client.as_completed([client.enqueue_prompt("b").id]):
                assert_type(result, Result)
        async with AsyncClient() as async_client:
            job = await async_client.enqueue_prompt("a", cache="refresh")
            assert_type(job, AsyncPromptJob)
            assert_type(await job.result(), Result)
            async for result in async_client.as_completed([job.id]):
                assert_type(result, Result)


async def test_streams() -> None:
    with fake_fleet():
        job = enqueue_prompt("a", stream=True)
        for token in job.tokens(timeout=1):
            assert_type(token, Token)
        assert_type(job.stream(on_token=print, on_error=print), Result | None)
        async with AsyncClient() as client:
            async for token in (await client.enqueue_prompt("a", stream=True)).tokens():
                assert_type(token.restarts, bool)


def test_callbacks_with_the_headers_of_frameworks() -> None:
    secret, now, body = (
        new_secret(),
        int(time.time()),
        '{"type":"x","timestamp":"2030-01-01","data":{}}',
    )
    headers = {
        "Webhook-Id": "msg_1",
        "Webhook-Timestamp": str(now),
        "Webhook-Signature": sign([secret], "msg_1", now, body.encode()),
    }
    event = verify_callback(body, headers, secret)
    assert_type(event, CallbackEvent)
    assert verify_callback(body.encode(), StarletteHeaders(headers), [secret]) == event
    assert verify_callback(body, WerkzeugHeaders(headers), (secret,), tolerance_s=60) == event
