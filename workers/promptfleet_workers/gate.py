"""Where the worker hooks into Celery: start and stop with it, and take no more than fits."""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any, ClassVar, NoReturn

from celery import bootsteps

from promptfleet_shared.errors import BrokerUnavailableError, ConfigurationError
from promptfleet_shared.queueing import INTERACTIVE_STEPS, PRIORITY_STEPS, refuse_eviction
from promptfleet_shared.tiers import tier_of_queue
from promptfleet_workers.worker import FleetWorker

log = logging.getLogger(__name__)

EX_CONFIG = 78
"""The exit status (of sysexits.h) of a worker that can't run as it is set up."""
TICK_S = 0.02
"""Celery's loop sleeps until something happens; free slots are seen by the next tick."""
FLUSH_EVENTS_S = 0.25
EVENTS_BUFFERED = 500
LONG_LOOK_S = 1.0
"""How long one look at a queue lasts while nothing comes; kombu's own."""
SHORT_LOOK_S = 0.05


class FleetStep(bootsteps.StartStopStep):
    """Starts the worker after Celery's pool and stops it before, so that waiting tasks can end."""

    requires: ClassVar[set[str]] = {"celery.worker.components:Pool"}

    def __init__(self, parent: Any, **options: Any) -> None:
        """Celery makes it, before it makes its consumer.

        Workers have nothing to tell each other: Postgres knows who has what. Without Celery's
        small talk a worker starts a second sooner, and comes through a lost broker with fewer
        steps that can fail or hang.
        """
        super().__init__(parent, **options)
        parent.options.update(without_gossip=True, without_mingle=True)

    def start(self, parent: Any) -> None:
        """Start for the queues that `-Q` names.

        Raises:
            SystemExit: The pool can't wait for an event loop, or a setting is wrong.
        """
        pool = parent.pool_cls.__module__
        if not pool.endswith((".thread", ".solo")):
            _refuse(f"the pool must be threads, not {pool}: start the worker with --pool=threads")
        tiers = [tier_of_queue(name) for name in parent.app.amqp.queues.consume_from]
        try:
            parent.app.fleet_worker.start([tier for tier in tiers if tier is not None])
        except ConfigurationError as error:
            _refuse(error.message)

    def stop(self, parent: Any) -> None:
        """Drain and stop."""
        parent.app.fleet_worker.stop()


class GateStep(bootsteps.StartStopStep):
    """Shuts the queues while no slot is free, so that idle workers take the jobs."""

    requires: ClassVar[set[str]] = {"celery.worker.consumer.tasks:Tasks"}

    def __init__(self, parent: Any, **options: Any) -> None:
        """Celery makes it."""
        super().__init__(parent, **options)
        self._timers: list[Any] = []

    def start(self, parent: Any) -> None:
        """Ask for room before each look at the queues; anew with each connection.

        Raises:
            SystemExit: The broker evicts.
        """
        try:
            refuse_eviction(parent.app)
        except BrokerUnavailableError:
            log.warning("eviction_unknown")  # lost again already: the next connection tells
        except ConfigurationError as error:
            _refuse(error.message)
        worker: FleetWorker = parent.app.fleet_worker
        channel = parent.task_consumer.channel
        qos = channel.qos
        celery_may = qos.can_consume

        def can_consume(_: Any) -> bool:
            worker.consumer_looked()
            if worker.reserves:
                return open_doors(worker, channel) and bool(celery_may())
            return worker.wants_work and bool(celery_may())

        qos.can_consume = MethodType(can_consume, qos)
        self._timers.append(parent.timer.call_repeatedly(TICK_S, _nothing))
        self._flush_events_seldom(parent)

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Forget the timers of a lost connection."""
        while self._timers:
            self._timers.pop().cancel()

    def _flush_events_seldom(self, parent: Any) -> None:
        # Celery publishes its events at every turn of the loop, at 0.3 ms a message; Flower is as
        # happy with four times a second.
        events = parent.event_dispatcher
        if events is None or events.on_send_buffered is None:
            return
        events.on_send_buffered = None
        events.buffer_limit = EVENTS_BUFFERED
        self._timers.append(parent.timer.call_repeatedly(FLUSH_EVENTS_S, events.flush))


def open_doors(worker: FleetWorker, channel: Any) -> bool:
    """Let the consumer look only at those lists of a queue that there is room for; false if none.

    A reserve is of use only while nobody waits in it for slots that are not of the reserve.
    """
    usual, interactive = worker.wants_work, worker.wants_interactive
    if usual and interactive:
        channel.priority_steps = list(PRIORITY_STEPS)
        channel.brpop_timeout = LONG_LOOK_S
    else:
        first, others = PRIORITY_STEPS[:INTERACTIVE_STEPS], PRIORITY_STEPS[INTERACTIVE_STEPS:]
        channel.priority_steps = list(first if interactive else others)
        channel.brpop_timeout = SHORT_LOOK_S  # the other lists are missed meanwhile
    return usual or interactive


def install(app: Any, worker: FleetWorker) -> None:
    """Tie the worker's life to the Celery app's, by its bootsteps."""
    app.fleet_worker = worker
    app.steps["worker"].add(FleetStep)
    app.steps["consumer"].add(GateStep)


def _refuse(reason: str) -> NoReturn:
    """End the worker with a sentence instead of a traceback."""
    log.critical("refused_to_start", extra={"reason": reason})
    raise SystemExit(EX_CONFIG)


def _nothing() -> None:
    """Wake Celery's loop."""
