"""A job's text for a client that can take nothing back.

A job that is tried again begins its answer anew. OpenAI's streams have no word for that: so the new
answer is held back while it says what the client has read already, and goes on from there. If it
says something else, the stream ends with an error, as a broken one does there; the job goes on.

An answer that is checked, and may be replaced by the next tier's, is not told before it is final:
then it comes in one piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from promptfleet.api.errors import OURS, ApiError
from promptfleet.api.openai.answering import Accepted, Asked
from promptfleet.api.openai.failures import JOB_HEADER
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import JobSpec, Result
from promptfleet_shared.policies.routing import TRIAGE
from promptfleet_shared.policies.tier_choice import DECISION
from promptfleet_shared.token_stream import EventKind, StreamEvent

HOLD_S = 2.0
"""Seconds that a stream's status is held back for its first token: what is refused by then gets
the status that it would have without streaming."""

News = str | Result
"""The next characters, or how the job ended."""


class Retold:
    """What a client has read, and the answer that begins anew behind it."""

    def __init__(self) -> None:
        """Nothing was read."""
        self._read: list[str] = []
        self._again: str | None = None

    def reset(self) -> None:
        """The answer begins anew."""
        self._again = ""

    def next(self, text: str) -> str | None:
        """What to tell the client of this text; None if it has read something else."""
        if self._again is None:
            self._read.append(text)
            return text
        known = "".join(self._read)
        self._again += text
        shared = min(len(known), len(self._again))
        if known[:shared] != self._again[:shared]:
            return None
        fresh = self._again[len(known) :]
        if len(self._again) >= len(known):
            self._read, self._again = [self._again], None
        return fresh


def may_be_replaced(spec: JobSpec, fleet: Fleet) -> bool:
    """True if the job's answer is checked as a whole, and the next tier may be asked for another.

    By this process's fleet.toml: where a worker's says otherwise, `follow` copes with that, too.
    """
    if spec.model is not None:
        return False
    names = tuple(fleet.tier_names)
    by = ((spec.decision or {}).get(DECISION) or {}).get("by")
    # A small model may still move it to whichever tier.
    tiers = [tier for tier in names[:-1] if tier == spec.tier or by == TRIAGE]
    own = (spec.policy or {}).get("escalate_on")
    if own is not None:
        return bool(own and tiers)
    sections = (fleet.tiers[tier].escalate_on for tier in tiers)
    return any(section is not None and not section.is_empty for section in sections)


async def follow(
    asked: Asked, accepted: Accepted, *, whole: bool = False
) -> AsyncGenerator[News, None]:
    """The job's text as it comes, and its result at last.

    Args:
        asked: The request.
        accepted: Its job.
        whole: Say nothing before the answer is final.

    Raises:
        ApiError: A new answer contradicts what was told.
        StoreUnavailableError: The database can't be reached.
    """
    retold = Retold()
    events = asked.services.streams.follow(asked.tenant, accepted.id)
    async with aclosing(events):
        async for event in events:
            news = _whole_news(event) if whole else _news(event, retold, accepted)
            for item in news:
                yield item


def _news(event: StreamEvent, retold: Retold, accepted: Accepted) -> list[News]:
    if event.kind is EventKind.RESET:
        retold.reset()
    elif event.kind is EventKind.TOKEN:
        text = retold.next(event.text)
        if text is None:
            raise started_anew(accepted)
        return [text] if text else []
    elif event.result is not None:
        return [event.result]
    return []


def _whole_news(event: StreamEvent) -> list[News]:
    result = event.result
    if result is None:
        return []
    return [result.text, result] if result.succeeded and result.text else [result]


def started_anew(accepted: Accepted) -> ApiError:
    """The error in the middle of a stream whose answer begins anew with other words."""
    message = (
        "The answer was broken off and begins anew with other words;"
        f" GET /v1/jobs/{accepted.id}?wait=60 has the whole of it."
    )
    headers = {JOB_HEADER: str(accepted.id)}
    return ApiError(502, message, type=OURS, code="stream_restarted", headers=headers)


class Begun:
    """News of which the first one was waited for already, for a while."""

    def __init__(self, news: AsyncGenerator[News, None]) -> None:
        """Wait for nothing yet."""
        self._news = news
        self._first: asyncio.Future[News] | None = None

    async def first(self, within_s: float) -> News | None:
        """The first one; None if it takes longer. It comes again when these are gone through.

        Raises:
            As `follow`.
        """
        self._first = asyncio.ensure_future(anext(self._news))
        await asyncio.wait({self._first}, timeout=within_s)
        return self._first.result() if self._first.done() else None

    async def __aiter__(self) -> AsyncIterator[News]:
        """All of them."""
        if self._first is not None:
            yield await self._first
        async for item in self._news:
            yield item

    async def aclose(self) -> None:
        """Follow no longer."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.wait({self._first})
        await self._news.aclose()
