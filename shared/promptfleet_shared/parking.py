"""Where doorbells wait their turn, so that no tenant's backlog stands before another's job.

A tier's Celery queue is kept short: about a message a worker. What it has no room for is parked in
Redis by tenant, and who takes from the queue (or rings when it is short) moves on what is next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from celery import Celery
from redis.exceptions import NoScriptError, ResponseError

from promptfleet_shared.doorbell_message import doorbell_template
from promptfleet_shared.jobs import DEFAULT_PRIORITY, MAX_PRIORITY, Doorbell
from promptfleet_shared.policies.fairness import FairnessSection
from promptfleet_shared.queueing import PARKING_KEY, asking_broker, publish, redis_step
from promptfleet_shared.tiers import queue_name

IDS_A_CALL = 1000
"""Redis does nothing else meanwhile, for about 2 ms."""
OFF = "off"
URGENT_STEP = redis_step(MAX_PRIORITY)
"""The list of messages for the interactive reserve."""
USUAL_STEP = redis_step(DEFAULT_PRIORITY)
"""That of all others: their order was made before."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A job in flight, and whose bounds it counts for."""

    job_id: uuid.UUID
    tenant: str
    concurrency_key: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one look at a tier's place led to.

    Attributes:
        known: The id of the configuration that the fleet shares; "" if there is none, "off" where
            fairness is off and nothing was parked.
        parked: Jobs that wait.
        eligible: Tenants with jobs that may run.
        blocked: Bounds that somebody waits for.
        sent: Messages that went to the queue.
    """

    known: str
    parked: int
    eligible: int
    blocked: int
    sent: int


class ParkingLot:
    """Parks doorbells and moves them on; holds no connection of its own, and may be shared."""

    def __init__(self) -> None:
        """Read the script; nothing is asked yet."""
        files = importlib.resources.files("promptfleet_shared")
        self._source = files.joinpath("parking.lua").read_text("utf-8")
        self._templates: dict[str, str] = {}
        self._sha = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()

    def deliver(self, app: Celery, doorbells: Iterable[Doorbell]) -> int:
        """Ring, or park what is not to be rung yet: what a `Ringer` does with its doorbells.

        Returns:
            How many messages were sent.

        Raises:
            BrokerUnavailableError: The broker can't be reached; the sweeper will ring.
        """
        straight: list[Doorbell] = []
        tiers: dict[str, list[Doorbell]] = defaultdict(list)
        for bell in doorbells:
            (straight if bell.returned else tiers[bell.tier]).append(bell)
        messages = 0
        for tier, bells in tiers.items():
            for start in range(0, len(bells), IDS_A_CALL):
                some = bells[start : start + IDS_A_CALL]
                turn = self.turn(app, tier, bells=some)
                if turn is None or turn.known == OFF:
                    straight += some
                else:
                    messages += turn.sent
        return messages + publish(app, straight)

    def turn(
        self,
        app: Celery,
        tier: str,
        *,
        bells: Sequence[Doorbell] = (),
        worker: str = "",
        let_go: Sequence[uuid.UUID] = (),
        held: Sequence[Held] = (),
        drain: bool = False,
    ) -> Turn | None:
        """Park doorbells of a tier, and send on what the queue has room for.

        Args:
            app: From `make_celery`.
            tier: Whose queue.
            bells: To be parked; what is parked already stays where it is.
            worker: Who takes from the queue; "" for somebody who only rings.
            let_go: Jobs that are no longer in flight.
            held: Jobs that are, which their worker speaks for.
            drain: Send all that is parked, in the order of turns: fairness is off.

        Returns:
            What it led to; None where the broker runs no scripts.

        Raises:
            BrokerUnavailableError: The broker can't be reached.
        """
        if tier not in self._templates:
            self._templates[tier] = doorbell_template(app, tier)
        groups = _grouped(bells)
        arguments = [queue_name(tier), worker, int(drain), len(held), len(let_go), len(groups)]
        arguments += [self._templates[tier], str(uuid.uuid4()), URGENT_STEP, USUAL_STEP]
        for job in held:
            arguments += [str(job.job_id), job.tenant, job.concurrency_key or ""]
        arguments += map(str, let_go)
        for (tenant, key, priority), ids in groups.items():
            arguments += [tenant, key, priority, len(ids), *ids]
        with _client(app) as client:
            reply = None if client is None else self._run(client, arguments)
        if reply is None:
            return None
        known, parked, eligible, blocked, sent = reply
        return Turn(
            known=known.decode(), parked=parked, eligible=eligible, blocked=blocked, sent=sent
        )

    def _run(self, client: Any, arguments: Sequence[object]) -> Any:
        try:
            try:
                return client.evalsha(self._sha, 1, PARKING_KEY, *arguments)
            except NoScriptError:
                return client.eval(self._source, 1, PARKING_KEY, *arguments)
        except ResponseError as error:  # our user may run no scripts: first come, first served
            log.warning("parking_refused", extra={"error": type(error).__name__})
            return None

    def configure(self, app: Celery, fields: Mapping[str, str]) -> None:
        """Tell the fleet how tenants share; the latest word counts.

        Raises:
            BrokerUnavailableError: The broker can't be reached.
        """
        with _client(app) as client:
            if client is None:
                return
            key = f"{PARKING_KEY}:config"
            since = client.hget(key, "since") or _milliseconds(client.time())
            pipeline = client.pipeline()
            pipeline.delete(key).hset(key, mapping={**fields, "since": since}).execute()

    def leave(self, app: Celery, tier: str, worker: str) -> None:
        """A worker takes from the tier's queue no more."""
        with _client(app) as client:
            if client is not None:
                client.zrem(f"{PARKING_KEY}:{queue_name(tier)}:workers", worker)

    def parked_among(self, app: Celery, bells: Sequence[Doorbell]) -> set[uuid.UUID]:
        """Those of the jobs that wait their turn, and need nobody to ring for them.

        Raises:
            BrokerUnavailableError: The broker can't be reached.
        """
        flows: dict[str, list[Doorbell]] = defaultdict(list)
        for bell in bells:
            flow = bell.tenant + (f"\0{bell.concurrency_key}" if bell.concurrency_key else "")
            flows[f"{PARKING_KEY}:{queue_name(bell.tier)}:b:q:{flow}"].append(bell)
        with _client(app) as client:
            if client is None or not flows:
                return set()
            pipeline = client.pipeline(transaction=False)
            for place, waiting in flows.items():
                pipeline.zmscore(place, [str(bell.job_id) for bell in waiting])
            scores = pipeline.execute()
        return {
            bell.job_id
            for waiting, found in zip(flows.values(), scores, strict=True)
            for bell, score in zip(waiting, found, strict=True)
            if score is not None
        }


