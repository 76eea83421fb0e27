"""Notice that this worker does no work though there is some, and end it to be restarted.

It has a thread and connections of its own, so that neither a blocked event loop, nor a dead Celery
consumer, nor a stuck pool of connections can silence it.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from promptfleet_shared.store import status
from promptfleet_shared.store.database import Database
from promptfleet_workers.telemetry import BatchClaimed, Event

log = logging.getLogger(__name__)

EX_SOFTWARE = 70
"""The exit status (of sysexits.h) that asks the supervisor for a fresh worker."""
LOOKS = 20
"""How often the watchdog looks within its time limit."""
MAX_INTERVAL_S = 3.0


class Stuck(enum.Enum):
    """Why a worker is of no use any more."""

    LOOP = "the event loop stands still"
    IDLE = "work waits and slots are free, but nothing was claimed"


class Watchdog:
    """Adds up how long this worker has claimed nothing although it could.

    Time counts only as it is seen to pass: a process that was stopped, or starved of CPU, has not
    been idle meanwhile.
    """

    def __init__(
        self,
        *,
        limit_s: float,
        on_loop: Callable[..., None],
        has_room: Callable[[], bool],
        work_waits: Callable[[], bool | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch nothing yet.

        Args:
            limit_s: Seconds after which the worker is stuck; 0 watches nothing.
            on_loop: Calls a function on the event loop's thread.
            has_room: False while all that this worker may run is running.
            work_waits: Whether jobs of our tiers have waited for half of `limit_s`; None if nobody
                answers, as while Postgres or Redis is down: then it is not our fault.
            clock: In seconds.
        """
        self._limit_s = limit_s
        self._on_loop = on_loop
        self._has_room = has_room
        self._work_waits = work_waits
        self._clock = clock
        self.interval_s = min(limit_s / LOOKS, MAX_INTERVAL_S)
        self._looked_at = clock()
        self._claims = 0
        self._claims_seen = 0
        self._loop_turned = True
        self._loop_still_s = 0.0
        self._give_up: Callable[[Stuck], object] = end_for_restart
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="promptfleet-watchdog", daemon=True)
        self.idle_s = 0.0
        """Seconds without a claim that count; stays at half the limit while there is no work."""

    def hear(self, event: Event) -> None:
        """Take note of claims, those without a job included: a doorbell came, and Postgres spoke.

        So a worker that claims and gives back, since a breaker is open, is at work.
        """
        if isinstance(event, BatchClaimed) and event.answered:
            self._claims += 1

    def start(self, give_up: Callable[[Stuck], object]) -> None:
        """Start the thread, which calls `give_up` once when the worker is stuck."""
        self._give_up = give_up
        self._looked_at = self._clock()
        if self._limit_s:
            self._thread.start()

    def stop(self) -> None:
        """Look no more: the worker drains. An answer that is under way changes nothing."""
        self._stop.set()

    def look(self) -> Stuck | None:
        """Look once."""
        now = self._clock()
        passed_s = min(now - self._looked_at, 2 * self.interval_s)
        self._looked_at = now
        if not self._loop_turned:  # judged by that alone, since nobody could claim meanwhile
            self._loop_still_s += passed_s
            return Stuck.LOOP if self._loop_still_s >= self._limit_s else None
        self._loop_turned = False
        self._loop_still_s = 0.0
        self._on_loop(self._turned)
        return Stuck.IDLE if self._neglects_work(passed_s) else None

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            stuck = self.look()
            if stuck is not None and not self._stop.is_set():
                self._give_up(stuck)
                return

    def _turned(self) -> None:
        self._loop_turned = True

    def _neglects_work(self, passed_s: float) -> bool:
        if self._claims != self._claims_seen or not self._has_room():
            self._claims_seen = self._claims
            self.idle_s = 0.0
            return False
        self.idle_s += passed_s
        if self.idle_s < self._limit_s / 2:
            return False
        waits = self._work_waits()
        if waits is None:
            self.idle_s = 0.0
        elif not waits:
            self.idle_s = self._limit_s / 2
        return self.idle_s >= self._limit_s


class WorkQuestion:
    """Asks Postgres whether work waits, and the broker whether it could reach anybody."""

    def __init__(
        self,
        *,
        database: Database,
        ask_broker: Callable[[], object],
        tiers: Sequence[str],
        for_s: float,
        held_back: Callable[[], bool] = lambda: False,
    ) -> None:
        """Ask nothing yet.

        Args:
            database: For this question alone: the worker's own pool may be what is stuck.
            ask_broker: Raises if the broker can't be reached.
            tiers: Whose jobs are ours.
            for_s: Seconds that a job must have waited to count.
            held_back: True if jobs wait for nothing but others of their tenant to end.
        """
        self._held_back = held_back
        self._database = database
        self._ask_broker = ask_broker
        self._tiers = tiers
        self._for_s = for_s

    def __call__(self) -> bool | None:
        """The answer; None if Postgres or the broker gave none."""
        try:
            waits = self._database.run(
                lambda connection: status.any_neglected(connection, self._tiers, for_s=self._for_s)
            )
            if waits:
                self._ask_broker()  # without it no doorbell reaches anybody
        except Exception as error:  # noqa: BLE001 - whatever it was, it is no answer
            log.warning("watchdog_unanswered", extra={"error": type(error).__name__})
            return None
        return waits and not self._held_back()


def announce(stuck: Stuck, *, within_s: float) -> None:
    """Say why this process ends, and make sure that it does though saying it may hang.

    Args:
        stuck: Why.
        within_s: Seconds that the rest may take.
    """
    last_resort = threading.Timer(within_s, os._exit, [EX_SOFTWARE])
    last_resort.daemon = True
    last_resort.start()
    log.critical("watchdog_gave_up", extra={"reason": stuck.value})
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.__stderr__)  # names and lines only, no values


def end_for_restart(_: object = None) -> NoReturn:
    """End this process at once, its log lines written."""
    logging.shutdown()
    os._exit(EX_SOFTWARE)
