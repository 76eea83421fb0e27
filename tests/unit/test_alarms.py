"""Many limits with one timer: late tasks are cancelled, and only cancellations of ours are ours."""

from __future__ import annotations

import asyncio

import pytest

from promptfleet_workers.alarms import Alarms, this_task

DEADLINE_S = 10.0


async def limited(alarms: Alarms, work: asyncio.Future[str] | None, limit_s: float) -> str:
    """As the callers of alarms do it."""
    task = this_task()
    alarms.set(task, asyncio.get_running_loop().time() + limit_s)
    try:
        return await (work or asyncio.get_running_loop().create_future())
    except asyncio.CancelledError:
        if not alarms.went_off(task):
            raise
        return "late"
    finally:
        alarms.clear(task)


def cancelling(task: asyncio.Task[str]) -> int:
    return task.cancelling()


async def test_a_late_task_hears_of_it_and_goes_on() -> None:
    alarms = Alarms()
    task = asyncio.create_task(limited(alarms, None, 0.01))
    async with asyncio.timeout(DEADLINE_S):
        assert await task == "late"
    assert cancelling(task) == 0


async def test_one_in_time_is_left_alone() -> None:
    alarms = Alarms()
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    done.set_result("in time")
    assert await limited(alarms, done, 0.001) == "in time"

    # Its limit passes by without an effect on what the task does later.
    assert await limited(alarms, None, 0.1) == "late"


async def test_somebody_elses_cancellation_is_none_of_ours() -> None:
    alarms = Alarms()
    task = asyncio.create_task(limited(alarms, None, 60))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_by_both_is_cancelled() -> None:
    alarms = Alarms()
    task = asyncio.create_task(limited(alarms, None, 0))
    await asyncio.sleep(0)
    alarms._tick()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_limits_within_limits() -> None:
    outer, inner = Alarms(), Alarms()

    async def work(outer_s: float, inner_s: float) -> str:
        task = this_task()
        outer.set(task, asyncio.get_running_loop().time() + outer_s)
        try:
            return "inner " + await limited(inner, None, inner_s)
        except asyncio.CancelledError:
            if not outer.went_off(task):
                raise
            return "outer late"
        finally:
            outer.clear(task)

    async with asyncio.timeout(DEADLINE_S):
        assert await work(60, 0.01) == "inner late"
        assert await work(0.01, 60) == "outer late"
        assert await work(0.01, 0.01) in {"inner late", "outer late"}
        assert await work(60, 0.01) == "inner late"  # nothing is left over


async def test_an_alarm_that_came_out_as_another_error_leaves_nothing_behind() -> None:
    """Libraries may turn a cancellation into an error of their own."""
    alarms = Alarms()

    async def converted() -> None:
        task = this_task()
        alarms.set(task, asyncio.get_running_loop().time())
        try:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ConnectionError from None
        finally:
            alarms.clear(task)

    async def work() -> str:
        with pytest.raises(ConnectionError):
            await converted()
        return await limited(alarms, None, 0.01)

    async with asyncio.timeout(DEADLINE_S):
        assert await asyncio.create_task(work()) == "late"
