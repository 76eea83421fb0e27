"""Token streams between a worker's writer and readers, with a real Valkey in between."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.rows import outcome
from uuid_utils.compat import uuid7

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet.stream_watcher import Listener, StreamWatcher
from promptfleet.token_sources import RedisTokenSource, TokenSources
from promptfleet_shared.jobs import CacheOptions, ClaimedJob, JobKind, JobState, OnUnknown
from promptfleet_shared.token_stream import (
    ENDED_TTL_S,
    LIVE_TTL_S,
    MAX_BYTES,
    Take,
    stream_key,
)
from promptfleet_workers.token_streams import TokenStreams

PATIENCE_S = 20.0


def claimed(*, fence: int = 1, stream: bool = True) -> ClaimedJob:
    return ClaimedJob(
        id=uuid7(),
        fence=fence,
        tenant="default",
        tier="basic",
        kind=JobKind.CHAT,
        model=None,
        request="{}",
        input_tokens=1,
        priority=5,
        cache=CacheOptions(),
        attempt=1,
        deferrals=0,
        calls=0,
        on_unknown=OnUnknown.RETRY,
        queued_ms=0,
        remaining_s=60,
        stream=stream,
    )


@pytest.fixture
async def streams(broker_url: str) -> AsyncIterator[TokenStreams]:
    writer = TokenStreams(broker_url, timeout_s=PATIENCE_S)
    yield writer
    await writer.aclose()


@pytest.fixture
async def watcher(broker_url: str) -> AsyncIterator[StreamWatcher]:
    reader = StreamWatcher(broker_url, retry_s=0.02)
    yield reader
    await reader.aclose()


def begin(streams: TokenStreams, job: ClaimedJob) -> Callable[[str], None]:
    on_text = streams.begin([job])
    assert on_text is not None
    return on_text


def end(streams: TokenStreams, job: ClaimedJob, text: str | None, **fields: object) -> None:
    """Its outcome is written down."""
    streams.ending(job)
    streams.ended([outcome(job, text=text, **fields)], {job.id})


async def until(listener: Listener, condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await listener.wait()


async def heard(listener: Listener, text: str) -> None:
    try:
        await until(listener, lambda: listener.transcript.since(0) == text)
    except TimeoutError:
        pytest.fail(f"{listener.transcript.since(0)!r} came, and not {text!r}")


async def test_text_comes_as_it_is_heard_and_then_the_end(
    streams: TokenStreams, watcher: StreamWatcher
) -> None:
    job = claimed()
    with watcher.watch(job.id) as listener:
        on_text = begin(streams, job)
        on_text("Hel")
        await heard(listener, "Hel")
        on_text("lo ")
        on_text("wor")
        await heard(listener, "Hello wor")
        assert listener.transcript.state is None

        end(streams, job, "Hello world")

        await until(listener, lambda: listener.transcript.state)
        assert listener.transcript.since(0) == "Hello world"
        assert listener.transcript.state is JobState.SUCCEEDED


async def test_who_comes_late_gets_the_whole(streams: TokenStreams, watcher: StreamWatcher) -> None:
    job = claimed()
    on_text = begin(streams, job)
    with watcher.watch(job.id) as first:
        on_text("Hello")
        await heard(first, "Hello")
        with watcher.watch(job.id) as second:
            await heard(second, "Hello")
            assert second.transcript is first.transcript  # however many listen, it is held once
    with watcher.watch(job.id) as third:
        await heard(third, "Hello")
    assert watcher.watched == 0


async def test_a_new_watch_does_not_wait_for_the_read_that_is_under_way(
    streams: TokenStreams, watcher: StreamWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptfleet.stream_watcher.BLOCK_S", 3_600.0)
    quiet, job = claimed(), claimed()
    begin(streams, job)("Hello")
    with watcher.watch(quiet.id), watcher.watch(claimed().id):
        await asyncio.sleep(0)
        for _ in range(3):  # the first of them finds a read that has begun
            with watcher.watch(job.id) as listener:
                await heard(listener, "Hello")


async def test_an_answer_that_was_not_streamed_is_one_piece(
    streams: TokenStreams, watcher: StreamWatcher
) -> None:
    job = claimed()
    with watcher.watch(job.id) as listener:
        end(streams, job, "from the cache")

        await until(listener, lambda: listener.transcript.state)
        assert listener.transcript.since(0) == "from the cache"


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
async def test_other_ends_are_told_too(
    streams: TokenStreams, watcher: StreamWatcher, state: JobState
) -> None:
    job = claimed()
    with watcher.watch(job.id) as listener:
        begin(streams, job)("half of")
        end(streams, job, None, state=state)

        await until(listener, lambda: listener.transcript.state)
        assert listener.transcript.state is state
        assert listener.transcript.since(0) == "half of"


async def test_an_outcome_that_the_fence_refused_ends_nothing(
    streams: TokenStreams, watcher: StreamWatcher
) -> None:
    job, witness = claimed(), claimed()
    with watcher.watch(job.id) as listener, watcher.watch(witness.id) as other:
        streams.ending(job)
        streams.ended([outcome(job, text="too late")], set())
        end(streams, witness, "in time")

        await until(other, lambda: other.transcript.state)
        assert (listener.transcript.length, listener.transcript.state) == (0, None)


async def test_a_worker_that_lost_its_claim_writes_in_vain(
    streams: TokenStreams, watcher: StreamWatcher, broker_url: str
) -> None:
    old = claimed()
    new = old._replace(fence=2)
    zombie = TokenStreams(broker_url, timeout_s=PATIENCE_S)
    with watcher.watch(old.id) as listener:
        late = begin(zombie, old)
        late("old ")
        await heard(listener, "old ")
        on_text = begin(streams, new)
        on_text("new ")
        await heard(listener, "new ")

        late("old again ")
        await zombie.aclose()  # writes it
        on_text("and whole")

        await heard(listener, "new and whole")
    texts = [fields[b"t"] for _, fields in entries(broker_url, old.id)]
    assert b"".join(texts) == b"new and whole"  # the old take's entries are gone


async def test_a_second_call_is_a_take_of_its_own(
    streams: TokenStreams, watcher: StreamWatcher
) -> None:
    job = claimed()
    with watcher.watch(job.id) as listener:
        first = begin(streams, job)
        first("from the first model")
        await heard(listener, "from the first model")
        second = begin(streams, job)
        first("which is still talking")
        second("from the second")

        await heard(listener, "from the second")
        assert listener.transcript.take == Take(1, 2)


async def test_what_can_not_be_stored_looks_as_in_the_result(
    streams: TokenStreams, watcher: StreamWatcher
) -> None:
    job = claimed()
    with watcher.watch(job.id) as listener:
        begin(streams, job)("a\0b")
        await heard(listener, "a\ufffdb")
        end(streams, job, "a\0b, whole")

        await heard(listener, "a\ufffdb, whole")


async def test_streams_are_bounded_and_expire(
    streams: TokenStreams, watcher: StreamWatcher, broker_url: str
) -> None:
    job, long = claimed(), claimed()
    with redis.Redis.from_url(broker_url) as server, watcher.watch(job.id) as listener:
        on_text = begin(streams, job)
        on_text("Hello")
        await heard(listener, "Hello")
        assert 0 < server.ttl(stream_key(job.id)) <= LIVE_TTL_S
        end(streams, job, "Hello")
        await until(listener, lambda: listener.transcript.state)
        assert 0 < server.ttl(stream_key(job.id)) <= ENDED_TTL_S

        with watcher.watch(long.id) as other:
            on_text = begin(streams, long)
            for _ in range(100):
                on_text("x" * 10_000)
                async with asyncio.timeout(PATIENCE_S):
                    while streams._dirty or streams._write:
                        await asyncio.sleep(0.001)
            end(streams, long, "x" * 1_000_000)
            await until(other, lambda: other.transcript.state)
            assert other.transcript.length <= MAX_BYTES
        assert (server.memory_usage(stream_key(long.id)) or 0) < 2 * MAX_BYTES


async def test_many_streams_share_a_round_trip(
    streams: TokenStreams, watcher: StreamWatcher, broker_url: str
) -> None:
    jobs = [claimed() for _ in range(200)]
    with redis.Redis.from_url(broker_url) as server:
        before = calls_of(server, "evalsha")
        with watcher.watch(jobs[-1].id) as listener:
            for job in jobs:
                begin(streams, job)("Hello")
            await heard(listener, "Hello")
        assert server.exists(*(stream_key(job.id) for job in jobs)) == len(jobs)
        assert calls_of(server, "evalsha") - before <= 3


async def test_without_stream_or_for_shared_calls_nothing_is_written(
    streams: TokenStreams, broker_url: str
) -> None:
    plain, one, two = claimed(stream=False), claimed(), claimed()

    assert streams.begin([plain]) is None
    assert streams.begin([one, two]) is None
    end(streams, plain, "text")
    await streams.aclose()

    assert entries(broker_url, plain.id) == []


@pytest.mark.parametrize("lose_data", [False, True])
async def test_a_restart_of_redis_costs_no_text(tmp_path: Path, lose_data: bool) -> None:
    job = claimed()
    with EmbeddedValkey(tmp_path / "valkey") as server:
        streams = TokenStreams(server.url, cool_down_s=0.02)
        watcher = StreamWatcher(server.url, retry_s=0.02)
        with watcher.watch(job.id) as listener:
            on_text = begin(streams, job)
            on_text("one ")
            await heard(listener, "one ")
            await asyncio.to_thread(server.kill)
            on_text("two ")
            async with asyncio.timeout(PATIENCE_S):
                while not streams._is_away:  # a write has failed; what it had is not lost
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(server.restart, lose_data=lose_data)
            await heard(listener, "one two ")
            on_text("three")

            await heard(listener, "one two three")
        await watcher.aclose()
        await streams.aclose()


async def test_without_redis_nothing_waits_and_nothing_is_raised() -> None:
    job = claimed()
    streams = TokenStreams("redis://127.0.0.1:1", cool_down_s=0.01)
    watcher = StreamWatcher("redis://127.0.0.1:1", retry_s=0.01)
    source = RedisTokenSource(redis.Redis.from_url("redis://127.0.0.1:1"), job.id)
    with watcher.watch(job.id) as listener:
        on_text = begin(streams, job)
        for _ in range(100):
            on_text("x" * 10_000)  # more than is kept
            await asyncio.sleep(0)
        end(streams, job, "x" * 1_000_000)

        assert not await listener.wait(0.05)
        assert not source.read(0.01)
    async with asyncio.timeout(PATIENCE_S):
        await watcher.aclose()
        await streams.aclose()


async def test_a_thread_reads_a_stream_by_itself(streams: TokenStreams, broker_url: str) -> None:
    job = claimed()
    sources = TokenSources(broker_url)
    with sources.of(job.id) as source:
        assert not source.read(0)
        assert not source.read(0.001)
        on_text = begin(streams, job)
        on_text("Hello")
        assert await asyncio.to_thread(source.read, 4.0)
        assert source.transcript.since(0) == "Hello"
        on_text(" world")
        assert await asyncio.to_thread(source.read, 4.0)
        assert source.transcript.since(0) == "Hello world"
    sources.close()


def entries(url: str, job_id: uuid.UUID) -> list[tuple[bytes, dict[bytes, bytes]]]:
    with redis.Redis.from_url(url, protocol=2) as server:
        found: Any = server.xrange(stream_key(job_id))
        return list(found)


def calls_of(server: redis.Redis, command: str) -> int:
    stats = server.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))
