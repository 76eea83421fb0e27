"""The queues: Celery's configuration, task names, routes, and how a doorbell is rung."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# The first doorbell may be rung at exit, when this can no longer be imported.
import kombu.transport.redis  # noqa: F401
from celery import Celery
from kombu import pools
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from promptfleet_shared.errors import BrokerUnavailableError, ConfigurationError
from promptfleet_shared.jobs import MAX_PRIORITY, Doorbell
from promptfleet_shared.tiers import queue_name, tier_of_queue

RUN_PROMPTS = "promptfleet.run_prompts"
"""The task that a doorbell names; its one argument is a list of job ids."""
MAX_IDS = 100
"""Ids that one message carries: 0.011 ms of a worker's CPU an id instead of 1 ms."""
KEEPS_ALL = "noeviction"
"""The one `maxmemory-policy` that loses no doorbells."""
EVICTION_CURE = (
    f"set maxmemory-policy {KEEPS_ALL} in its configuration (at once: CONFIG SET maxmemory-policy"
    f" {KEEPS_ALL}), or name another server in PROMPTFLEET_BROKER_URL; only a cache of its own"
    " (PROMPTFLEET_CACHE_URL) may evict"
)
PUBLISH_TIMEOUT_S = 2.0
BUSY_IDS = 20
"""Ids a window from which on the next window is `BUSY_WINDOWS` times as long."""
BUSY_WINDOWS = 5
PRIORITY_STEPS = tuple(range(8))
"""Redis has a list for each; 0 is consumed first. Neighbouring priorities share one."""
INTERACTIVE_STEPS = 2
"""The first of them, which only jobs of the interactive reserve use where there is one."""
PARKING_KEY = "promptfleet:fair"
"""What the keys of parked doorbells begin with; see parking.lua."""
PARKED_KEY = PARKING_KEY + ":%s:parked"

log = logging.getLogger(__name__)


