"""A breaker in one worker: what it does alone, and what it makes of the fleet's view."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from promptfleet_shared.fleet import BreakerOptions, parse_fleet
from promptfleet_workers.breaker import (
    ALONE_AFTER_S,
    HOLD_S,
    PIECES,
    BreakerState,
    Permit,
    Refusal,
)
from promptfleet_workers.breaker_reports import FleetView
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.telemetry import BreakerChanged, Event, KeyStopped

OPTIONS = BreakerOptions()
CLOSED = FleetView(
    state="closed",
    epoch=0,
    opens=0,
    until_ms=0,
    stopped=False,
    ramp_ms=0,
    probe=False,
    well=False,
    tokens=0,
    spare=False,
    calls=0,
    failed=0,
)


class Bench:
    """One breaker called "a", its clock, and the events."""

    def __init__(
        self, options: BreakerOptions = OPTIONS, limit: int = 100, **more: dict[str, str]
    ) -> None:
        self.now = 1_024.0  # sums of such numbers are exact
        self.events: list[Event] = []
        self.wakes = 0
        self.breakers = Breakers(
            {"a": limit, "b": limit},
            options=options,
            emit=self.events.append,
            clock=lambda: self.now,
            random=lambda: 1.0,
            **more,
        )
        self.breaker = self.breakers.all()[0]
        self.breaker.wake = self._woken

    def _woken(self) -> None:
        self.wakes += 1

    def state(self) -> BreakerState:
        return self.breakers.snapshot()[0].state

    def admit(self, *, retry: bool = False) -> Permit | Refusal:
        return self.breakers.admit("a", retry=retry)

    def permit(self, *, retry: bool = False) -> Permit:
        permit = self.admit(retry=retry)
        assert isinstance(permit, Permit)
        return permit

    def refusal(self, *, retry: bool = False) -> Refusal:
        refusal = self.admit(retry=retry)
        assert isinstance(refusal, Refusal)
        return refusal

    def call(self, ok: bool | None, times: int = 1) -> None:
        for _ in range(times):
            self.breakers.ended(self.permit(), ok=ok)

    def hears(self, **view: Any) -> None:
        """An exchange in which the fleet answers so."""
        report = self.breaker.report()
        self.breaker.adopt(dataclasses.replace(CLOSED, **view), report, asked_at=self.now)

    def hears_nothing(self) -> None:
        self.breaker.not_heard(self.breaker.report())

    def goes_on_alone(self) -> None:
        self.now += ALONE_AFTER_S + 0.125


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestOpening:
    @pytest.mark.parametrize(
        ("ok", "failed", "state"),
        [
            (0, 19, BreakerState.CLOSED),
            (0, 20, BreakerState.OPEN),
            (10, 10, BreakerState.OPEN),
            (11, 10, BreakerState.CLOSED),
            (100, 90, BreakerState.CLOSED),
            (100, 100, BreakerState.OPEN),
        ],
    )
    def test_at_half_of_twenty(
        self, bench: Bench, ok: int, failed: int, state: BreakerState
    ) -> None:
        bench.call(True, ok)
        bench.call(False, failed)

        assert bench.state() is state

    def test_what_says_nothing_is_not_counted(self, bench: Bench) -> None:
        bench.call(None, 100)
        bench.call(False, 19)

        assert bench.state() is BreakerState.CLOSED

    def test_what_is_older_than_the_window_is_forgotten(self, bench: Bench) -> None:
        bench.call(False, 19)
        bench.now += OPTIONS.window_s
        bench.call(False, 19)

        assert bench.state() is BreakerState.CLOSED

    def test_no_call_goes_through_until_the_cool_down_is_over(self, bench: Bench) -> None:
        bench.call(False, 20)

        bench.now += OPTIONS.cool_down_s - 0.1
        refusal = bench.refusal()
        assert refusal.code == "circuit_open"
        assert 0.1 <= refusal.wait_s < 1

    def test_the_fleet_hears_of_it_at_once(self, bench: Bench) -> None:
        bench.call(False, 20)

        assert bench.wakes
        report = bench.breaker.report()
        assert (report.failed, report.tripped) == (20, True)

    def test_many_who_wait_come_back_one_after_the_other(self) -> None:
        bench = Bench(limit=10)
        bench.call(False, 20)

        waits = [bench.refusal().wait_s for _ in range(1_000)]

        assert waits[0] == pytest.approx(OPTIONS.cool_down_s + 0.1)
        assert waits[99] == pytest.approx(OPTIONS.cool_down_s + 10)
        assert waits[-1] == pytest.approx(OPTIONS.cool_down_s + OPTIONS.ramp_s)  # no longer

    def test_calls_of_an_earlier_time_say_nothing(self, bench: Bench) -> None:
        old = [bench.permit() for _ in range(30)]
        bench.call(False, 20)
        bench.goes_on_alone()
        bench.now += OPTIONS.cool_down_s
        bench.call(True)  # the probe
        assert bench.state() is BreakerState.RAMP

        for permit in old:
            bench.breakers.ended(permit, ok=False)

        assert bench.state() is BreakerState.RAMP
        assert bench.breaker.in_flight == 0

    def test_it_can_be_turned_off(self) -> None:
        bench = Bench(BreakerOptions(enabled=False))
        bench.call(False, 100)
        bench.breakers.stop("a", 60)

        assert bench.permit(retry=True)
        assert bench.events == []

    def test_turned_off_it_grants_retries_without_news_of_the_fleet(self) -> None:
        bench = Bench(BreakerOptions(enabled=False))
        bench.goes_on_alone()
        bench.call(False, 100)

        assert bench.permit(retry=True)


class TestAlone:
    """Without news of the fleet."""

    @pytest.fixture
    def open_bench(self) -> Bench:
        bench = Bench()
        bench.goes_on_alone()
        bench.call(False, 20)
        bench.now += OPTIONS.cool_down_s
        return bench

    def test_one_probe_and_no_more(self, open_bench: Bench) -> None:
        open_bench.permit()

        assert open_bench.state() is BreakerState.HALF_OPEN
        assert open_bench.refusal().code == "circuit_open"

    def test_cool_downs_double_up_to_their_bound(self, open_bench: Bench) -> None:
        waits = []
        for _ in range(6):
            open_bench.call(False)
            waits.append(open_bench.breakers.snapshot()[0].until_s)
            open_bench.now += waits[-1]

        assert waits == [10, 20, 40, 60, 60, 60]

    def test_a_probe_that_says_nothing_makes_way_for_another(self, open_bench: Bench) -> None:
        open_bench.call(None)
        open_bench.refusal()
        open_bench.now += 1.0
        open_bench.permit()

    def test_a_probe_that_hangs_makes_way_for_another(self, open_bench: Bench) -> None:
        hanging = open_bench.permit()
        open_bench.now += OPTIONS.max_cool_down_s - 1
        open_bench.hears_nothing()
        open_bench.refusal()
        open_bench.now += 1
        open_bench.hears_nothing()

        open_bench.permit()
        open_bench.breakers.ended(hanging, ok=False)  # too late to mean anything

        assert open_bench.state() is BreakerState.HALF_OPEN
        assert open_bench.breaker.in_flight == 1

    def test_a_ramp_follows_and_ends(self, open_bench: Bench) -> None:
        open_bench.call(True)

        shares = []
        for _ in range(3):
            shares.append(open_bench.breakers.snapshot()[0].share)
            open_bench.now += OPTIONS.ramp_s / 3
        assert shares == pytest.approx([0.1, 0.4, 0.7])
        assert open_bench.state() is BreakerState.CLOSED

        open_bench.call(False, 20)  # it begins anew
        assert open_bench.breakers.snapshot()[0].until_s == OPTIONS.cool_down_s

    def test_the_ramp_bounds_the_calls_in_flight(self, open_bench: Bench) -> None:
        open_bench.call(True)
        permits = [open_bench.permit() for _ in range(10)]

        refusal = open_bench.refusal()
        assert (refusal.code, refusal.wait_s >= 0.5) == ("circuit_open", True)

        open_bench.breakers.ended(permits[0], ok=True)
        open_bench.permit()
        open_bench.refusal()
        open_bench.now += OPTIONS.ramp_s / 2
        for _ in range(45):
            open_bench.permit()
        open_bench.refusal()

    def test_failures_in_the_ramp_open_it_for_longer(self, open_bench: Bench) -> None:
        open_bench.call(True)
        open_bench.call(False, 20)

        status = open_bench.breakers.snapshot()[0]
        assert (status.state, status.until_s) == (BreakerState.OPEN, 2 * OPTIONS.cool_down_s)

    def test_retries_are_earned_and_saved_up(self, bench: Bench) -> None:
        bench.goes_on_alone()
        for _ in range(2):  # the second time there is nothing to save beyond the bound
            bench.now += 100
            bench.hears_nothing()

        admitted = [isinstance(bench.admit(retry=True), Permit) for _ in range(20)]
        assert sum(admitted) in {10, 11}  # one may go ahead

        bench.call(None, 50)
        bench.hears_nothing()
        admitted = [isinstance(bench.admit(retry=True), Permit) for _ in range(20)]
        assert sum(admitted) in {4, 5}


class TestRetries:
    def test_they_are_free_where_the_fleet_sees_that_all_is_well(self, bench: Bench) -> None:
        bench.hears(well=True, calls=1_000)

        for _ in range(100):
            bench.permit(retry=True)

    def test_own_failures_end_that_at_once(self, bench: Bench) -> None:
        bench.hears(well=True, calls=1_000)
        bench.call(True, 9)
        bench.call(False)
        bench.permit(retry=True)  # one in ten

        bench.call(False)
        assert bench.refusal(retry=True).code == "retry_budget"
        bench.permit()  # a first call is no retry

    def test_else_they_need_a_token(self, bench: Bench) -> None:
        bench.hears(tokens=3)

        for _ in range(3):
            bench.permit(retry=True)
        assert bench.refusal(retry=True) == Refusal("retry_budget", 1.0 + 0.01)
        assert bench.breaker.report().want == 4

    def test_one_may_go_ahead_of_its_token_and_is_owed(self, bench: Bench) -> None:
        bench.hears(spare=True)

        bench.permit(retry=True)
        bench.refusal(retry=True)
        assert bench.breaker.report().tokens == -1
        bench.hears(spare=True)
        assert bench.breaker.report().tokens == 0

    def test_what_is_not_used_goes_back(self, bench: Bench) -> None:
        bench.hears(tokens=5)
        bench.permit(retry=True)

        assert bench.breaker.report().tokens == 4
        bench.hears(tokens=0)
        bench.refusal(retry=True)

    def test_a_failure_asks_for_one(self, bench: Bench) -> None:
        bench.call(False, 3)

        assert bench.breaker.report().want == 3


class TestFleet:
    """What the fleet knows."""

    def test_its_opening_is_ours(self, bench: Bench) -> None:
        bench.hears(state="open", epoch=5, opens=2, until_ms=4_000)

        assert bench.refusal().wait_s == pytest.approx(4.01)
        assert bench.events == [BreakerChanged(deployment="a", state="open", fleet=True, for_s=4)]

    def test_a_probe_needs_the_token(self, bench: Bench) -> None:
        bench.hears(state="open", epoch=5, opens=1, until_ms=0)

        bench.refusal()
        assert bench.breaker.report().probe == "ask"
        bench.refusal()
        bench.hears(state="open", epoch=5, opens=1, probe=True)
        permit = bench.permit()
        bench.refusal()
        assert bench.breaker.report().probe == "running"
        bench.breakers.ended(permit, ok=True)
        assert bench.state() is BreakerState.HALF_OPEN  # until the fleet says so
        bench.refusal()
        assert bench.breaker.report().probe == "ok"
        bench.hears(state="ramp", epoch=6)
        assert bench.state() is BreakerState.RAMP

    def test_a_token_that_nobody_used_in_time_is_void(self, bench: Bench) -> None:
        bench.hears(state="open", epoch=5, opens=1)
        bench.refusal()
        bench.hears(state="open", epoch=5, opens=1, probe=True)
        bench.now += HOLD_S

        bench.refusal()

    def test_a_probe_that_ends_during_an_exchange_is_told_in_the_next(self, bench: Bench) -> None:
        view = dataclasses.replace(CLOSED, state="open", epoch=5, opens=1, probe=True)
        bench.hears(state="open", epoch=5, opens=1)
        bench.refusal()
        bench.hears(state="open", epoch=5, opens=1, probe=True)
        permit = bench.permit()
        report = bench.breaker.report()
        bench.breakers.ended(permit, ok=False)
        bench.breaker.adopt(view, report, asked_at=bench.now)

        bench.refusal()  # no second probe meanwhile
        assert bench.breaker.report().probe == "failed"

    def test_one_that_sees_nothing_wrong_lets_our_opening_stand(self, bench: Bench) -> None:
        bench.call(False, 20)
        bench.hears(state="closed", calls=1_000, failed=20)

        assert bench.state() is BreakerState.OPEN
        bench.now += OPTIONS.cool_down_s
        bench.call(True)  # our own probe
        assert bench.state() is BreakerState.RAMP

    def test_one_that_is_open_ends_our_own_ramp(self, bench: Bench) -> None:
        bench.hears(state="open", epoch=5, opens=1, until_ms=1_000)
        bench.goes_on_alone()
        bench.call(True)
        assert bench.state() is BreakerState.RAMP

        bench.hears(state="open", epoch=5, opens=1)

        assert bench.state() is BreakerState.HALF_OPEN
        bench.refusal()

    def test_the_result_of_a_probe_counts_here_if_the_fleet_is_gone(self, bench: Bench) -> None:
        bench.hears(state="open", epoch=5, opens=1)
        bench.refusal()
        bench.hears(state="open", epoch=5, opens=1, probe=True)
        bench.breakers.ended(bench.permit(), ok=True)
        bench.hears_nothing()
        assert bench.state() is BreakerState.HALF_OPEN

        bench.goes_on_alone()
        bench.hears_nothing()
        assert bench.state() is BreakerState.RAMP

    def test_counts_are_told_once_and_of_their_epoch(self, bench: Bench) -> None:
        bench.call(True, 3)
        bench.call(False, 2)
        first, second = bench.breaker.report(), bench.breaker.report()

        assert (first.ok, first.failed, first.firsts) == (3, 2, 5)
        assert (second.ok, second.failed, second.firsts) == (0, 0, 0)

    def test_one_event_a_change(self, bench: Bench) -> None:
        for until_ms in (3_000, 2_000, 1_000):
            bench.hears(state="open", epoch=5, opens=1, until_ms=until_ms)
        bench.hears(state="open", epoch=6, opens=2, until_ms=9_000)
        bench.hears(state="ramp", epoch=7)
        bench.hears(state="closed", epoch=7)

        changes = [event for event in bench.events if isinstance(event, BreakerChanged)]
        assert [change.state for change in changes] == ["open", "ramp", "closed"]


class TestStop:
    def test_no_call_and_then_one_probe(self, bench: Bench) -> None:
        bench.breakers.stop("a", 60)

        assert bench.refusal().code == "key_stopped"
        assert bench.breaker.report().stop_ms == 60_000
        bench.goes_on_alone()
        bench.now += 60
        bench.permit()
        bench.refusal()

    def test_it_is_told_once(self, bench: Bench) -> None:
        permits = [bench.permit() for _ in range(3)]
        for permit in permits:
            bench.breakers.ended(permit, ok=None)
            bench.breakers.stop("a", 60)

        assert [e for e in bench.events if isinstance(e, KeyStopped)] == [
            KeyStopped(deployment="a", for_s=60)
        ]

    def test_it_is_told_to_the_fleet_until_that_has_heard(self, bench: Bench) -> None:
        bench.breakers.stop("a", 60)
        bench.hears_nothing()
        bench.now += 1
        assert bench.breaker.report().stop_ms == 59_000
        bench.hears(state="open", epoch=5, stopped=True, until_ms=59_000)

        assert bench.breaker.report().stop_ms == 0
        assert bench.refusal().code == "key_stopped"

    def test_a_stop_during_an_exchange_is_not_forgotten(self, bench: Bench) -> None:
        report = bench.breaker.report()
        bench.breakers.stop("a", 60)
        bench.breaker.adopt(CLOSED, report, asked_at=bench.now)

        assert bench.refusal().code == "key_stopped"
        assert bench.breaker.report().stop_ms == 60_000

    def test_a_probe_that_finds_it_exhausted_still_stops_it_again(self, bench: Bench) -> None:
        bench.goes_on_alone()
        bench.breakers.stop("a", 60)
        bench.now += 60
        permit = bench.permit()
        bench.breakers.stop("a", 60)
        bench.breakers.ended(permit, ok=None)

        assert bench.breakers.snapshot()[0].until_s == 60

    def test_deployments_of_one_key_stop_together(self) -> None:
        bench = Bench(keys={"a": "one", "b": "one"})
        bench.breakers.stop("a", 60)

        assert [status.stopped for status in bench.breakers.snapshot()] == [True, True]

    def test_keys_are_compared_by_address_and_secret(self) -> None:
        deployments = [
            ("x", "http://one.test/v1", 'api_key = "k1"'),
            ("y", "http://one.test/v1", 'api_key = "k1"'),
            ("z", "http://one.test/v1", 'api_key = "k2"'),
            ("w", "http://two.test/v1", 'api_key = "k1"'),
            ("v", "http://one.test/v1", ""),
        ]
        text = "[models.m]\n" + "".join(
            f'[[models.m.deployments]]\nname = "{name}"\nbase_url = "{url}"\n{key}\n'
            for name, url, key in deployments
        )
        breakers = Breakers.of(parse_fleet(text), calls=4, emit=lambda _: None)
        breakers.stop("x", 60)

        stopped = {status.deployment for status in breakers.snapshot() if status.stopped}
        assert stopped == {"x", "y"}


class AloneMachine(RuleBasedStateMachine):
    """Any calls, ends and pauses: what a breaker that judges by itself must never do."""

    OPTIONS = BreakerOptions(
        window_s=10, min_calls=4, failure_share=0.5, cool_down_s=2, max_cool_down_s=16, ramp_s=8
    )
    LIMIT = 10

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(self.OPTIONS, self.LIMIT)
        self.bench.goes_on_alone()
        self.flying: list[tuple[Permit, int, float]] = []  # and since when
        self.seen: list[tuple[int, bool]] = []  # the piece and the end of each call of this time
        self.time = 0  # grows with each opening and each good probe

    @property
    def piece(self) -> int:
        return int(self.bench.now / (self.OPTIONS.window_s / PIECES))

    @rule(eighths=st.integers(0, 40))
    def wait(self, eighths: int) -> None:
        self.bench.hears_nothing()  # what ended is counted before much time goes by
        self.bench.now += eighths / 8

    @rule(retry=st.booleans())
    def ask(self, retry: bool) -> None:
        status = self.bench.breakers.snapshot()[0]
        before = self.bench.breaker.in_flight
        answer = self.bench.admit(retry=retry)
        if isinstance(answer, Refusal):
            assert answer.wait_s > 0
            assert status.state is not BreakerState.CLOSED or retry
            return
        assert status.state is not BreakerState.OPEN
        if status.state is BreakerState.RAMP:
            assert before < max(1, status.share * self.LIMIT)
        if status.state is BreakerState.HALF_OPEN:
            fresh_since = self.bench.now - self.OPTIONS.max_cool_down_s
            probes = [began for _, time, began in self.flying if time == self.time]
            assert all(began <= fresh_since for began in probes), "two probes"
        self.flying.append((answer, self.time, self.bench.now))

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 1_000), ok=st.sampled_from([True, True, False, False, None]))
    def end(self, which: int, ok: bool | None) -> None:
        permit, time, _ = self.flying.pop(which % len(self.flying))
        before = self.bench.breakers.snapshot()[0]
        self.bench.breakers.ended(permit, ok=ok)
        after = self.bench.breakers.snapshot()[0]
        if before.state in {BreakerState.CLOSED, BreakerState.RAMP}:
            if time == self.time and ok is not None:
                self.seen.append((self.piece, ok))
            assert (after.state is BreakerState.OPEN) == (ok is False and self._must_open(time))
        elif after.state is BreakerState.RAMP:
            assert ok
        if (before.state, before.until_s) != (after.state, after.until_s):
            self.time += 1
            self.seen = []

    def _must_open(self, time: int) -> bool:
        recent = [ok for piece, ok in self.seen if piece > self.piece - PIECES]
        return time == self.time and len(recent) >= 4 and 2 * recent.count(False) >= len(recent)

    @invariant()
    def counts_every_call_in_flight(self) -> None:
        assert self.bench.breaker.in_flight == len(self.flying)


AloneMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, derandomize=True
)
TestAloneMachine = AloneMachine.TestCase
