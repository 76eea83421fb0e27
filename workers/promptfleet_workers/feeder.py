"""Keeps the short queues of this worker's tiers filled, and says what it has in flight."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from celery import Celery

from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.jobs import ClaimedJob, Doorbell
from promptfleet_shared.parking import Held, ParkingLot, Turn, shared_fields
from promptfleet_shared.policies.fairness import FairnessSection

log = logging.getLogger(__name__)

TICK_S = 1.0
"""Between two looks at what nobody told of: holds that ended in silence, tiers of dead workers."""
PAUSE_S = 0.002
"""Between two looks, at least: messages that are taken together are replaced together."""
IDLE_PAUSE_S = 0.01
"""The same while nothing is parked: singles come and go without a look each."""
SPEAK_S = 5.0
"""Between two times that a worker says what it has in flight."""
MOST_GONE = 10_000
"""Jobs that are told of once Redis is back; the holds of others end by themselves."""


class Feed(Protocol):
    """What the rest of a worker tells the feeder; nothing of it waits or fails."""

    def looked_up(self, ids: int) -> None:
        """The database has said of so many ids whether their jobs are ours, or was not asked."""
        ...

    def claimed(self, jobs: Iterable[ClaimedJob]) -> None:
        """These jobs run here."""
        ...

    def gone(self, ids: Iterable[uuid.UUID]) -> None:
        """These jobs do not run here, any more or at all."""
        ...


class Feeder:
    """Moves parked doorbells on, from a thread of its own."""

    def __init__(
        self,
        app: Celery,
        lot: ParkingLot,
        section: FairnessSection,
        *,
        worker: str,
        chunks: Mapping[str, int],
    ) -> None:
        """Start nothing yet.

        Args:
            app: From `make_celery`.
            lot: Where doorbells are parked.
            section: What fleet.toml says; told to the fleet.
            worker: This worker's name, which no other one has.
            chunks: For each tier of this worker, the jobs that one message may carry.
        """
        self._app = app
        self._lot = lot
        self._section = section
        self._worker = worker
        self._chunks = dict(chunks)
        self._batch = max(chunks.values(), default=1)
        self._bounded = section.enabled and section.has_bounds
        self._tiers = tuple(chunks)
        self._turns: dict[str, Turn] = {}
        self._lock = threading.Lock()
        self._unclaimed = 0
        self._due: set[str] = set()
        self._gone: list[uuid.UUID] = []
        self._held: dict[uuid.UUID, Held] = {}
        self._known = ""
        self._looked_at = self._spoke_at = float("-inf")
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._retired = False
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="promptfleet-feeder", daemon=True)

    # -- what it is told ---------------------------------------------------------------------

    def taken(self, tier: str, ids: int) -> None:
        """A message was taken from the tier's queue, and so many of its ids are to be claimed.

        It is replaced once they are: one at hand and another in the queue would be one more batch
        that a job of another tenant waits for.
        """
        with self._lock:
            self._due.add(tier)
            self._unclaimed += ids
        if not ids:
            self._wake.set()

    def looked_up(self, ids: int) -> None:
        """So many ids are not to be claimed any more."""
        with self._lock:
            self._unclaimed -= ids
        self._wake.set()

    def claimed(self, jobs: Iterable[ClaimedJob]) -> None:
        """These jobs run here; those of them that a bound holds for are spoken for."""
        if not self._bounded:
            return
        with self._lock:
            for job in jobs:
                if self._section.is_bounded(job.tenant, job.concurrency_key):
                    self._held[job.id] = Held(
                        job_id=job.id, tenant=job.tenant, concurrency_key=job.concurrency_key
                    )

    def gone(self, ids: Iterable[uuid.UUID]) -> None:
        """These jobs do not run here, any more or at all."""
        if not self._bounded:
            return
        with self._lock:
            for job_id in ids:
                self._held.pop(job_id, None)
                self._gone.append(job_id)
            self._due.update(self._tiers)
        self._wake.set()

    # -- what it knows -----------------------------------------------------------------------

    def parked(self, tier: str) -> int:
        """Jobs of the tier that wait for their turn, as far as this worker knows."""
        turn = self._turns.get(tier)
        return turn.parked if turn is not None else 0

    @property
    def claims_in_time(self) -> bool:
        """False while so much was taken and not claimed that another tenant would wait for it."""
        return self._unclaimed < self._batch or not self._section.enabled

    @property
    def any_parked(self) -> bool:
        """True if jobs wait for their turn, as far as this worker knows."""
        return any(turn.parked for turn in list(self._turns.values()))

    def all_blocked(self) -> bool:
        """True if jobs wait here for nothing but a bound: then an idle worker is none's fault."""
        turns = list(self._turns.values())
        return any(turn.blocked for turn in turns) and not any(turn.eligible for turn in turns)

    def waiting(self, bells: Sequence[Doorbell]) -> set[uuid.UUID]:
        """Those of the jobs that wait their turn, none while nobody knows; blocks."""
        asked = [bell for bell in bells if self.parked(bell.tier)]
        if not asked:
            return set()
        try:
            return self._lot.parked_among(self._app, asked)
        except BrokerUnavailableError:
            return set()

    # -- its life ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, and look at once."""
        self._wake.set()
        self._thread.start()

    def retire(self) -> None:
        """This worker takes no messages any more: none are sent for it."""
        self._retired = True

    def stop(self) -> None:
        """End the thread; others feed the queues from now on."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            for tier in self._tiers:
                self._lot.turn(self._app, tier, let_go=self._take_gone())
                self._lot.leave(self._app, tier, self._worker)
        except BrokerUnavailableError:
            log.info("feeder_left_in_silence")

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                self.look()
                self._lost = False
            except BrokerUnavailableError as error:
                self._say_lost(error)
                self._stop.wait(TICK_S)
            self._stop.wait(PAUSE_S if self.any_parked else IDLE_PAUSE_S)

    def look(self) -> None:
        """Send on what the queues have room for, and say what is due to be said.

        Raises:
            BrokerUnavailableError: The broker can't be reached.
        """
        now = time.monotonic()
        if not self._known:
            self._configure()
        everywhere = now - self._looked_at >= TICK_S
        speak = now - self._spoke_at >= SPEAK_S
        with self._lock:
            due, self._due = self._due, set()
        if everywhere or speak:
            due, self._looked_at = set(self._tiers), now
        if speak:
            self._spoke_at = now
        for tier in due:
            self._look_at(tier, speak=speak)
            speak = False  # once, for all tiers

    def _look_at(self, tier: str, *, speak: bool) -> None:
        with self._lock:  # what ends from here on is told of after what is held now
            held = list(self._held.values()) if speak else []
            gone, self._gone = self._gone, []
        try:
            turn = self._lot.turn(
                self._app,
                tier,
                worker="" if self._retired else self._worker,
                let_go=gone,
                held=held,
                drain=not self._section.enabled,
            )
        except BrokerUnavailableError:
            with self._lock:
                self._gone = (gone + self._gone)[:MOST_GONE]
            raise
        if turn is None:
            return
        self._turns[tier] = turn
        if turn.known != self._known:
            self._hear(turn.known)

    def _hear(self, known: str) -> None:
        """Somebody else has told the fleet how tenants share, or Redis has lost all it knew."""
        if known:
            self._known = known
        else:
            self._configure()
        self._spoke_at = float("-inf")
        self._wake.set()

    def _configure(self) -> None:
        fields = shared_fields(self._section, self._chunks)
        self._lot.configure(self._app, fields)
        self._known = fields["id"]

    def _take_gone(self) -> list[uuid.UUID]:
        with self._lock:
            gone, self._gone = self._gone, []
        return gone

    def _say_lost(self, error: Exception) -> None:
        if not self._lost:
            log.warning("feeder_alone", extra={"error": type(error).__name__})
        self._lost = True