def shared_fields(section: FairnessSection, chunks: Mapping[str, int]) -> dict[str, str]:
    """What the fleet has to know of fleet.toml, as the script reads it, under a new id.

    Args:
        section: What fleet.toml says.
        chunks: Jobs that one message of a tier may carry.
    """
    if not section.enabled:
        return {"id": OFF, "off": "1"}
    fields = {"id": uuid.uuid4().hex, "ageing_ms": str(round(section.ageing_s * 1000))}
    if section.interactive_reserve:
        fields["urgent_from"] = str(section.interactive_priority)
    if section.has_bounds:
        fields["bounded"] = "1"
    if section.max_in_flight is not None:
        fields["t"] = str(section.max_in_flight)
    if section.max_in_flight_per_key is not None:
        fields["k"] = str(section.max_in_flight_per_key)
    for tenant, share in section.tenants.items():
        fields[f"w:{tenant}"] = repr(share.weight)
        if share.max_in_flight is not None:
            fields[f"t:{tenant}"] = str(share.max_in_flight)
    fields |= {f"k:{key}": str(bound.max_in_flight) for key, bound in section.keys.items()}
    return fields | {f"chunk:{queue_name(tier)}": str(ids) for tier, ids in chunks.items()}


def _grouped(bells: Iterable[Doorbell]) -> dict[tuple[str, str, int], list[str]]:
    groups: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for bell in bells:
        group = (bell.tenant, bell.concurrency_key or "", bell.priority)
        groups[group].append(str(bell.job_id))
    return groups


@contextmanager
def _client(app: Celery) -> Iterator[Any]:
    with asking_broker(app), app.producer_or_acquire() as producer, _scripting(producer) as client:
        yield client


@contextmanager
def _scripting(producer: Any) -> Iterator[Any]:
    """The connection to Redis below a producer; None for any other broker."""
    acquire: Callable[[], Any] | None = getattr(producer.channel, "conn_or_acquire", None)
    if acquire is None:
        yield None
        return
    with acquire() as client:
        yield client


def _milliseconds(time: tuple[int, int]) -> int:
    return time[0] * 1000 + time[1] // 1000
