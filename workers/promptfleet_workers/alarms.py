"""Time limits for many tasks with one timer: one each would cost a tenth of a call's CPU."""

from __future__ import annotations

import asyncio

TICK_S = 0.05
"""How late a limit may be noticed."""

_Task = asyncio.Task[object]


class Alarms:
    """Cancels tasks that are late, and tells whose cancellation was ours.

    Example:
        alarms.set(task, loop.time() + 2)
        try:
            await something_slow()
        except asyncio.CancelledError:
            if not alarms.went_off(task):
                raise
            ...  # late
        finally:
            alarms.clear(task)
    """

    def __init__(self) -> None:
        """Watch nobody yet."""
        self._due: dict[_Task, float] = {}
        self._gone_off: set[_Task] = set()
        self._ticking = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that all of the tasks run on.

        Kept, since asking for the running loop is a system call each time, and `current_task` and
        `create_task` ask as well: together a twelfth of a call's CPU.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def set(self, task: _Task, due: float) -> None:
        """Cancel `task` at the loop's time `due`; replaces an earlier limit."""
        self._due[task] = due
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(TICK_S, self._tick)

    def went_off(self, task: _Task) -> bool:
        """For a task that was just cancelled: take the cancellation back if it was ours alone."""
        if task not in self._gone_off:
            return False
        self._gone_off.discard(task)
        return task.uncancel() == 0

    def clear(self, task: _Task) -> None:
        """The task is in time."""
        self._due.pop(task, None)
        if task in self._gone_off:  # our cancellation came out as an error of somebody's own
            self._gone_off.discard(task)
            task.uncancel()

    def _tick(self) -> None:
        loop = self.loop
        now = loop.time()
        for task in [task for task, due in self._due.items() if due <= now]:
            del self._due[task]
            self._gone_off.add(task)
            task.cancel()
        if self._due:
            loop.call_later(TICK_S, self._tick)
        else:
            self._ticking = False


def this_task(loop: asyncio.AbstractEventLoop | None = None) -> _Task:
    """The task that runs; quicker where the running loop is known."""
    task = asyncio.current_task(loop)
    if task is None:
        msg = "there is no task to limit"
        raise RuntimeError(msg)
    return task
