"""What every response cache does, wherever it keeps its values; and the troubles of each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import stat
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.policies.caching import CacheSection
from promptfleet_workers.caching.building import build_cache
from promptfleet_workers.caching.custom import GuardedCache
from promptfleet_workers.caching.disk import DiskCache
from promptfleet_workers.caching.layers import SharedLayeredCache
from promptfleet_workers.caching.memory import MemoryCache
from promptfleet_workers.caching.protocol import Item, ResponseCache, Turn
from promptfleet_workers.caching.redis_cache import RedisCache


class Shelf:
    """A cache of a user's own."""

    def __init__(self, section: CacheSection) -> None:
        self.name = section.namespace
        self._values: dict[str, tuple[float, bytes]] = {}

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        now = time.monotonic()
        found = [self._values.get(key, (now, b"")) for key in keys]
        return [value if until > now else None for until, value in found]

    async def set_many(self, items: Sequence[Item]) -> None:
        now = time.monotonic()
        self._values.update((key, (now + ttl_s, value)) for key, value, ttl_s in items)

    async def aclose(self) -> None:
        self._values.clear()


CACHES: dict[str, dict[str, Any]] = {
    "memory": {"type": "memory"},
    "redis": {"type": "redis"},
    "disk": {"type": "disk", "connection": "PATH"},
    "custom": {"type": "custom", "factory": f"{__name__}:Shelf"},
    "memory-redis": {"type": "redis", "layers": ["memory"]},
    "memory-disk": {"type": "disk", "connection": "PATH", "layers": ["memory"]},
}


@pytest.fixture(params=CACHES)
async def cache(
    request: pytest.FixtureRequest, broker_url: str, tmp_path: Path, patient: None
) -> AsyncIterator[ResponseCache]:
    options = dict(CACHES[request.param])
    if "connection" in options:
        options["connection"] = str(tmp_path / "cache" / "answers.db")
    cache = build_cache(CacheSection.model_validate(options), broker_url)
    yield cache
    await cache.aclose()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason for a miss here."""
    for kind in (RedisCache, DiskCache, GuardedCache):
        defaults = kind.__init__.__kwdefaults__ or {}
        monkeypatch.setattr(kind.__init__, "__kwdefaults__", {**defaults, "timeout_s": 10.0})


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


async def test_memory_keeps_within_its_bytes() -> None:
    cache = MemoryCache(max_bytes=10_000)

    await cache.set_many([(str(n), b"x" * 1_000, 60) for n in range(50)])

    assert 5_000 < cache.size <= 10_000
    assert await cache.get_many(["0", "49"]) == [None, b"x" * 1_000]
    await cache.set_many([("49", b"", 60), ("big", b"x" * 20_000, 60)])
    assert await cache.get_many(["49", "big"]) == [None, None]
    assert cache.size == 0


# -- disk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.db"


async def test_what_is_on_disk_survives(path: Path) -> None:
    first = DiskCache(path, timeout_s=10)
    await first.set_many([("a", b"A", 60)])
    await first.aclose()
    second = DiskCache(path, timeout_s=10)

    assert await second.get_many(["a"]) == [b"A"]
    await second.aclose()


async def test_the_file_is_for_this_user_only(path: Path) -> None:
    cache = DiskCache(path, timeout_s=10)
    await cache.set_many([("a", b"A", 60)])

    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    await cache.aclose()


async def test_the_disk_keeps_within_its_bytes_and_what_is_used(path: Path) -> None:
    now = 1_000.0
    cache = DiskCache(path, max_bytes=100_000, timeout_s=10, clock=lambda: now)
    await cache.set_many([("used", b"u" * 1_000, 10_000)])
    for n in range(200):
        now += 100
        await cache.set_many([(str(n), b"x" * 1_000, 100_000)])
        if now < 10_000:
            assert await cache.get_many(["used"]) == [b"u" * 1_000]

    kept = [v for v in await cache.get_many([str(n) for n in range(200)]) if v is not None]
    assert 60 < len(kept) < 100
    assert await cache.get_many(["0", "199"]) == [None, b"x" * 1_000]
    await cache.aclose()
    with contextlib.closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("SELECT sum(size) FROM answers").fetchone()
    assert size <= 100_000


async def test_a_used_value_outlives_older_ones(path: Path) -> None:
    now = 1_000.0
    cache = DiskCache(path, max_bytes=10_000, timeout_s=10, clock=lambda: now)
    await cache.set_many([("used", b"u" * 1_000, 10_000), ("idle", b"i" * 1_000, 10_000)])
    now += 100
    await cache.get_many(["used"])
    now += 1

    await cache.set_many([(str(n), b"x" * 1_000, 10_000) for n in range(7)])

    assert await cache.get_many(["used", "idle"]) == [b"u" * 1_000, None]
    await cache.aclose()


FILL = """
import asyncio, pathlib, sys
from promptfleet_workers.caching.disk import DiskCache

