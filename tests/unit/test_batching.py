"""Gathering: the pure window, the batcher on both kinds of loop, and the slots."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.fleet import BatchOptions
from promptfleet_shared.queueing import MAX_IDS
from promptfleet_workers.batching import Batcher, BatchWindow, DoorbellWait, Slots, Ticket

DEADLINE_S = 10.0


def tickets(count: int) -> list[Ticket]:
    wait = DoorbellWait(count)
    return [Ticket(uuid.uuid4(), wait) for _ in range(count)]


def options(size: int = 10, window_ms: float = 10.0, batches: int = 32) -> BatchOptions:
    return BatchOptions(
        max_batch_size=size, batch_window_ms=window_ms, max_concurrent_batches=batches
    )


class TestBatchWindow:
    @given(
        size=st.integers(1, 20),
        window_ms=st.sampled_from([0.0, 0.5, 2.5, 10.0, 10.5]),
        arrivals=st.lists(st.tuples(st.floats(0, 0.05), st.integers(0, 45)), max_size=30),
    )
    def test_no_ticket_is_lost_late_or_in_too_large_a_batch(
        self, size: int, window_ms: float, arrivals: list[tuple[float, int]]
    ) -> None:
        window = BatchWindow(options(size, window_ms))
        came: dict[uuid.UUID, float] = {}
        order: list[uuid.UUID] = []
        left: list[tuple[float, list[Ticket]]] = []
        now = 1000.0

        def run_timers(until: float) -> None:
            while window.closes_at is not None and window.closes_at <= until:
                at = window.closes_at
                batch = window.close(at)
                assert batch, "a window that is due must close"
                left.append((at, batch))

        for pause, count in arrivals:
            run_timers(now + pause)
            now += pause
            arrived = tickets(count)
            came.update((ticket.job_id, now) for ticket in arrived)
            order.extend(ticket.job_id for ticket in arrived)
            whole = window.add(arrived, now)
            assert all(len(batch) == size for batch in whole)
            left.extend((now, batch) for batch in whole)
        run_timers(now + 1)

        assert [ticket.job_id for _, batch in left for ticket in batch] == order
        assert all(1 <= len(batch) <= size for _, batch in left)
        for at, batch in left:
            for ticket in batch:
                assert at - came[ticket.job_id] <= window_ms / 1000 + 1e-9
        assert window.closes_at is None
        assert window.clear() == []

    def test_it_does_not_close_early(self) -> None:
        window = BatchWindow(options(window_ms=10))
        window.add(tickets(3), 5.0)

        assert window.close(5.009) == []
        assert len(window.close(5.01)) == 3
        assert window.close(6.0) == []

    def test_what_a_full_batch_leaves_over_begins_a_window_of_its_own(self) -> None:
        window = BatchWindow(options(size=10, window_ms=10))
        window.add(tickets(9), 1.0)

        assert len(window.add(tickets(3), 1.008)) == 1
        assert window.closes_at == pytest.approx(1.018)

    def test_clear_gives_all_back(self) -> None:
        window = BatchWindow(options())
        arrived = tickets(3)
        window.add(arrived, 1.0)

        assert window.clear() == arrived
        assert window.close(9.0) == []


@pytest.fixture(params=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    factory: Callable[[], asyncio.AbstractEventLoop] = (
        uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    )
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner


class Collector:
    """Takes batches, and can hold them back."""

    def __init__(self) -> None:
        self.batches: list[list[Ticket]] = []
        self.running = self.most = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self._changed = asyncio.Event()

    async def flush(self, tier: str, batch: list[Ticket]) -> None:
        self.batches.append(batch)
        self.running += 1
        self.most = max(self.most, self.running)
        self._changed.set()
        await self.go_on.wait()
        self.running -= 1
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @property
    def ids(self) -> list[uuid.UUID]:
        return [ticket.job_id for batch in self.batches for ticket in batch]


class TestBatcher:
    @pytest.mark.parametrize("window_ms", [0.0, 0.2, 0.5, 1.5, 2.5, 3.0, 10.5, 12.5])
    def test_each_window_closes_by_itself(self, runner: asyncio.Runner, window_ms: float) -> None:
        """Loops round their timers to milliseconds, and so may come a hair too early."""

        async def main() -> None:
            collector = Collector()
            batcher = Batcher(lambda _: options(size=1000, window_ms=window_ms), collector.flush)
            for count in range(1, 6):
                batcher.add("basic", tickets(2))
                await collector.until(lambda count=count: len(collector.batches) == count)  # type: ignore[misc]

        runner.run(main())

    def test_nothing_is_lost_under_load(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            collector = Collector()
            batcher = Batcher(lambda _: options(size=7, window_ms=0.5), collector.flush)
            sent: list[uuid.UUID] = []
            for count in [1, 3, 20, 7, 2, 6, 8, 14, 1] * 20:
                some = tickets(count)
                sent.extend(ticket.job_id for ticket in some)
                batcher.add("basic", some)
                await asyncio.sleep(0)
            await collector.until(lambda: len(collector.ids) >= len(sent))
            assert sorted(collector.ids) == sorted(sent)
            assert max(len(batch) for batch in collector.batches) <= 7

        runner.run(main())

    def test_so_many_batches_at_once_and_no_more(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            collector = Collector()
            collector.go_on.clear()
            batcher = Batcher(lambda _: options(size=1, batches=3), collector.flush)
            batcher.add("basic", tickets(10))
            await collector.until(lambda: collector.running == 3)
            await asyncio.sleep(0)
            assert collector.most == 3
            collector.go_on.set()
            await collector.until(lambda: len(collector.batches) == 10 and not collector.running)
            assert collector.most == 3

        runner.run(main())

    def test_tiers_do_not_mix(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            collector = Collector()
            batcher = Batcher(lambda _: options(size=4, window_ms=1), collector.flush)
            basic, advanced = tickets(2), tickets(2)
            batcher.add("basic", basic)
            batcher.add("advanced", advanced)
            await collector.until(lambda: len(collector.batches) == 2)
            assert sorted(collector.batches, key=len) == [basic, advanced]

        runner.run(main())

    def test_what_is_taken_back_is_not_flushed(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            collector = Collector()
            batcher = Batcher(lambda _: options(window_ms=5), collector.flush)
            taken, later = tickets(3), tickets(1)
            batcher.add("basic", taken)
            assert batcher.clear() == [("basic", taken)]
            batcher.add("basic", later)
            await collector.until(lambda: bool(collector.batches))
            assert collector.batches == [later]

        runner.run(main())


class TestDoorbellWait:
    def test_is_done_when_every_id_is_settled(self) -> None:
        wait = DoorbellWait(2)

        wait.settle()
        assert not wait.done.done()
        wait.settle()

        assert wait.done.done()

    def test_of_nothing_is_done_at_once(self) -> None:
        assert DoorbellWait(0).done.done()

    def test_can_be_abandoned_at_any_time(self) -> None:
        wait = DoorbellWait(2)

        wait.abandon()
        wait.abandon()
        wait.settle()
        wait.settle()

        assert wait.done.done()


class TestSlots:
    @given(calls=st.integers(1, 5000))
    def test_an_idle_worker_wants_work_and_a_full_one_does_not(self, calls: int) -> None:
        slots = Slots(calls)
        assert slots.wants_work

        held = slots.take(10**6)

        assert held == calls  # nothing has ended yet: there is no pace to look ahead by
        assert not slots.wants_work
        assert slots.take(1) == 0

    @given(calls=st.integers(1, 300), steps=st.lists(st.integers(-40, 150), max_size=60))
    def test_it_never_holds_more_than_it_may(self, calls: int, steps: list[int]) -> None:
        slots = Slots(calls)
        held = 0
        for step in steps:
            if step >= 0:
                taken = slots.take(step)
                assert 0 <= taken <= step
                held += taken
            for _ in range(min(-step, held)):
                slots.give_back()
                held -= 1
            assert held <= calls
        while held:
            slots.give_back()
            held -= 1
        assert slots.wants_work

    @pytest.mark.parametrize(
        ("calls", "ended_a_second", "ahead"),
        [(4, 1, 0), (500, 100, 20), (500, 500, 100), (500, 5000, 250), (64, 4000, 200)],
    )
    def test_it_looks_a_fifth_of_a_second_ahead(
        self, calls: int, ended_a_second: int, ahead: int
    ) -> None:
        now = 0.0
        slots = Slots(calls, clock=lambda: now)
        for _ in range(ended_a_second):
            assert slots.take(1) == 1
            slots.ended()
            slots.written()
        now = 1.0
        assert slots.wants_work  # this measures the pace

        assert slots.take(10**6) == calls + ahead

    def test_without_a_pace_the_look_ahead_fades(self) -> None:
        now = 0.0
        slots = Slots(500, clock=lambda: now)
        for _ in range(500):
            slots.take(1)
            slots.ended()
            slots.written()
        seen = []
        for second in range(1, 30):
            now = float(second)
            assert slots.wants_work
            seen.append(slots.free - 500)

        assert seen[0] == 100
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] <= 3

    def test_a_database_that_lags_behind_shuts_the_queues(self) -> None:
        slots = Slots(10)
        for _ in range(10 + MAX_IDS + 1):
            slots.take(1)
            slots.ended()
        assert slots.free
        assert not slots.wants_work

        slots.written()

        assert slots.wants_work

    def test_what_is_shut_stays_shut(self) -> None:
        slots = Slots(4)
        assert slots.take(3) == 3

        slots.shut()

        assert slots.take(5) == 0
        for _ in range(3):
            slots.give_back()
        assert slots.take(1) == 0
        assert not slots.wants_work


def test_a_timer_that_comes_too_early_is_set_again() -> None:
    """A loop on a busy machine may call more than a hair before the time it was asked for."""

    async def main() -> None:
        collector = Collector()
        batcher = Batcher(lambda _: options(size=10, window_ms=60), collector.flush)
        batcher.add("basic", tickets(2))
        window = batcher._windows["basic"]
        assert window.closes_at is not None
        early = asyncio.get_running_loop().time()
        batcher._close("basic", window, window.closes_at)
        assert (collector.batches, early < window.closes_at) == ([], True)

        window.closes_at -= 0.0001  # as if the first timer belonged to another window
        batcher._close("basic", window, window.closes_at)
        await collector.until(lambda: len(collector.batches) == 1)

    asyncio.run(main())