def make_celery(broker_url: str, tiers: Iterable[str]) -> Celery:
    """The Celery app that producers and workers share: what they must agree on, and only that."""
    queues = [_queue(tier) for tier in tiers]
    app = Celery("promptfleet", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_queues=queues,
        task_create_missing_queues=True,
        task_default_queue=queues[0].name,  # else Flower shows a queue that nobody uses
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_protocol=2,
        enable_utc=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=PUBLISH_TIMEOUT_S,
        broker_transport_options={
            # Leases recover lost work, not Redis; without unacked bookkeeping the consumer is
            # 2.7 times faster and never redelivers what still runs.
            "ack_emulation": False,
            "priority_steps": list(PRIORITY_STEPS),
            "queue_order_strategy": "priority",
            # A worker waits for each of its dead connections in turn when it stops.
            "socket_timeout": 5,
            "socket_connect_timeout": PUBLISH_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return app


def _queue(tier: str) -> Queue:
    # On the default exchange: after a FLUSHDB, messages to a named one were dropped in silence.
    name = queue_name(tier)
    return Queue(name, exchange=Exchange(""), routing_key=name)


@contextlib.contextmanager
def asking_broker(app: Celery) -> Iterator[None]:
    """Turn what kombu, redis and sockets raise for a lost broker into `BrokerUnavailableError`."""
    try:
        yield
    except Exception as error:
        lost = app.connection_for_read().recoverable_connection_errors
        if isinstance(error, (OperationalError, OSError, *lost)):
            raise BrokerUnavailableError from error
        raise


def redis_step(priority: int, *, returned: bool = False) -> int:
    """Which of Redis' lists a doorbell goes to; they are consumed in their order.

    Args:
        priority: The job's, 9 the most urgent; neighbouring ones share a list.
        returned: True for a doorbell that had come to the front before.
    """
    return (MAX_PRIORITY - priority) // 3 * 2 + (0 if returned else 1)


def priority_of_step(step: int) -> int:
    """A priority whose doorbells go to this list."""
    return MAX_PRIORITY - step // 2 * 3


def publish(app: Celery, doorbells: Iterable[Doorbell]) -> int:
    """Ring now: a message for each `MAX_IDS` ids of a tier and priority step.

    Returns:
        How many messages were sent.

    Raises:
        BrokerUnavailableError: The broker can't be reached; the sweeper will ring.
    """
    messages = 0
    with asking_broker(app), app.producer_or_acquire() as producer:
        for (tier, step), ids in _grouped(doorbells).items():
            for start in range(0, len(ids), MAX_IDS):
                some = ids[start : start + MAX_IDS]
                app.send_task(
                    RUN_PROMPTS,
                    args=[some],
                    queue=queue_name(tier),
                    priority=step,
                    producer=producer,
                    retry=False,
                    ignore_result=True,
                )
                messages += 1
    return messages


def _grouped(doorbells: Iterable[Doorbell]) -> dict[tuple[str, int], list[str]]:
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for bell in doorbells:
        step = redis_step(bell.priority, returned=bell.returned)
        groups[bell.tier, step].append(str(bell.job_id))
    return groups


def queue_depths(app: Celery, tiers: Iterable[str]) -> dict[str, int]:
    """How many messages wait in each tier's queue, and jobs that are parked behind it.

    Raises:
        BrokerUnavailableError: The broker can't be reached.
    """
    names = tuple(tiers)
    with asking_broker(app), app.connection_or_acquire() as connection:
        parked = _parked(connection.default_channel, names)
        queued = _queued(connection.default_channel, names)
    return {tier: queued[tier] + parked.get(tier, 0) for tier in names}


def queued_messages(app: Celery, tiers: Iterable[str]) -> dict[str, int]:
    """How many messages wait in each tier's queue, without what is parked.

    Raises:
        BrokerUnavailableError: The broker can't be reached.
    """
    with asking_broker(app), app.connection_or_acquire() as connection:
        return _queued(connection.default_channel, tuple(tiers))


def parked_jobs(app: Celery, tiers: Iterable[str]) -> dict[str, int]:
    """How many jobs of each tier wait for their tenant's turn.

    Raises:
        BrokerUnavailableError: The broker can't be reached.
    """
    with asking_broker(app), app.connection_or_acquire() as connection:
        return _parked(connection.default_channel, tuple(tiers))


def _queued(channel: Any, tiers: Sequence[str]) -> dict[str, int]:
    declared = {
        tier: channel.queue_declare(queue=queue_name(tier), passive=False) for tier in tiers
    }
    return {tier: int(queue.message_count) for tier, queue in declared.items()}


def _parked(channel: Any, tiers: Sequence[str]) -> dict[str, int]:
    if not tiers or not hasattr(channel, "conn_or_acquire"):  # not Redis: nothing is parked
        return {}
    with channel.conn_or_acquire() as client:
        counts = client.mget([PARKED_KEY % queue_name(tier) for tier in tiers])
    return {tier: int(count or 0) for tier, count in zip(tiers, counts, strict=True)}


def eviction_policy(app: Celery) -> str | None:
    """What the broker does once its memory is full (`maxmemory-policy`); None if it won't tell.

    Raises:
        BrokerUnavailableError: The broker can't be reached.
    """
    with asking_broker(app), app.connection_or_acquire() as connection:
        try:
            with connection.default_channel.conn_or_acquire() as client:
                # Not CONFIG GET, which managed servers forbid.
                policy: str | bytes | None = client.info("memory").get("maxmemory_policy")
        except connection.channel_errors:  # our user may not ask
            return None
    return policy.decode() if isinstance(policy, bytes) else policy


def eviction_problem(policy: str | None) -> str | None:
    """Why no worker starts on a broker with this policy; None if one does, or nobody knows."""
    if policy in {None, KEEPS_ALL}:
        return None
    return (
        f"the broker's maxmemory-policy is {policy}: once its memory is full it may evict whole"
        " queues of doorbells"
    )


def refuse_eviction(app: Celery) -> None:
    """Do nothing if the broker keeps what it is given.

    Raises:
        ConfigurationError: It evicts.
        BrokerUnavailableError: It can't be reached.
    """
    problem = eviction_problem(eviction_policy(app))
    if problem is not None:
        msg = f"{problem}; {EVICTION_CURE}"
        raise ConfigurationError(msg)


class Ringer:
    """Rings in the background: ids of concurrent calls share one message a tier.

    `ring` returns at once and never fails: a doorbell that can't be delivered is dropped, and the
    sweeper rings in its place. Safe to fork (a child starts with an empty queue and a connection
    of its own) and flushed at exit.
    """

    def __init__(
        self,
        app: Celery,
        *,
        window_s: float = 0.01,
        deliver: Callable[[Celery, Sequence[Doorbell]], object] = publish,
    ) -> None:
        """Start nothing yet; the thread comes with the first doorbell.

        Args:
            app: From `make_celery`.
            window_s: Seconds between two messages, at least: the first doorbell after a quiet time
                is rung at once, those that follow it together.
            deliver: What becomes of the doorbells: they are sent, or wait for their turn.
        """
        self._app = app
        self._deliver = deliver
        self._window_s = window_s
        self._start_empty()
        _ringers.add(self)
        atexit.register(self.close)

    def _start_empty(self) -> None:
        self._waiting: list[Doorbell] = []
        self._changed = threading.Condition()
        self._publishing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._busy: bool = False
        self._hurry: bool = False
        self._closed: bool = False
        self._rung_at = time.monotonic()

    def ring(self, doorbells: Iterable[Doorbell]) -> None:
        """Queue the doorbells for the next message."""
        with self._changed:
            if self._closed:
                return
            idle = not self._waiting
            self._waiting.extend(doorbells)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="promptfleet-ringer", daemon=True
                )
                self._thread.start()
            elif idle or len(self._waiting) >= MAX_IDS:  # else the window is open: wake nobody
                self._changed.notify_all()

    def flush(self, timeout_s: float = PUBLISH_TIMEOUT_S) -> bool:
        """Wait until all that was queued is sent or dropped; False if that took too long."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)
            self._hurry = False
            return done

    def close(self, timeout_s: float = PUBLISH_TIMEOUT_S) -> None:
        """Flush and end the thread; later doorbells are left to the sweeper."""
        self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self.close)

    def pause(self) -> bool:
        """Let no message be under way while this process forks; false if one takes too long.

        A child that is forked in the middle of one would inherit locks that nobody releases.
        """
        return self._publishing.acquire(timeout=PUBLISH_TIMEOUT_S)

    def resume(self) -> None:
        """Go on in the process that has forked."""
        self._publishing.release()

    def start_afresh(self) -> None:
        """Begin again in a forked child: the parent's thread sends what was queued there."""
        self._start_empty()
        self._app = _reconnected(self._app)  # the parent's socket must not be shared

    def _run(self) -> None:
        busy = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                # Many calls at once are worth a longer wait: a message costs as much as 100 ids.
                window_s = self._window_s * (BUSY_WINDOWS if busy else 1)
                left_s = self._rung_at + window_s - time.monotonic()
                self._changed.wait_for(
                    lambda: self._hurry or self._closed or len(self._waiting) >= MAX_IDS,
                    max(0.0, left_s),
                )
                batch, self._waiting, self._busy = self._waiting, [], True
                self._rung_at = time.monotonic()
                full = BUSY_IDS * (BUSY_WINDOWS if busy else 1)
                busy = len(batch) >= min(full, MAX_IDS)
            try:
                with self._publishing:
                    self._deliver(self._app, batch)
            except Exception as error:  # noqa: BLE001  # the thread must outlive any doorbell
                facts = {"jobs": len(batch), "error": type(error).__name__}
                log.warning("doorbell_dropped", extra=facts)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


_ringers: weakref.WeakSet[Ringer] = weakref.WeakSet()
_paused: list[Ringer] = []


def _before_fork() -> None:
    _paused.extend(ringer for ringer in list(_ringers) if ringer.pause())


def _after_fork_in_parent() -> None:
    while _paused:
        _paused.pop().resume()


def _after_fork() -> None:
    _paused.clear()  # a child's ringers have locks of their own
    # kombu keeps its pools by URL for the whole process: a new app alone would find the parent's.
    pools.producers.clear()
    pools.connections.clear()
    for ringer in list(_ringers):
        ringer.start_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork,
    )


def _reconnected(app: Celery) -> Celery:
    """The same configuration with connections of its own."""
    tiers = [tier_of_queue(queue.name) for queue in app.conf.task_queues]
    return make_celery(app.conf.broker_url, [tier for tier in tiers if tier is not None])


def ids_of(message: Sequence[Any]) -> list[uuid.UUID]:
    """The job ids of a doorbell; whatever is no id is left out."""
    ids = []
    for item in message:
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            ids.append(uuid.UUID(item))
    return ids