async def fill(path, name):
    cache = DiskCache(pathlib.Path(path), timeout_s=30)
    for n in range(50):
        await cache.set_many([(f"{name}-{n}-{m}", b"%d" % m, 60) for m in range(5)])
        await cache.get_many([f"{name}-{n}-{m}" for m in range(5)])
    await cache.aclose()

asyncio.run(fill(*sys.argv[1:]))
"""


async def test_processes_share_a_file(path: Path) -> None:
    writers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", FILL, str(path), name)
        for name in "ab"
    ]
    async with asyncio.timeout(60):
        assert [await writer.wait() for writer in writers] == [0, 0]

    cache = DiskCache(path, timeout_s=10)
    keys = [f"{name}-{n}-{m}" for name in "ab" for n in range(50) for m in range(5)]
    assert None not in await cache.get_many(keys)
    await cache.aclose()


async def test_a_file_that_is_none_of_ours_means_misses(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b"something else" * 100)
    cache = DiskCache(path, timeout_s=10)

    with caplog.at_level(logging.WARNING):
        assert await cache.get_many(["a"]) == [None]
        await cache.set_many([("a", b"A", 60)])

    assert [record.message for record in caplog.records] == ["cache_unavailable"]
    await cache.aclose()


async def test_a_disk_that_is_busy_means_misses_and_never_blocks_the_loop(path: Path) -> None:
    cache = DiskCache(path, timeout_s=0.2, cool_down_s=0)
    await cache.set_many([("a", b"A", 60)])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await cache.set_many([("b", b"B", 60)])
        ticking.cancel()
        assert ticks > 2
        other.execute("ROLLBACK")
    async with asyncio.timeout(10):
        while await cache.get_many(["a"]) != [b"A"]:
            await asyncio.sleep(0.01)
    await cache.aclose()


# -- a user's own


class Broken(Shelf):
    async def get_many(self, keys: Sequence[str]) -> Any:
        if keys == ["short"]:
            return []
        if keys == ["wrong"]:
            return ["text"]
        if keys == ["slow"]:
            await asyncio.Event().wait()
        raise ZeroDivisionError

    async def set_many(self, items: Sequence[Item]) -> None:
        raise ZeroDivisionError

    async def aclose(self) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["raises", "short", "wrong", "slow"])
async def test_a_broken_cache_of_a_users_own_means_misses(name: str) -> None:
    cache = GuardedCache(Broken(CacheSection()), timeout_s=0.2, cool_down_s=0)

    assert await cache.get_many([name]) == [None]
    await cache.set_many([("a", b"A", 60)])
    await cache.aclose()


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("nowhere:Cache", "can't be imported"),
        (f"{__name__}:Nothing", "can't be imported"),
        ("plain-name", "promptfleet.caches"),
        ("builtins:object", "could not be called (TypeError"),
        ("builtins:repr", "lacks get_many, set_many, aclose"),
    ],
)
def test_a_cache_that_is_not_there_is_told(factory: str, told: str) -> None:
    section = CacheSection(type="custom", factory=factory)
    with pytest.raises(ConfigurationError) as caught:
        build_cache(section, "redis://127.0.0.1:1/0")
    assert str(caught.value).startswith("cache.factory: ")
    assert told in str(caught.value)


# -- layers


async def test_what_was_found_is_found_again_without_a_round_trip(
    broker_url: str, key: Callable[[str], str]
) -> None:
    section = CacheSection(layers=("memory",))
    writer = RedisCache(broker_url, timeout_s=10)
    await writer.set_many([(key("a"), b"A", 60)])
    cache = build_cache(section, broker_url)
    assert isinstance(cache, SharedLayeredCache)
    cache._shared._timeout_s = 10  # type: ignore[attr-defined]
    async with asyncio.timeout(10):
        while await cache.get_many([key("a")]) == [None]:
            await asyncio.sleep(0.01)
    async with redis.asyncio.Redis.from_url(broker_url) as server:
        await server.flushall()

    leased: set[str] = set()
    assert await cache.get_many([key("a")]) == [b"A"]
    assert await cache.ask([key("a"), key("b")], leased=leased) == [b"A", Turn.CALL]
    assert leased == {key("b")}
    await cache.aclose()
    await writer.aclose()


# -- leases


@pytest.fixture
async def two(broker_url: str) -> AsyncIterator[tuple[RedisCache, RedisCache]]:
    """The same server as two workers use it."""
    caches = RedisCache(broker_url, timeout_s=10), RedisCache(broker_url, timeout_s=10)
    yield caches
    for cache in caches:
        await cache.aclose()


Two = tuple[RedisCache, RedisCache]


async def test_the_first_calls_and_the_others_wait(two: Two, key: Callable[[str], str]) -> None:
    one, other = two
    leased: set[str] = set()

    assert await one.ask([key("a")], leased=leased) == [Turn.CALL]
    assert await other.ask([key("a"), key("b")], leased=leased) == [Turn.WAIT, Turn.CALL]
    assert await one.ask([key("a")], leased=leased) == [Turn.CALL]  # its own
    assert leased == {key("a"), key("b")}
    assert await other.get_many([key("a")]) == [None]  # a lease is no value

    await one.set_many([(key("a"), b"A", 60)])
    assert await other.ask([key("a")], leased=leased) == [b"A"]


async def test_a_lease_is_released_by_who_has_it_only(two: Two, key: Callable[[str], str]) -> None:
    one, other = two
    await one.ask([key("a")], leased=set())

    await other.release([key("a")])
    assert await other.ask([key("a")], leased=set()) == [Turn.WAIT]
    await one.release([key("a")])
    assert await other.ask([key("a")], leased=set()) == [Turn.CALL]
    await one.renew([key("a")])
    assert await one.ask([key("a")], leased=set()) == [Turn.WAIT]


async def test_a_value_is_no_lease_to_release(two: Two, key: Callable[[str], str]) -> None:
    one, other = two
    await other.set_many([(key("a"), b"A", 60)])

    await one.release([key("a")])
    await one.renew([key("a")])

    assert await one.get_many([key("a")]) == [b"A"]


async def test_leases_end_by_themselves_unless_renewed(
    broker_url: str, key: Callable[[str], str]
) -> None:
    brief = RedisCache(broker_url, timeout_s=10, lease_s=0.4)
    other = RedisCache(broker_url, timeout_s=10)
    await brief.ask([key("a"), key("b")], leased=set())
    begun = time.monotonic()
    async with asyncio.timeout(10):
        while await other.ask([key("b")], leased=set()) == [Turn.WAIT]:
            await brief.renew([key("a")])
            await asyncio.sleep(0.02)

    assert time.monotonic() - begun > 0.3
    assert await other.ask([key("a")], leased=set()) == [Turn.WAIT]
    await brief.aclose()
    await other.aclose()


async def test_only_what_is_waited_for_is_told(two: Two, key: Callable[[str], str]) -> None:
    one, other = two
    heard: list[str] = []
    ready = asyncio.Event()
    listening = asyncio.create_task(other.listen(ready.set, heard.extend))
    async with asyncio.timeout(10):
        await ready.wait()
    await one.ask([key("a"), key("b"), key("c"), key("d")], leased=set())
    await other.ask([key("b"), key("d")], leased=set())

    await one.set_many([(key("a"), b"", 60), (key("b"), b"", 60)])
    await one.release([key("c"), key("d")])

    async with asyncio.timeout(10):
        while len(heard) < 2:
            await asyncio.sleep(0.005)
    assert heard == [key("b"), key("d")]
    listening.cancel()


async def test_without_a_server_everybody_calls_and_nobody_listens() -> None:
    cache = RedisCache("redis://127.0.0.1:1/0", timeout_s=5)
    leased: set[str] = set()

    assert await cache.ask(["a"], leased=leased) == [Turn.CALL]
    assert not leased
    await cache.renew(["a"])
    await cache.release(["a"])
    async with asyncio.timeout(10):
        await cache.listen(lambda: None, lambda _: None)
    await cache.aclose()


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
