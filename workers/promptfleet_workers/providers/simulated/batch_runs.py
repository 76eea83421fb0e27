"""What both batch APIs have in common: lines that are done one after the other, in a batch's time.

Nothing runs in the background: what a batch has come to is worked out when somebody looks. A line
that was reached before the batch expired or was cancelled has its answer, and is counted as a call
of its prompt; the results come in an order of their own.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from .answers import Body, Call, Rejected
from .faults import refusal
from .markers import Fault, FaultKind
from .options import Options
from .stats import Stats


class Unanswered(Exception):  # noqa: N818 - a reply that never comes
    """Nothing is said to this request, ever."""


class Endpoint(Protocol):
    """One inference endpoint, as far as lines need it."""

    def read(self, body: Body, options: Options, number: int) -> Call:
        """The request with its answers; Rejected when it is not valid."""
        ...

    def payload(self, call: Call) -> bytes:
        """The body of the whole answer."""
        ...

    def error_payload(self, rejected: Rejected) -> bytes:
        """The body of an error reply."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A request of a batch."""

    custom_id: str
    body: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A line and its answer; a status of 0 for one that was not reached."""

    line: Line
    status: int = 0
    body: Any = None


@dataclass(kw_only=True, slots=True)
class Run:
    """A batch on its way; times are steady seconds, `created_at` is seconds since 1970."""

    id: str
    lines: Sequence[Line]
    endpoint: Endpoint
    begun: float
    takes_s: float
    expires_s: float
    cancel_s: float
    created_at: float = field(default_factory=time.time)
    cancelled: float | None = None
    done: list[Done] | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # of one API's shape

    @property
    def _stops(self) -> float:
        """When no further line is begun."""
        latest = self.begun + self.expires_s
        return latest if self.cancelled is None else min(latest, self.cancelled)

    @property
    def ends(self) -> float:
        """When nothing is to come any more."""
        whole = self.begun + self.takes_s
        if whole <= self._stops:
            return whole
        is_cancelled = self.cancelled is not None and self._stops == self.cancelled
        return self._stops + (self.cancel_s if is_cancelled else 0.0)

    def cancel(self, now: float) -> None:
        """Begin no further line."""
        if self.cancelled is None and now < self.ends:
            self.cancelled = now

    def state(self, now: float) -> str:
        """in_progress, cancelling, completed, cancelled or expired."""
        if now < self.ends:
            return "in_progress" if self.cancelled is None else "cancelling"
        if self.begun + self.takes_s <= self._stops:
            return "completed"
        return "cancelled" if self.cancelled is not None else "expired"

    def reached(self, now: float) -> int:
        """How many lines were done by now."""
        if not self.takes_s or self.begun + self.takes_s <= min(now, self._stops):
            return len(self.lines)
        share = (min(now, self._stops) - self.begun) / self.takes_s
        return min(len(self.lines), max(0, int(share * len(self.lines))))


class Runs:
    """The batches of one API, the newest last."""

    def __init__(self, stats: Stats, clock: Callable[[], float]) -> None:
        self._stats = stats
        self._clock = clock
        self._runs: dict[str, Run] = {}

    def begin(self, name: str, lines: Sequence[Line], endpoint: Endpoint, options: Options) -> Run:
        """A new batch, made now."""
        low, high = options.batch_ms
        run = Run(
            id=f"{name}{len(self._runs) + 1:08d}",
            lines=lines,
            endpoint=endpoint,
            begun=self._clock(),
            takes_s=random.Random(len(self._runs)).uniform(low, high) / 1000,  # noqa: S311
            expires_s=options.batch_expires_s,
            cancel_s=options.batch_cancel_ms / 1000,
        )
        self._runs[run.id] = run
        self._stats.batches += 1
        self._stats.batch_lines += len(lines)
        return run

    def find(self, name: str) -> Run:
        """The batch of this name."""
        run = self._runs.get(name)
        if run is None:
            raise Rejected(404, f"No batch found with id '{name}'.")
        return run

    def newest(self) -> list[Run]:
        """All of them, the newest first."""
        return list(self._runs.values())[::-1]

    def state(self, run: Run) -> str:
        """As `Run.state`, now."""
        return run.state(self._clock())

    def cancel(self, run: Run) -> None:
        """As `Run.cancel`, now."""
        run.cancel(self._clock())

    def counts(self, run: Run, options: Options) -> Counter[int]:
        """Lines by their status: 0 for those without an answer (yet)."""
        now = self._clock()
        if now >= run.ends:
            return Counter(done.status for done in self.results(run, options))
        reached = run.reached(now)
        return Counter({200: reached, 0: len(run.lines) - reached})

    def results(self, run: Run, options: Options) -> list[Done]:
        """What became of the lines of a batch that has ended, in no order."""
        if run.done is None:
            reached = run.reached(run.ends)
            run.done = [
                self._answer(run.endpoint, line, options) if n < reached else Done(line=line)
                for n, line in enumerate(run.lines)
            ]
            random.Random(run.id).shuffle(run.done)  # noqa: S311 - no secret
        return run.done

    def _answer(self, endpoint: Endpoint, line: Line, options: Options) -> Done:
        try:
            call = self._call(endpoint, line, options)
        except Rejected as rejected:
            body = orjson.loads(endpoint.error_payload(rejected))
            return Done(line=line, status=rejected.status, body=body)
        return Done(line=line, status=200, body=orjson.loads(endpoint.payload(call)))

    def _call(self, endpoint: Endpoint, line: Line, options: Options) -> Call:
        """The line as a call with its answer; Rejected where it gets an error."""
        if not isinstance(line.body, Mapping):
            raise Rejected(400, "The body of the request is not a JSON object.")
        call = endpoint.read(line.body, options, self._stats.batch_lines)
        if options.models and call.model not in options.models:
            raise Rejected(404, f"The model `{call.model}` does not exist.", param="model")
        prompt = call.prompts[0]
        self._stats.prompts += len(call.prompts)
        nth = self._stats.call_of(prompt.digest)
        fault = prompt.directive.fault_of_call(nth) if prompt.directive else None
        if fault is not None:
            self._stats.failed(prompt.digest)
            raise _rejection(fault)
        return call


def _rejection(fault: Fault) -> Rejected:
    if fault.kind is FaultKind.STATUS:
        return refusal(fault, is_anthropic=False)
    return Rejected(500, "The server had an error.", kind="server_error")


def page(
    runs: Sequence[Run], limit: str | None, after: str | None, *, most: int
) -> tuple[list[Run], bool]:
    """A page of a list, and whether there is more."""
    size = int(limit) if limit and limit.isdecimal() else 20
    if not 1 <= size <= most:
        raise Rejected(400, f"'limit' must be from 1 to {most}.", param="limit")
    names = [run.id for run in runs]
    start = names.index(after) + 1 if after in names else 0
    return list(runs[start : start + size]), start + size < len(runs)
