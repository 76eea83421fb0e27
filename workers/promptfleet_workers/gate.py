"""Where the worker hooks into Celery: start and stop with it, and take no more than fits."""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

from celery import Celery, bootsteps
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.tiers import tier_of_queue

from promptfleet_workers.worker import FleetWorker

TICK_S = 0.02
"""Celery's loop sleeps until something happens; free slots are seen by the next tick."""


def install(app: Celery, worker: FleetWorker) -> None:
    """Tie the worker's life to Celery's, by its bootsteps."""

    class FleetStep(bootsteps.StartStopStep):
        """Starts after the pool and stops before it, so that waiting tasks can end."""

        requires: ClassVar[set[str]] = {"celery.worker.components:Pool"}

        def start(self, parent: Any) -> None:
            pool = parent.pool_cls.__module__
            if not pool.endswith((".thread", ".solo")):
                msg = f"the pool must be threads, not {pool}: start the worker with --pool=threads"
                raise ConfigurationError(msg)
            tiers = [tier_of_queue(name) for name in parent.app.amqp.queues.consume_from]
            worker.start([tier for tier in tiers if tier is not None])

        def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
            worker.stop()

    class GateStep(bootsteps.StartStopStep):
        """Shuts the queues while no slot is free, so that idle workers take the jobs."""

        requires: ClassVar[set[str]] = {"celery.worker.consumer.tasks:Tasks"}
        _tick: Any = None

        def start(self, parent: Any) -> None:
            qos = parent.task_consumer.channel.qos
            celery_may = qos.can_consume

            def can_consume(_: Any) -> bool:
                return worker.wants_work and bool(celery_may())

            qos.can_consume = MethodType(can_consume, qos)
            self._tick = parent.timer.call_repeatedly(TICK_S, _nothing)

        def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
            if self._tick is not None:
                self._tick.cancel()
                self._tick = None

    app.steps["worker"].add(FleetStep)
    app.steps["consumer"].add(GateStep)


def _nothing() -> None:
    """Wake Celery's loop."""
