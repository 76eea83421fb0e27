"""The breakers of all deployments: what is asked before a call, and told after it."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence

from promptfleet_shared.fleet import BreakerOptions, Fleet
from promptfleet_workers.breaker import Breaker, BreakerStatus, Permit, Refusal
from promptfleet_workers.telemetry import Emit, KeyStopped


class Breakers:
    """All deployments' breakers in one worker; used on the event loop's thread only."""

    def __init__(
        self,
        limits: Mapping[str, int],
        *,
        options: BreakerOptions,
        emit: Emit,
        keys: Mapping[str, Hashable] | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
    ) -> None:
        """All closed.

        Args:
            limits: Calls that may be in flight from this worker, by the deployment's name.
            options: From fleet.toml.
            emit: Is told of changes.
            keys: Deployments with equal values share a provider's account, so they stop together.
            clock: Gives steady seconds.
            random: Gives numbers from 0 to 1.
        """
        self.options = options
        self._emit = emit
        self.worker = uuid.uuid4().hex
        self._breakers = {
            name: Breaker(
                name,
                limit=limit,
                options=options,
                worker=self.worker,
                emit=emit,
                clock=clock,
                random=random,
            )
            for name, limit in limits.items()
        }
        self._keys: Mapping[str, Hashable] = keys or {}

    @classmethod
    def of(cls, fleet: Fleet, *, calls: int, emit: Emit) -> Breakers:
        """For every deployment of the fleet; `calls` may be in flight from this worker."""
        deployments = [d for model in fleet.models.values() for d in model.deployments]
        return cls(
            {d.name: min(calls, d.max_concurrent_calls or calls) for d in deployments},
            options=fleet.breaker,
            emit=emit,
            keys={d.name: hash((d.base_url, d.secret() or d.name)) for d in deployments},
        )

    def admit(self, name: str, *, retry: bool) -> Permit | Refusal:
        """Ask for leave to call a deployment now.

        Args:
            name: The deployment.
            retry: True if the job has been called before.
        """
        breaker = self._breakers[name]
        if breaker.closed and (not retry or breaker.well):
            if not retry:
                breaker.firsts += 1
            breaker.in_flight += 1
            return breaker.permit
        return breaker.decide(retry=retry)

    def ended(self, permit: Permit, *, ok: bool | None) -> None:
        """Tell how a call ended; exactly once for each permit.

        Args:
            permit: From `admit`.
            ok: True if it was answered, False if the provider failed, None if its end says
                nothing about the provider's health: a bad request, a rate limit, a cancellation.
        """
        breaker = permit.breaker
        breaker.in_flight -= 1
        if ok and permit is breaker.permit:
            breaker.oks += 1
        else:
            breaker.ended_otherwise(permit, ok=ok)

    def stop(self, name: str, for_s: float, *, alone: bool = False) -> None:
        """The key of this deployment is exhausted: no call in the whole fleet for `for_s` seconds.

        Then one probe, as after an opening. The first worker that finds out tells of it by an
        event. `alone` leaves out other deployments with the same key.
        """
        if alone:
            if self._breakers[name].stop(for_s):
                self._emit(KeyStopped(deployment=name, for_s=for_s))
            return
        key = self._keys.get(name, name)
        for other, breaker in self._breakers.items():
            if (other == name or self._keys.get(other, other) == key) and breaker.stop(for_s):
                self._emit(KeyStopped(deployment=other, for_s=for_s))

    def open_for_s(self, name: str) -> float | None:
        """Seconds until a deployment may be probed; None while calls go through."""
        breaker = self._breakers[name]
        return None if breaker.closed else breaker.open_for_s

    def snapshot(self) -> list[BreakerStatus]:
        """How all stand, for metrics."""
        return [breaker.status() for breaker in self._breakers.values()]

    def all(self) -> Sequence[Breaker]:
        """Each of them, for the exchange."""
        return tuple(self._breakers.values())
