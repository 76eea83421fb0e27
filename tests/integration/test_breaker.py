"""One breaker over several workers: a probe, a ramp and a retry budget for the whole fleet."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis
from tests.processes import Process
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.fleet import BreakerOptions
from promptfleet_workers.breaker import (
    FIRST_SHARE,
    BreakerState,
    Permit,
    Refusal,
)
from promptfleet_workers.breaker_exchange import KEY, BreakerExchange
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.telemetry import BreakerChanged, Event, KeyStopped

FAST = BreakerOptions(window_s=3, cool_down_s=0.2, max_cool_down_s=1, ramp_s=0.5)
PROGRAM = Path(__file__).with_name("breaker_worker.py")


class CountedExchange(BreakerExchange):
    """Knows how often it has been made."""

    times = 0

    async def exchange(self) -> bool:
        done = await super().exchange()
        self.times += 1
        return done


class Worker:
    """The breakers of one worker, and the exchange that runs beside them."""

    def __init__(self, url: str, options: BreakerOptions = FAST, *, limit: int = 64) -> None:
        self.events: list[Event] = []
        self.ramp_from = float("inf")
        self.breakers = Breakers({"a": limit, "b": limit}, options=options, emit=self._note)
        self.exchange = CountedExchange(self.breakers, url, interval_s=0.05, idle_s=0.1)
        self._running: asyncio.Task[None] | None = None

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, BreakerChanged) and event.state == "ramp":
            self.ramp_from = time.monotonic()

    @property
    def state(self) -> BreakerState:
        return self.breakers.snapshot()[0].state

    def start(self) -> None:
        self._running = asyncio.create_task(self.exchange.run())

    async def stop(self) -> None:
        await self.exchange.aclose()
        if self._running is not None:
            await self._running

    def call(self, ok: bool | None, times: int = 1, name: str = "a") -> None:
        for _ in range(times):
            permit = self.breakers.admit(name, retry=False)
            assert isinstance(permit, Permit)
            self.breakers.ended(permit, ok=ok)

    def ask(self, *, retry: bool = False) -> Permit | Refusal:
        return self.breakers.admit("a", retry=retry)


MakeWorkers = Callable[..., list[Worker]]


@pytest.fixture
async def make(broker_url: str) -> AsyncIterator[MakeWorkers]:
    """Workers of a fleet; all of them end with the test."""
    made: list[Worker] = []

    def workers(number: int, options: BreakerOptions = FAST, *, limit: int = 64) -> list[Worker]:
        new = [Worker(broker_url, options, limit=limit) for _ in range(number)]
        for worker in new:
            worker.start()
        made.extend(new)
        return new

    yield workers
    for worker in made:
        await worker.stop()


async def until(condition: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.005)


async def while_all_exchange(workers: list[Worker], times: int) -> AsyncIterator[None]:
    """Again and again, until each has exchanged so often from now on."""
    ends = [worker.exchange.times + times for worker in workers]
    while any(worker.exchange.times < end for worker, end in zip(workers, ends, strict=True)):
        yield
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def by_hand(url: str, options: BreakerOptions) -> AsyncIterator[tuple[Worker, Worker]]:
    """Two workers that exchange only when told to."""
    workers = Worker(url, options), Worker(url, options)
    yield workers
    for worker in workers:
        await worker.stop()


async def probe_of(workers: list[Worker]) -> tuple[Worker, Permit]:
    """Let all ask until one of them may."""
    found: list[tuple[Worker, Permit]] = []

    def ask() -> bool:
        for worker in workers:
            answer = worker.ask()
            if isinstance(answer, Permit):
                found.append((worker, answer))
        return bool(found)

    await until(ask, "a probe")
    assert len(found) == 1
    return found[0]


async def open_all(workers: list[Worker]) -> None:
    workers[0].call(False, 20)
    await until(lambda: all(w.state is not BreakerState.CLOSED for w in workers), "all open")


async def test_it_opens_by_what_the_fleet_saw_together(make: MakeWorkers) -> None:
    workers = make(4)

    for worker in workers[:3]:
        worker.call(False, 6)
    workers[3].call(True)
    await until(lambda: all(not w.breakers.all()[0].busy for w in workers), "all is told")
    await until(lambda: workers[3].breakers.snapshot()[0].calls == 19, "all is known")
    assert {worker.state for worker in workers} == {BreakerState.CLOSED}
    workers[3].call(True)

    await until(lambda: all(isinstance(w.ask(), Refusal) for w in workers), "all refuse")
    other = workers[0].breakers.snapshot()[1]
    assert (other.deployment, other.state) == ("b", BreakerState.CLOSED)
    events = [e for w in workers for e in w.events if isinstance(e, BreakerChanged)]
    assert [(e.deployment, e.state, e.fleet) for e in events] == [("a", "open", True)] * 4


async def test_a_worker_that_joins_knows_what_the_fleet_knows(make: MakeWorkers) -> None:
    await open_all(make(2, FAST.model_copy(update={"cool_down_s": 60})))

    (new,) = make(1, FAST)
    await until(lambda: new.state is BreakerState.OPEN, "it knows")


async def test_trouble_of_one_worker_is_not_the_fleets(make: MakeWorkers) -> None:
    troubled, *others = make(4)
    for worker in others:
        worker.call(True, 20)
    await until(lambda: others[0].breakers.snapshot()[0].calls == 60, "all is known")

    troubled.call(False, 20)

    await until(lambda: others[0].breakers.snapshot()[0].failed == 20, "the others heard of it")
    assert {worker.state for worker in others} == {BreakerState.CLOSED}
    assert troubled.state is not BreakerState.CLOSED


async def test_one_probe_for_the_whole_fleet(make: MakeWorkers) -> None:
    workers = make(4, FAST.model_copy(update={"max_cool_down_s": 60}))
    await open_all(workers)

    prober, permit = await probe_of(workers)

    async for _ in while_all_exchange(workers, 8):  # time enough for another one
        assert all(isinstance(worker.ask(), Refusal) for worker in workers)
    prober.breakers.ended(permit, ok=True)
    await until(lambda: all(w.state is BreakerState.RAMP for w in workers), "the ramp")
    await until(lambda: all(w.state is BreakerState.CLOSED for w in workers), "all is well")


def all_wait(workers: list[Worker], for_s: float) -> bool:
    return all(for_s / 2 < w.breakers.snapshot()[0].until_s <= for_s for w in workers)


async def test_a_failed_probe_opens_it_again_for_longer(make: MakeWorkers) -> None:
    workers = make(3, FAST.model_copy(update={"cool_down_s": 0.3, "max_cool_down_s": 100}))
    await open_all(workers)

    for cool_down_s in (0.6, 1.2):
        prober, permit = await probe_of(workers)
        prober.breakers.ended(permit, ok=False)
        await until(
            functools.partial(all_wait, workers, cool_down_s), f"all wait for {cool_down_s} s"
        )


async def test_a_probe_that_says_nothing_passes_the_token_on(make: MakeWorkers) -> None:
    workers = make(3)
    await open_all(workers)
    prober, permit = await probe_of(workers)

    prober.breakers.ended(permit, ok=None)

    await probe_of(workers)


async def test_an_exhausted_key_stops_the_fleet_with_one_event(make: MakeWorkers) -> None:
    workers = make(4)
    await until(lambda: all(w.state is BreakerState.CLOSED for w in workers), "all are there")

    workers[2].breakers.stop("a", 60)

    await until(
        lambda: all(getattr(w.ask(), "code", "") == "key_stopped" for w in workers), "all stopped"
    )
    stops = [e for w in workers for e in w.events if isinstance(e, KeyStopped)]
    assert stops == [KeyStopped(deployment="a", for_s=60)]


async def test_after_a_stop_one_probe_finds_out(make: MakeWorkers) -> None:
    workers = make(3)
    workers[0].breakers.stop("a", 0.3)
    await until(lambda: all(w.state is not BreakerState.CLOSED for w in workers), "all stopped")

    prober, permit = await probe_of(workers)
    prober.breakers.ended(permit, ok=True)

    await until(lambda: all(w.state is BreakerState.CLOSED for w in workers), "all is well")


# -- Redis in trouble


async def test_a_server_that_forgets_all_is_told_again(make: MakeWorkers, broker_url: str) -> None:
    workers = make(3, FAST.model_copy(update={"cool_down_s": 30, "max_cool_down_s": 30}))
    await open_all(workers)

    with redis.Redis.from_url(broker_url) as server:
        server.flushall()
        server.script_flush()
        await until(lambda: server.exists(KEY % "a"), "somebody told it")

        view = json.loads(server.get(KEY % "a") or b"")
        assert (view["state"], view["opens"]) == ("open", 1)
    async for _ in while_all_exchange(workers, 4):
        assert {worker.state for worker in workers} == {BreakerState.OPEN}


async def probing(worker: Worker) -> Permit:
    """The breaker opens, and this worker has the token."""
    worker.call(False, 20)
    while True:
        await worker.exchange.exchange()
        answer = worker.ask()
        if isinstance(answer, Permit):
            await worker.exchange.exchange()
            return answer


async def test_a_probe_outlives_the_servers_memory(broker_url: str) -> None:
    options = FAST.model_copy(update={"cool_down_s": 0.01, "max_cool_down_s": 60})
    async with by_hand(broker_url, options) as (prober, other):
        permit = await probing(prober)
        await other.exchange.exchange()

        with redis.Redis.from_url(broker_url) as server:
            server.flushall()
        other.ask()
        await other.exchange.exchange()  # it is the first to come, and wants a probe
        assert isinstance(other.ask(), Refusal)
        await prober.exchange.exchange()
        prober.breakers.ended(permit, ok=True)
        await prober.exchange.exchange()
        await other.exchange.exchange()

        assert (prober.state, other.state) == (BreakerState.RAMP, BreakerState.RAMP)


async def test_whoever_probed_alone_takes_no_token_from_others(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FAST.model_copy(update={"cool_down_s": 0.01, "max_cool_down_s": 60})
    async with by_hand(broker_url, options) as (prober, lonely):
        await probing(prober)
        await lonely.exchange.exchange()
        with monkeypatch.context() as patch:
            patch.setattr("promptfleet_workers.breaker.ALONE_AFTER_S", -1)
            assert isinstance(lonely.ask(), Permit)
        await lonely.exchange.exchange()

        with redis.Redis.from_url(broker_url) as server:
            view = json.loads(server.get(KEY % "a") or b"")
        assert view["probe"] == prober.breakers.worker


async def test_retries_are_bounded_where_others_see_failures(broker_url: str) -> None:
    async with by_hand(broker_url, FAST) as (one, other):
        one.call(True, 30)
        await one.exchange.exchange()
        await other.exchange.exchange()
        assert all(isinstance(other.ask(retry=True), Permit) for _ in range(50))

        one.call(False, 5)
        await one.exchange.exchange()
        await other.exchange.exchange()
        answers = [other.ask(retry=True) for _ in range(50)]

        assert sum(isinstance(answer, Permit) for answer in answers) <= 5


async def test_without_redis_each_goes_on_and_then_they_agree_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptfleet_workers.breaker.ALONE_AFTER_S", 0.3)
    with EmbeddedValkey(tmp_path) as server:
        workers = [Worker(server.url) for _ in range(3)]
        for worker in workers:
            worker.start()
        await open_all(workers)
        server.kill()

        probes = {}
        for worker in workers:  # each finds out by itself
            _, probes[worker] = await probe_of([worker])
        for worker, permit in probes.items():
            worker.breakers.ended(permit, ok=False)
            assert worker.state is BreakerState.OPEN

        server.restart(lose_data=True)
        fleet = lambda: all(w.breakers.snapshot()[0].fleet for w in workers)  # noqa: E731
        await until(fleet, "they agree again")
        prober, permit = await probe_of(workers)
        prober.breakers.ended(permit, ok=True)
        await until(lambda: all(w.state is BreakerState.CLOSED for w in workers), "all is well")
        for worker in workers:
            await worker.stop()


@pytest.mark.parametrize("reply", [b"-LOADING wait\r\n", b"garbage\r\n", b"", None])
async def test_a_server_that_hangs_or_talks_nonsense_holds_up_nobody(reply: bytes | None) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            if reply is not None:
                writer.write(reply)
                await writer.drain()
                break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        breakers = Breakers({"a": 4}, options=FAST, emit=lambda _: None)
        exchange = BreakerExchange(breakers, url, timeout_s=0.1)
        async with asyncio.timeout(5):
            assert await exchange.exchange() is False
        assert isinstance(breakers.admit("a", retry=False), Permit)
        await exchange.aclose()


async def test_keys_are_few_and_expire(make: MakeWorkers, broker_url: str) -> None:
    workers = make(2)
    await open_all(workers)

    with redis.Redis.from_url(broker_url) as server:
        keys = list(server.scan_iter("promptfleet:breaker:*"))
        assert keys == [b"promptfleet:breaker:{a}"]  # nothing is known of the other one
        assert 0 < server.pttl(keys[0]) < 60_000


# -- several processes


async def test_one_probe_over_processes_and_a_killed_prober(
    broker_url: str, tmp_path: Path
) -> None:
    with redis.Redis.from_url(broker_url, decode_responses=True) as server:
        server.mset({"hold": "0", "healthy": "0"})
        command = [sys.executable, str(PROGRAM), broker_url]
        processes = {
            name: Process([*command, name], log=tmp_path / name, ready="ready")
            for name in ("x", "y", "z")
        }
        try:
            await until(lambda: open_ones(server) == set(processes), "all are open")
            server.set("hold", "1")
            server.delete("starts")
            starts = functools.partial(started, server)
            eventually(starts, "a probe")
            asked = {name: int(server.get(f"asked:{name}") or 0) for name in processes}
            eventually(
                lambda: all(
                    int(server.get(f"asked:{name}") or 0) > times + 20
                    for name, times in asked.items()
                    if name not in starts()
                ),
                "the others asked, too",
            )
            (prober,) = starts()
            server.mset({"hold": "0", "healthy": "1"})
            processes[prober].kill()

            eventually(lambda: starts()[1:], "another one probes")
            left = set(processes) - {prober}
            eventually(lambda: not open_ones(server) & left, "they are well")
        finally:
            for process in processes.values():
                process.kill()


def open_ones(server: redis.Redis) -> set[str]:
    return {str(name) for name in server.smembers("open")}


def started(server: redis.Redis) -> list[str]:
    return [str(name) for name in server.lrange("starts", 0, -1)]


# -- storms


class Provider:
    """Answers after a while, or fails; counts."""

    def __init__(self, failing: float, latency_s: float) -> None:
        self.failing = failing
        self.latency_s = latency_s
        self.calls = self.in_flight = 0
        self.random = random.Random(1)

    async def call(self) -> bool:
        self.calls += 1
        self.in_flight += 1
        await asyncio.sleep(self.latency_s)
        self.in_flight -= 1
        return self.random.random() >= self.failing


class Storm:
    """Jobs that wait, are called by whoever has a free slot, and come back when they fail."""

    RETRIES = 3

    def __init__(self, workers: list[Worker], provider: Provider, *, slots: int) -> None:
        self.workers = workers
        self.provider = provider
        self.first_calls = self.done = self.failed = 0
        self.codes: Counter[str] = Counter()
        self._slots = dict.fromkeys(workers, slots)
        self._waiting: list[tuple[float, int, int]] = []  # when, which, how often called
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._random = random.Random(2)

    def add(self, jobs: int) -> None:
        for _ in range(jobs):
            self._wait(0.0, 0)

    def turn(self) -> None:
        """Take what is due, as far as there are slots."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            free = [worker for worker, slots in self._slots.items() if slots]
            if not free:
                return
            _, _, calls = heapq.heappop(self._waiting)
            worker = self._random.choice(free)
            answer = worker.ask(retry=calls > 0)
            if isinstance(answer, Refusal):
                self.codes[answer.code] += 1
                self._wait(answer.wait_s, calls)
            else:
                self._slots[worker] -= 1
                task = asyncio.create_task(self._call(worker, answer, calls))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _call(self, worker: Worker, permit: Permit, calls: int) -> None:
        self.first_calls += calls == 0
        ok = await self.provider.call()
        self._slots[worker] += 1
        worker.breakers.ended(permit, ok=ok)
        if ok:
            self.done += 1
        elif calls >= self.RETRIES:
            self.failed += 1
        else:
            self._wait(self._random.random() * 0.1, calls + 1)

    def _wait(self, delay_s: float, calls: int) -> None:
        entry = (time.monotonic() + delay_s, next(self._numbers), calls)
        heapq.heappush(self._waiting, entry)


