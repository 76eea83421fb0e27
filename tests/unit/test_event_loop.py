"""The bridge from threads to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from promptfleet_workers.event_loop import EventLoop

DEADLINE_S = 10.0


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    loop.start()
    yield loop
    loop.stop()


async def thread_name() -> str:
    return threading.current_thread().name


async def fail() -> None:
    raise LookupError("as asked")


def test_coroutines_run_on_a_thread_of_their_own(loop: EventLoop) -> None:
    assert loop.run(thread_name(), DEADLINE_S) == "promptfleet-loop"


def test_results_and_errors_come_back(loop: EventLoop) -> None:
    with pytest.raises(LookupError, match="as asked"):
        loop.run(fail(), DEADLINE_S)

    assert loop.submit(asyncio.sleep(0, "done")).result(DEADLINE_S) == "done"


def test_a_wait_that_takes_too_long_ends(loop: EventLoop) -> None:
    with pytest.raises(TimeoutError):
        loop.run(asyncio.sleep(60), 0.01)


def test_many_threads_may_call(loop: EventLoop) -> None:
    seen: list[int] = []
    threads = [threading.Thread(target=lambda n=n: loop.call(seen.append, n)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)

    assert loop.run(asyncio.sleep(0, True), DEADLINE_S)
    assert sorted(seen) == list(range(20))


def test_stopping_cancels_what_runs_and_lets_it_clean_up() -> None:
    loop = EventLoop()
    loop.start()
    cleaned = threading.Event()
    started = threading.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    future = loop.submit(work())
    assert started.wait(DEADLINE_S)
    loop.stop()

    assert cleaned.is_set()
    assert future.cancelled()


def test_stopping_twice_and_calling_a_stopped_loop_do_nothing() -> None:
    loop = EventLoop()
    loop.start()
    loop.stop()

    loop.stop()
    loop.call(pytest.fail, "called after the end")


def test_a_loop_that_does_not_run_refuses_work() -> None:
    coroutine = asyncio.sleep(0)
    try:
        with pytest.raises(RuntimeError, match="not running"):
            EventLoop().submit(coroutine)
    finally:
        coroutine.close()


def test_it_can_start_again(loop: EventLoop) -> None:
    loop.stop()
    loop.start()

    assert loop.run(asyncio.sleep(0, 1), DEADLINE_S) == 1
