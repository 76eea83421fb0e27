"""What every response cache does, the one in memory and the one in Redis; and Redis' troubles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis.asyncio

from promptfleet_workers.cache import MemoryCache, RedisCache, ResponseCache


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[ResponseCache]:
    cache: ResponseCache
    if request.param == "memory":
        cache = MemoryCache()
    else:
        cache = RedisCache(request.getfixturevalue("broker_url"), timeout_s=10)
    yield cache
    await cache.aclose()


@pytest.fixture
def key() -> Callable[[str], str]:
    """Names that no other test uses."""
    space = uuid.uuid4().hex
    return lambda name: f"promptfleet:test:{space}:{name}"


async def test_values_come_back_in_the_order_of_the_keys(
    cache: ResponseCache, key: Callable[[str], str]
) -> None:
    await cache.set_many([(key("a"), b"A", 60), (key("b"), b"\0\xff\r\n", 60)])

    assert await cache.get_many([key("b"), key("none"), key("a"), key("b")]) == [
        b"\0\xff\r\n",
        None,
        b"A",
        b"\0\xff\r\n",
    ]


async def test_nothing_asked_nothing_done(cache: ResponseCache) -> None:
    await cache.set_many([])

    assert await cache.get_many([]) == []


async def test_a_later_value_replaces_an_earlier_one(
    cache: ResponseCache, key: Callable[[str], str]
) -> None:
    await cache.set_many([(key("a"), b"old", 60)])
    await cache.set_many([(key("a"), b"newer", 60), (key("a"), b"newest", 60)])

    assert await cache.get_many([key("a")]) == [b"newest"]


async def test_a_value_is_gone_when_its_time_is_over(
    cache: ResponseCache, key: Callable[[str], str]
) -> None:
    await cache.set_many([(key("short"), b"1", 1), (key("long"), b"2", 60)])

    async with asyncio.timeout(10):
        while await cache.get_many([key("short")]) != [None]:
            await asyncio.sleep(0.02)

    assert await cache.get_many([key("long")]) == [b"2"]


async def test_thousands_at_once(cache: ResponseCache, key: Callable[[str], str]) -> None:
    items = [(key(str(n)), b"%d" % n, 60 + n % 3) for n in range(3_000)]

    await cache.set_many(items)

    keys = [name for name, _, _ in items]
    assert await cache.get_many(keys) == [value for _, value, _ in items]


async def test_concurrent_calls_do_not_mix(cache: ResponseCache, key: Callable[[str], str]) -> None:
    async def one(n: int) -> bool:
        await cache.set_many([(key(str(n)), b"%d" % n, 60)])
        return await cache.get_many([key(str(n))]) == [b"%d" % n]

    assert all(await asyncio.gather(*(one(n) for n in range(50))))


# -- memory


async def test_memory_forgets_what_was_not_used_for_longest() -> None:
    cache = MemoryCache(max_items=2)
    await cache.set_many([("a", b"A", 60), ("b", b"B", 60)])
    await cache.get_many(["a"])

    await cache.set_many([("c", b"C", 60)])

    assert await cache.get_many(["a", "b", "c"]) == [b"A", None, b"C"]


async def test_memory_follows_its_clock() -> None:
    now = 100.0
    cache = MemoryCache(clock=lambda: now)
    await cache.set_many([("a", b"A", 10)])

    now = 109.9
    assert await cache.get_many(["a"]) == [b"A"]
    now = 110.0
    assert await cache.get_many(["a"]) == [None]


# -- Redis


async def test_keys_expire_at_the_server(broker_url: str, key: Callable[[str], str]) -> None:
    cache = RedisCache(broker_url, timeout_s=10)
    await cache.set_many([(key("a"), b"1", 100), (key("b"), b"2", 3_000)])
    await cache.aclose()

    async with redis.asyncio.Redis.from_url(broker_url) as server:
        assert 90 <= await server.ttl(key("a")) <= 100
        assert 2_990 <= await server.ttl(key("b")) <= 3_000


async def test_a_server_that_forgot_the_script_learns_it_again(
    broker_url: str, key: Callable[[str], str]
) -> None:
    cache = RedisCache(broker_url, timeout_s=10)
    await cache.set_many([(key("a"), b"1", 60)])
    async with redis.asyncio.Redis.from_url(broker_url) as server:
        await server.script_flush()

    await cache.set_many([(key("b"), b"2", 60)])

    assert await cache.get_many([key("a"), key("b")]) == [b"1", b"2"]
    await cache.aclose()


async def test_an_absent_server_means_misses(caplog: pytest.LogCaptureFixture) -> None:
    async with _server(_hang) as (url, _):
        pass  # now nobody listens there
    cache = RedisCache(url, timeout_s=5)

    with caplog.at_level(logging.WARNING):
        assert await cache.get_many(["a", "b"]) == [None, None]
        await cache.set_many([("a", b"A", 60)])

    assert [record.message for record in caplog.records] == ["cache_unavailable"]
    await cache.aclose()


async def test_a_stalled_server_means_misses_in_time_and_a_pause() -> None:
    now = 0.0
    async with _server(_hang) as (url, connections):
        cache = RedisCache(url, timeout_s=0.1, cool_down_s=2, clock=lambda: now)
        async with asyncio.timeout(5):
            assert await cache.get_many(["a"]) == [None]
            assert len(connections) == 1

            assert await cache.get_many(["a"]) == [None]
            await cache.set_many([("a", b"A", 60)])
            assert len(connections) == 1  # left alone

            now = 2.0
            assert await cache.get_many(["a"]) == [None]
            assert len(connections) == 2
        await cache.aclose()


@pytest.mark.parametrize("reply", [b"-ERR no\r\n", b"-LOADING wait\r\n", b"garbage\r\n", b""])
async def test_a_broken_server_means_misses(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(reply)
        await writer.drain()

    async with _server(answer) as (url, _):
        cache = RedisCache(url, timeout_s=5, cool_down_s=0)
        assert await cache.get_many(["a"]) == [None]
        await cache.set_many([("a", b"A", 60)])
        await cache.aclose()


async def test_a_call_that_was_cancelled_leaves_no_reply_to_the_next_one(
    broker_url: str, key: Callable[[str], str]
) -> None:
    cache = RedisCache(broker_url, timeout_s=10)
    await cache.set_many([(key(str(n)), b"%d" % n, 60) for n in range(20)])

    for n in range(20):
        task = asyncio.create_task(cache.get_many([key(str(n))] * 1_000))
        for _ in range(n):
            await asyncio.sleep(0)  # another moment of the call each time
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        other = (n + 7) % 20
        assert await cache.get_many([key(str(other))]) == [b"%d" % other]
    await cache.aclose()


async def _hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@contextlib.asynccontextmanager
async def _server(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[tuple[str, list[object]]]:
    """A server that is none; its URL and its connections so far."""
    connections: list[object] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            await handler(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", connections