async def test_after_an_outage_with_thousands_waiting_calls_come_back_slowly(
    make: MakeWorkers,
) -> None:
    slots, jobs, outage_s = 64, 5_000, 1.5
    options = FAST.model_copy(update={"ramp_s": 1.0})
    workers = make(4, options, limit=slots)
    provider = Provider(failing=1.0, latency_s=0.05)
    storm = Storm(workers, provider, slots=slots)
    storm.add(jobs)
    limit = slots * len(workers)

    ends_at = time.monotonic() + outage_s
    while time.monotonic() < ends_at:
        storm.turn()
        await asyncio.sleep(0.005)
    # What was in flight when it began, and what each worker had to see; then a probe now and then.
    assert provider.calls <= limit + 20 * len(workers) + 10

    provider.failing = 0.0
    worst, peak = 0.0, 0
    deadline = ends_at + 30
    while storm.done + storm.failed < jobs:
        assert time.monotonic() < deadline, (storm.done, storm.codes)
        storm.turn()
        await asyncio.sleep(0.002)
        began = min(worker.ramp_from for worker in workers)
        grown = max(0.0, time.monotonic() - began) / options.ramp_s
        share = min(1.0, FIRST_SHARE + grown)
        worst = max(worst, provider.in_flight / (share * limit))
        peak = max(peak, provider.in_flight)
    assert peak <= 1.2 * limit
    assert worst <= 1.2  # nor is it passed on the way up
    assert provider.calls <= 1.1 * jobs


