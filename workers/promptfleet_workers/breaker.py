"""A circuit breaker and a retry budget of one deployment: this worker's mirror of the fleet's.

Nothing here waits or does I/O. `breakers` asks it before each call and tells it how the call
ended; `breaker_exchange` swaps what was counted for what the fleet knows. Where the fleet can't be
asked, the mirror judges by its own counts.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Callable

from promptfleet_shared.fleet import BreakerOptions
from promptfleet_workers.breaker_reports import FleetView, Probe, Report, State
from promptfleet_workers.telemetry import BreakerChanged, Emit

ALONE_AFTER_S = 3.0
"""Without news of the fleet for so long, a worker probes and saves up retries by itself."""
HOLD_S = 1.5
"""How long a probe may wait for its job; the server keeps its token for longer."""
ASK_AGAIN_S = 0.5
"""What a job waits for a probe, room in the ramp, or a retry, when nobody knows how long."""
FIRST_SHARE = 0.1
"""The share of the usual concurrency with which a ramp begins."""
SAVED_S = 10.0
"""The retries of so many seconds are saved up while nobody retries."""
MAX_WANT = 1_000
MAX_OPENS = 30
PIECES = 10


class BreakerState(enum.StrEnum):
    """How a breaker shows itself."""

    CLOSED = "closed"  # calls go through
    OPEN = "open"  # no call goes through
    HALF_OPEN = "half_open"  # one probe for the whole fleet
    RAMP = "ramp"  # a growing share of the usual calls


# -- what callers see --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """Leave for one call; give it back to `Breakers.ended`. Calls of one time share an object."""

    breaker: Breaker


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """No call now.

    Attributes:
        code: "circuit_open", "key_stopped" or "retry_budget".
        wait_s: Seconds until it is worth asking again; random, so that many don't ask at once.
    """

    code: str
    wait_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BreakerStatus:
    """How a deployment's breaker stands, as this worker knows it.

    Attributes:
        fleet: False if this worker judges by itself.
        stopped: True if the key's quota is exhausted.
        until_s: Seconds until a probe may be made; 0 unless open.
        share: The share of the usual calls in flight that are let through, 0 to 1.
        in_flight: Calls in flight from this worker.
        calls: Calls in the window, of the whole fleet by the last exchange.
        failed: Failed ones among them.
    """

    deployment: str
    state: BreakerState
    fleet: bool
    stopped: bool
    until_s: float
    share: float
    in_flight: int
    calls: int
    failed: int


class Window:
    """Own calls of the last seconds, in pieces."""

    def __init__(self, span_s: float) -> None:
        """Nothing counted yet."""
        self._piece_s = span_s / PIECES
        self._pieces: deque[tuple[int, int, int]] = deque()
        self.calls = 0
        self.failed = 0

    def add(self, now: float, calls: int, failed: int) -> None:
        """Count calls, and forget old ones."""
        piece = math.floor(now / self._piece_s)
        if calls:
            self._pieces.append((piece, calls, failed))
        self.calls += calls
        self.failed += failed
        while self._pieces and self._pieces[0][0] <= piece - PIECES:
            _, old_calls, old_failed = self._pieces.popleft()
            self.calls -= old_calls
            self.failed -= old_failed

    def clear(self) -> None:
        """Forget all."""
        self._pieces.clear()
        self.calls = self.failed = 0


class Breaker:
    """One deployment's: the hot path reads and counts attributes, all else is a step aside."""

    def __init__(
        self,
        name: str,
        *,
        limit: int,
        options: BreakerOptions,
        worker: str,
        emit: Emit,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        """Closed, knowing nothing of the fleet; the arguments are those of `Breakers`."""
        self.name = name
        self.wake: Callable[[], None] = lambda: None
        self._limit = limit
        self._options = options
        self._worker = worker
        self._emit = emit
        self._clock = clock
        self._random = random
        # The hot path's.
        self.closed = True
        self.well = not options.enabled
        self.in_flight = 0
        self.oks = 0
        self.firsts = 0
        self.permit = Permit(self)
        # How things stand.
        self._state: State = "closed"
        self._local = False  # this state is our own judgement, not the fleet's
        self._epoch = 0
        self._opens = 0
        self._open_until = self._ramp_from = clock()
        self._stopped = False
        self._stop_until: float | None = None  # to be told to the fleet
        self._heard_at = self._open_until
        self._fleet_calls = self._fleet_failed = 0
        self._refused = 0  # in this state, so that many jobs come back one after the other
        # What was counted.
        self._window = Window(options.window_s)
        self._new_ok = self._new_failed = 0  # not yet reported
        # The probe.
        self._asks = False
        self._token_until = -math.inf
        self._probing: Permit | None = None
        self._probing_since = 0.0
        self._found: Probe = ""  # what the last probe found, not yet reported
        # The retry budget.
        self._tokens = 0.0
        self._spare = True
        self._demand = 0
        self._earned_at = self._open_until

    # -- asked for leave -----------------------------------------------------------------------

    def decide(self, *, retry: bool) -> Permit | Refusal:
        """Whatever is not simply closed and well."""
        now = self._clock()
        self._end_ramp(now)
        if self._state == "open":
            return self._decide_open(now)
        if self._state == "ramp":
            room = max(1, int(self._share(now) * self._limit))
            if self.in_flight >= room:
                return self._refuse("circuit_open", ASK_AGAIN_S)
        if retry and not self.well and not self._take_token():
            return self._refuse("retry_budget", max(ASK_AGAIN_S, 1 / self._options.retries_per_s))
        if not retry:
            self.firsts += 1
        self.in_flight += 1
        return self.permit

    def _decide_open(self, now: float) -> Permit | Refusal:
        code = "key_stopped" if self._stopped else "circuit_open"
        if now < self._open_until:
            return self._refuse(code, self._open_until - now)
        if self._probing is None and not self._found:
            if self._alone(now) or now < self._token_until:
                self._token_until = -math.inf
                self._probing = Permit(self)
                self._probing_since = now
                self.in_flight += 1
                self.wake()  # the server must hear of it before the token runs out
                return self._probing
            self._asks = True
            self.wake()
        return self._refuse(code, ASK_AGAIN_S)

    def _refuse(self, code: str, wait_s: float) -> Refusal:
        """As if each of those who wait took a second of one of the usual calls in flight."""
        self._refused += 1
        spread_s = min(self._options.ramp_s, self._refused / self._limit)
        return Refusal(code, wait_s + self._random() * spread_s)

    def _take_token(self) -> bool:
        self._demand += 1
        if self._tokens < 1:
            if not self._spare:
                return False
            self._spare = False
        self._tokens -= 1
        return True

    def _share(self, now: float) -> float:
        grown = (now - self._ramp_from) / self._options.ramp_s
        return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * max(0.0, grown))

    def _alone(self, now: float) -> bool:
        return self._local or now - self._heard_at > ALONE_AFTER_S

    # -- told how calls ended ------------------------------------------------------------------

    def ended_otherwise(self, permit: Permit, *, ok: bool | None) -> None:
        """A failure, or the end of a call that began in another time."""
        if permit is self._probing:
            self._probing = None
            self._found = "none" if ok is None else "ok" if ok else "failed"
            now = self._clock()
            if self._alone(now):
                self._act_on_probe(now)
            self.wake()
        elif permit is self.permit and ok is False and self._options.enabled:
            self._fail(self._clock())

    def _fail(self, now: float) -> None:
        self._new_failed += 1
        self._demand += 1  # this one may want to come back
        self._fold(now, failed=1)
        window, options = self._window, self._options
        self.well = self.well and not self._own_unwell
        proven = window.calls >= options.min_calls
        if self._state != "open" and proven and self._own_share >= options.failure_share:
            self._open(now)
            self.wake()

    def _fold(self, now: float, *, failed: int = 0) -> None:
        """Move the hot path's counts to where they are kept."""
        ok, self.oks = self.oks, 0
        self._new_ok += ok
        self._window.add(now, ok + failed, failed)

    @property
    def _own_share(self) -> float:
        return self._window.failed / max(1, self._window.calls)

    @property
    def _own_unwell(self) -> bool:
        return self._own_share > self._options.retry_share

    # -- judging by itself ---------------------------------------------------------------------

    def _open(self, now: float) -> None:
        options = self._options
        self._opens = min(self._opens + 1, MAX_OPENS)
        cool_down_s = options.cool_down_s * 2 ** (self._opens - 1)
        self._open_until = now + min(options.max_cool_down_s, cool_down_s)
        self._stopped = False
        self._begin("open", now, local=True)

    def _act_on_probe(self, now: float) -> None:
        found, self._found = self._found, ""
        if found == "ok":
            self._ramp_from, self._stopped = now, False
            self._begin("ramp", now, local=True)
        elif found == "failed":
            self._open(now)
        else:
            self._open_until = max(self._open_until, now + 1.0)

    def _end_ramp(self, now: float) -> None:
        if self._state == "ramp" and now - self._ramp_from >= self._options.ramp_s:
            self._opens = 0
            self._settle("closed", now, local=False)

    def _begin(self, state: State, now: float, *, local: bool) -> None:
        """A new time: what began before it says nothing about it."""
        self.permit = Permit(self)
        self.oks = 0
        self._window.clear()
        self.well = False
        self._probing, self._found = None, ""
        self._token_until = -math.inf
        self._settle(state, now, local=local)

    def _settle(self, state: State, now: float, *, local: bool) -> None:
        changed = state != self._state
        self._state, self._local = state, local
        self.closed = state == "closed"
        if changed:
            self._refused = 0
            self._emit(
                BreakerChanged(
                    deployment=self.name,
                    state=state,
                    fleet=not local,
                    stopped=self._stopped,
                    for_s=round(max(0.0, self._open_until - now), 3) if state == "open" else 0.0,
                )
            )

    # -- a key whose quota is exhausted --------------------------------------------------------

    def stop(self, for_s: float) -> bool:
        """Make no call for a time; false if that is known already."""
        now = self._clock()
        if not self._options.enabled or (self._stopped and now < self._open_until):
            return False
        known = self._stopped
        until = max(now + for_s, self._open_until if self._state == "open" else now)
        self._open_until = self._stop_until = until
        self._stopped = True
        if self._state != "open":
            self._begin("open", now, local=True)
        self.wake()
        return not known

    # -- the exchange --------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True while there is something to say, or to wait for."""
        counted = self.oks or self.firsts or self._new_ok or self._new_failed or self._demand
        return not self.closed or bool(counted)

    def report(self) -> Report:
        """What to tell the fleet; it counts as told."""
        now = self._clock()
        self._fold(now)
        self._end_ramp(now)
        stop_s = 0.0 if self._stop_until is None else max(0.0, self._stop_until - now)
        report = Report(
            worker=self._worker,
            epoch=self._epoch,
            ok=self._new_ok,
            failed=self._new_failed,
            firsts=self.firsts,
            tokens=self._tokens,
            want=min(self._demand, MAX_WANT),
            probe=self._probe_news(now),
            tripped=self._local and self._state == "open" and self._stop_until is None,
            stop_ms=stop_s * 1000,
            state="closed" if self._local else self._state,
            opens=self._opens,
            until_ms=max(0.0, self._open_until - now) * 1000,
            ramp_ms=max(0.0, now - self._ramp_from) * 1000,
            stopped=self._stopped,
        )
        self._new_ok = self._new_failed = self.firsts = self._demand = 0
        self._asks = False
        return report

    def _probe_news(self, now: float) -> Probe:
        if self._found:
            return self._found
        if self._probing is not None:
            if now - self._probing_since < self._options.max_cool_down_s:
                return "running"
            self._probing = None  # it hangs; another one may find out
        return "ask" if self._asks else ""

    def adopt(self, view: FleetView, report: Report, *, asked_at: float) -> None:
        """Go on with what the fleet answered to a report that was made at `asked_at`."""
        now = self._clock()
        self._heard_at = self._earned_at = now
        self._tokens += view.tokens - report.tokens  # less what was spent meanwhile
        self._spare = view.spare
        self._fleet_calls, self._fleet_failed = view.calls, view.failed
        if report.stop_ms:
            self._stop_until = None
        if report.probe and report.probe == self._found:
            self._found = ""
        if view.epoch != self._epoch:
            self._epoch = view.epoch
            self._new_ok = self._new_failed = 0
            self._take_over(view, now, anew=True)
        elif not self._knows_better(view):
            self._take_over(view, now, anew=self._local)
            if view.probe and self._probing is None and report.probe == "ask":
                self._token_until = asked_at + HOLD_S
        well = view.well and self._state != "open" and not self._own_unwell
        self.well = well or not self._options.enabled

    def _knows_better(self, view: FleetView) -> bool:
        """Our own judgement stands where the fleet has none against it."""
        if not self._local:
            return False
        return view.state == "closed" or (view.state == "ramp" and self._state == "open")

    def _take_over(self, view: FleetView, now: float, *, anew: bool) -> None:
        self._opens, self._stopped = view.opens, view.stopped
        self._open_until = now + view.until_ms / 1000
        self._ramp_from = now - view.ramp_ms / 1000
        if anew:
            self._begin(view.state, now, local=False)
        else:
            self._settle(view.state, now, local=False)

    def not_heard(self, report: Report) -> None:
        """The report reached nobody, as far as we know: go on with our own judgement."""
        now, options = self._clock(), self._options
        if now - self._heard_at <= ALONE_AFTER_S or not options.enabled:
            return
        if self._found:
            self._act_on_probe(now)
        saved = max(1.0, SAVED_S * options.retries_per_s) + options.retry_share * self._window.calls
        earned = (now - self._earned_at) * options.retries_per_s
        self._earned_at = now
        self._tokens = min(saved, self._tokens + earned + options.retry_share * report.firsts)
        enough = self._window.calls >= options.min_calls
        self.well = enough and not self._own_unwell

    # -- to see --------------------------------------------------------------------------------

    @property
    def open_for_s(self) -> float | None:
        """Seconds until a probe may be made; None unless open."""
        return max(0.0, self._open_until - self._clock()) if self._state == "open" else None

    def status(self) -> BreakerStatus:
        """How it stands."""
        now = self._clock()
        self._end_ramp(now)
        state = BreakerState(self._state)
        if state is BreakerState.OPEN and now >= self._open_until:
            state = BreakerState.HALF_OPEN
        shares = {"closed": 1.0, "open": 0.0, "ramp": self._share(now)}
        return BreakerStatus(
            deployment=self.name,
            state=state,
            fleet=not self._alone(now),
            stopped=self._stopped,
            until_s=max(0.0, self._open_until - now) if self._state == "open" else 0.0,
            share=shares[self._state],
            in_flight=self.in_flight,
            calls=self._fleet_calls,
            failed=self._fleet_failed,
        )
