"""The watchdog by a clock of its own: when it gives a worker up, and when it must not."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import pytest

from promptfleet_shared.jobs import JobState, Outcome
from promptfleet_workers.telemetry import BatchClaimed, JobsFinished
from promptfleet_workers.watchdog import Stuck, Watchdog

LIMIT_S = 60.0


class Worker:
    """What the watchdog sees of a worker."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.has_room = True
        self.waits: bool | None = True
        self.asked = 0
        self.blocked = False
        self.watchdog = Watchdog(
            limit_s=LIMIT_S,
            on_loop=self._on_loop,
            has_room=lambda: self.has_room,
            work_waits=self._work_waits,
            clock=lambda: self.now,
        )

    def live(self, seconds: float, each: Callable[[], object] = lambda: None) -> Stuck | None:
        """Look as often as the watchdog would; the verdict, if there was one."""
        end = self.now + seconds
        while self.now < end:
            self.now += self.watchdog.interval_s
            each()
            if (stuck := self.watchdog.look()) is not None:
                return stuck
        return None

    def claim(self, *, claimed: int = 1, answered: bool = True) -> None:
        event = BatchClaimed(tier="basic", rung=1, claimed=claimed, answered=answered)
        self.watchdog.hear(event)

    def _on_loop(self, function: Callable[[], None]) -> None:
        if not self.blocked:
            function()

    def _work_waits(self) -> bool | None:
        self.asked += 1
        return self.waits


@pytest.fixture
def worker() -> Worker:
    return Worker()


class TestIdle:
    def test_a_worker_that_claims_nothing_while_work_waits_is_stuck(self, worker: Worker) -> None:
        assert worker.live(LIMIT_S - 4) is None
        assert worker.live(8) is Stuck.IDLE

    def test_an_idle_worker_without_work_is_well(self, worker: Worker) -> None:
        worker.waits = False
        assert worker.live(100 * LIMIT_S) is None

    def test_work_that_came_just_now_is_given_its_time(self, worker: Worker) -> None:
        worker.waits = False
        worker.live(10 * LIMIT_S)
        worker.waits = True  # that is, since half of the limit
        assert worker.live(LIMIT_S / 2 - 4) is None
        assert worker.live(8) is Stuck.IDLE

    @pytest.mark.parametrize("claimed", [0, 1])
    def test_claims_keep_it_well(self, worker: Worker, claimed: int) -> None:
        """Those of jobs that are given back at once, or of nothing (a stale doorbell), too."""
        for _ in range(10):
            worker.claim(claimed=claimed)
            assert worker.live(LIMIT_S - 4) is None

    def test_a_claim_that_the_database_did_not_take_is_none(self, worker: Worker) -> None:
        stuck = worker.live(2 * LIMIT_S, lambda: worker.claim(claimed=0, answered=False))
        assert stuck is Stuck.IDLE

    def test_ends_are_no_claims(self, worker: Worker) -> None:
        outcome = Outcome(job_id=uuid.uuid4(), fence=1, state=JobState.SUCCEEDED)
        event = JobsFinished.of([outcome], fenced=0)
        assert worker.live(2 * LIMIT_S, lambda: worker.watchdog.hear(event)) is Stuck.IDLE

    def test_a_full_worker_is_well(self, worker: Worker) -> None:
        worker.has_room = False
        assert worker.live(10 * LIMIT_S) is None
        worker.has_room = True  # and begins at nothing now
        assert worker.live(LIMIT_S - 4) is None

    def test_no_answer_is_no_verdict(self, worker: Worker) -> None:
        """Postgres or Redis is down, for everybody."""
        worker.waits = None
        assert worker.live(10 * LIMIT_S) is None
        worker.waits = True  # and whoever returns has the whole time to find its feet
        assert worker.live(LIMIT_S / 2 - 4) is None

    def test_it_asks_only_when_half_of_the_time_is_over(self, worker: Worker) -> None:
        worker.live(LIMIT_S / 2 - 4)
        assert worker.asked == 0
        worker.live(8)
        assert worker.asked > 0


class TestLoop:
    def test_a_blocked_loop_is_stuck_whatever_else(self, worker: Worker) -> None:
        worker.waits = None
        worker.has_room = False
        worker.blocked = True
        assert worker.live(LIMIT_S - 4) is None
        assert worker.live(12) is Stuck.LOOP

    def test_a_loop_that_turns_now_and_then_is_well(self, worker: Worker) -> None:
        worker.waits = False
        for _ in range(10):
            worker.blocked = True
            assert worker.live(LIMIT_S - 8) is None
            worker.watchdog._turned()

    def test_a_process_that_was_stopped_has_not_been_idle(self, worker: Worker) -> None:
        worker.live(3)
        worker.blocked = True  # the ping is under way when SIGSTOP comes
        worker.live(3)
        worker.now += 10 * LIMIT_S
        assert worker.watchdog.look() is None
        assert worker.live(LIMIT_S / 2) is None


class TestThread:
    def make(self, limit_s: float) -> Watchdog:
        return Watchdog(
            limit_s=limit_s,
            on_loop=lambda function: function(),
            has_room=lambda: True,
            work_waits=lambda: True,
        )

    def test_it_gives_up_once(self) -> None:
        given_up: list[Stuck] = []
        watchdog = self.make(0.05)

        watchdog.start(given_up.append)
        watchdog._thread.join(10)

        assert given_up == [Stuck.IDLE]

    def test_a_limit_of_nothing_watches_nothing(self) -> None:
        watchdog = self.make(0.0)
        watchdog.start(lambda _: None)
        assert not watchdog._thread.is_alive()

    def test_a_worker_that_drains_is_left_alone(self) -> None:
        asked, answer = threading.Event(), threading.Event()
        given_up: list[Stuck] = []

        def work_waits() -> bool:
            if watchdog.idle_s < 0.05:
                return True
            asked.set()  # for the last time before it would give up
            return answer.wait(10)

        watchdog = Watchdog(
            limit_s=0.05,
            on_loop=lambda function: function(),
            has_room=lambda: True,
            work_waits=work_waits,
        )
        watchdog.start(given_up.append)
        assert asked.wait(10)
        watchdog.stop()  # while it waits for its answer
        answer.set()
        watchdog._thread.join(10)
        assert given_up == []