async def test_a_storm_is_amplified_by_a_tenth(broker_url: str) -> None:
    """Providers that fail for good, each with a fleet and a database of its own."""
    for_s = 2.5
    urls = {share: f"{broker_url[:-1]}{n}" for n, share in enumerate([0.3, 0.6, 1.0])}
    async with asyncio.TaskGroup() as group:
        for failing, url in urls.items():
            group.create_task(blow(failing, url, for_s))


async def blow(failing: float, url: str, for_s: float) -> None:
    floor = 2.0
    options = FAST.model_copy(update={"retries_per_s": floor, "ramp_s": 0.3})
    workers = [Worker(url, options) for _ in range(4)]
    for worker in workers:
        worker.start()
    provider = Provider(failing=failing, latency_s=0.02)
    storm = Storm(workers, provider, slots=64)

    began = time.monotonic()
    while time.monotonic() < began + for_s:
        storm.add(3)
        storm.turn()
        await asyncio.sleep(0.005)
    passed_s = time.monotonic() - began
    await storm.end()
    for worker in workers:
        await worker.stop()

    firsts, calls = storm.first_calls, provider.calls
    assert firsts > 20
    # A second's worth was saved up at the start, and each worker may go one ahead.
    assert calls <= 1.1 * firsts + floor * (passed_s + 1) + len(workers), failing
    if failing < 0.5:
        assert calls >= 1.05 * firsts  # it is used, too
        assert storm.codes["retry_budget"]


async def test_a_quiet_fleet_can_retry(make: MakeWorkers) -> None:
    workers = make(4, FAST.model_copy(update={"retries_per_s": 1.0}))
    workers[0].call(False)
    await until(lambda: not workers[0].breakers.all()[0].busy, "it is told")
    await until(lambda: workers[0].breakers.snapshot()[0].calls == 1, "it is known")

    assert isinstance(workers[0].ask(retry=True), Permit)
