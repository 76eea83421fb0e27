"""A job's text as it comes: what `tokens()` and `stream()` of the handles do."""

from __future__ import annotations

import contextlib
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from promptfleet.backends import AsyncBackend, Backend
from promptfleet.transcripts import Reader
from promptfleet.waiting import Watch, succeeded
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.jobs import Result
from promptfleet_shared.token_stream import EventKind, StreamEvent

LIVE_LOOK_S = 2.0
"""Seconds between two looks for the result while tokens come."""

Clock = Callable[[], float]


class Token(str):
    """A piece of a job's text: one of the provider's tokens, or a few.

    Attributes:
        restarts: True where the answer begins anew, since its first try broke off in the middle or
            failed its tier's check: drop what came before.
    """

    __slots__ = ("restarts",)

    restarts: bool

    def __new__(cls, text: str, *, restarts: bool = False) -> Self:
        """A piece with this text."""
        token = super().__new__(cls, text)
        token.restarts = restarts
        return token


OnToken = Callable[[Token], object]
OnComplete = Callable[[Result], object]
OnError = Callable[[PromptFleetError], object]


class _Pieces:
    """Makes tokens of events; `result` is there once the job has succeeded."""

    def __init__(self) -> None:
        self.result: Result | None = None
        self._restarts = False

    def take(self, event: StreamEvent) -> Token | None:
        if event.kind is EventKind.RESET:
            self._restarts = True
        if event.result is not None:
            self.result = succeeded(event.result)
        if event.kind is not EventKind.TOKEN:
            return None
        token = Token(event.text, restarts=self._restarts)
        self._restarts = False
        return token


class Tokens(_Pieces):
    """Iterates over a job's tokens; ends as `PromptJob.result` does."""

    def __init__(self, events: Iterator[StreamEvent]) -> None:
        """Go through these events."""
        super().__init__()
        self._events = events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        for event in self._events:
            if (token := self.take(event)) is not None:
                return token
        raise StopIteration


class AsyncTokens(_Pieces):
    """Iterates over a job's tokens; ends as `AsyncPromptJob.result` does."""

    def __init__(self, events: AsyncIterator[StreamEvent]) -> None:
        """Go through these events."""
        super().__init__()
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        async for event in self._events:
            if (token := self.take(event)) is not None:
                return token
        raise StopAsyncIteration


# -- synchronous -----------------------------------------------------------------------------


def follow(
    backend: Backend, job_id: uuid.UUID, watch: Watch, clock: Clock = time.monotonic
) -> Iterator[StreamEvent]:
    """The job's text as it comes, and its end.

    Raises:
        JobNotFoundError: There is no such job.
        WaitTimeoutError: It is not final within the watch's time.
    """
    reader, source = Reader(), None
    with contextlib.ExitStack() as closing:
        while True:
            ended = watch.feed(backend.look_up(watch.pending, with_states=watch.wants_states))
            if source is None:  # not before the job was found: it is this tenant's
                source = closing.enter_context(backend.token_source(job_id))
            for result in ended:
                while source.read(0):
                    yield from reader.read(source.transcript)
                yield from reader.settle(result)
                return
            over = clock() + watch.pause()
            is_told = source.transcript.state is not None
            while (left_s := over - clock()) > 0 and (is_told or not source.transcript.state):
                if source.read(left_s):
                    yield from reader.read(source.transcript)
                    over = clock() + min(LIVE_LOOK_S, watch.left_s)


def stream(
    heard: Tokens,
    *,
    on_token: OnToken | None,
    on_complete: OnComplete | None,
    on_error: OnError | None,
) -> Result | None:
    """Call back for each token and for the end; see `PromptJob.stream`."""
    while True:
        try:
            token = next(heard)  # not in a `for`: what a callback raises is its owner's
        except StopIteration:
            break
        except PromptFleetError as error:
            if on_error is None:
                raise
            on_error(error)
            return None
        if on_token is not None:
            on_token(token)
    if on_complete is not None and heard.result is not None:
        on_complete(heard.result)
    return heard.result


# -- asynchronous ----------------------------------------------------------------------------


async def follow_async(
    backend: AsyncBackend, job_id: uuid.UUID, watch: Watch, clock: Clock = time.monotonic
) -> AsyncIterator[StreamEvent]:
    """The job's text as it comes, and its end; see `follow`."""
    reader, source = Reader(), None
    with contextlib.ExitStack() as closing:
        while True:
            ended = watch.feed(await backend.look_up(watch.pending, with_states=watch.wants_states))
            if source is None:
                source = closing.enter_context(backend.token_source(job_id))
            for result in ended:
                while await source.read(0):
                    for event in reader.read(source.transcript):
                        yield event
                for event in reader.settle(result):
                    yield event
                return
            over = clock() + watch.pause()
            is_told = source.transcript.state is not None
            while (left_s := over - clock()) > 0 and (is_told or not source.transcript.state):
                if await source.read(left_s):
                    for event in reader.read(source.transcript):
                        yield event
                    over = clock() + min(LIVE_LOOK_S, watch.left_s)


async def stream_async(
    heard: AsyncTokens,
    *,
    on_token: OnToken | None,
    on_complete: OnComplete | None,
    on_error: OnError | None,
) -> Result | None:
    """The same as `stream`; a callback may be a coroutine function."""
    while True:
        try:
            token = await anext(heard)
        except StopAsyncIteration:
            break
        except PromptFleetError as error:
            if on_error is None:
                raise
            await _awaited(on_error(error))
            return None
        if on_token is not None:
            await _awaited(on_token(token))
    if on_complete is not None and heard.result is not None:
        await _awaited(on_complete(heard.result))
    return heard.result


async def _awaited(value: object) -> None:
    if inspect.isawaitable(value):
        await value
