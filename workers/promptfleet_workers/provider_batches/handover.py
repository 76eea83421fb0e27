"""Where a claimed job leaves the pipeline: it becomes a line of its provider's next batch."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from uuid_utils.compat import uuid7

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import CacheMode
from promptfleet_shared.policies.provider_batches import OPTION, choose
from promptfleet_shared.store import provider_batches as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.provider_batches import Destination, LineKey, NewLine, Room
from promptfleet_workers.budget_refusals import refuse
from promptfleet_workers.budgets import Bill, Budgets
from promptfleet_workers.endings import Endings
from promptfleet_workers.provider_batches.lines import custom_id
from promptfleet_workers.provider_batches.pricing import BatchPricer
from promptfleet_workers.providers.batch_protocol import BatchApi, Line
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work

PATIENCE_S = 30.0
"""How long to insist on a handover while the database is away."""
CHUNK = 500
"""Lines of one statement."""

_Given = tuple[Work, NewLine]
LookUp = Callable[[Sequence[Work]], Awaitable[Sequence[Work]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a job's line goes, and how long it is, in bytes."""

    destination: Destination
    size: int
    candidate: Candidate


class Handover:
    """Takes those of a batch's jobs that are to go through a batch API."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        apis: Mapping[str, BatchApi],
        endings: Endings,
        wake: Callable[[], None],
        budgets: Budgets | None = None,
    ) -> None:
        """Take nothing yet.

        Args:
            database: Where batches gather.
            fleet: Its options.
            apis: Those of the deployments that have one, by their names.
            endings: Told of the jobs that have left.
            wake: Called when a batch is full.
            budgets: Reserve what lines cost, where the fleet has any.
        """
        self._database = database
        self._budgets = budgets
        self._prices = BatchPricer()
        self._fleet = fleet
        self._options = fleet.batch_service
        self._apis = apis
        self._endings = endings
        self._wake = wake

    async def take(self, works: list[Work], known: LookUp) -> list[Work]:
        """Give jobs to their providers' batches; those that are left go the ordinary way.

        Args:
            works: Jobs with their routes and their requests as they are to be sent.
            known: Ends those whose answer is kept, and returns the others.
        """
        if not any(OPTION in work.job.policy for work in works):
            return works
        left: list[Work] = []
        going: dict[Work, _Place] = {}
        for work in works:
            place = self._place_of(work)
            if place is None:
                left.append(work)
            else:
                going[work] = place
        asking = await known(list(going))
        moved = await self._afford(asking, going) if self._budgets is not None else []
        groups: dict[Destination, list[_Given]] = {}
        for work in asking:
            if work not in moved and not self._endings.given_up(work):
                place = going[work]
                group = groups.setdefault(place.destination, [])
                group.append((work, self._line(work, place)))
        for destination, given in groups.items():
            await self._give(destination, given)
        return left + await self.take(moved, known) if moved else left

    async def _afford(self, works: Sequence[Work], going: Mapping[Work, _Place]) -> list[Work]:
        """Reserve what these lines will cost, in one round trip; those that get none leave.

        Returns:
            Those whose model's money is spent, and that are to go to another model.
        """
        assert self._budgets is not None  # noqa: S101 - for the type checkers
        bills = {
            work.job.id: Bill(candidates=(going[work].candidate,), prices=self._prices)
            for work in works
        }
        refusals = await self._budgets.reserve(works, bills)
        moved = []
        for work in works if refusals else ():
            refusal = refusals.get(work.job.id)
            if refusal is None or self._endings.given_up(work):
                continue
            if going[work].candidate in work.route:
                refuse(self._endings, work, refusal)
            else:
                moved.append(work)
        return moved

    def _place_of(self, work: Work) -> _Place | None:
        """Where the job's line goes; None for a job that goes the ordinary way."""
        job = work.job
        choice = choose(job.policy, work.remaining_s, self._options)
        if not choice.is_batch:
            if choice.why is not None:
                work.note(OPTION, way="standard", why=choice.why)
            return None
        is_triage = work.triage_of is not None
        if is_triage or job.cache.mode is CacheMode.ONLY or self._is_spent(work):
            return None  # of these, the ordinary way knows better what to do
        why = "stream" if job.stream else "conversation" if work.turn is not None else None
        for candidate in work.route if why is None else ():
            place = self._at(work, candidate)
            if place is not None:
                return place
        work.note(OPTION, way="standard", why=why or "no_batch_api")
        return None

    def _is_spent(self, work: Work) -> bool:
        job = work.job
        return job.calls > 0 and job.calls >= self._fleet.retry_options(job.tier).max_calls

    def _at(self, work: Work, candidate: Candidate) -> _Place | None:
        """The place at one deployment; None if that has no batch API for the job."""
        job = work.job
        api = self._apis.get(candidate.deployment.name)
        if api is None or job.kind not in api.kinds:
            return None
        name = custom_id(LineKey(job_id=job.id, fence=job.fence))
        line = Line(custom_id=name, request=work.request)
        try:
            size = len(api.written(line, job.kind, candidate.model_there))
        except ProviderError:
            return None
        if size > self._room(candidate.deployment.name).max_bytes:
            return None
        destination = Destination(
            tenant=job.tenant,
            deployment=candidate.deployment.name,
            kind=job.kind,
            model=candidate.model_there,
        )
        return _Place(destination=destination, size=size, candidate=candidate)

    def _room(self, deployment: str) -> Room:
        """How much one batch of the deployment may hold."""
        api, options = self._apis[deployment], self._options
        return Room(
            max_lines=min(api.max_lines, options.max_lines),
            max_bytes=min(api.max_bytes, options.max_bytes),
            gather_s=options.gather_s,
            spill_before_s=options.spill_before_s,
        )

    async def _give(self, destination: Destination, given: Sequence[_Given]) -> None:
        room = self._room(destination.deployment)
        for chunk in _chunks(given, room):
            lines = [line for _, line in chunk]
            gone = await self._attach(destination, lines, room)
            if self._budgets is not None:
                await self._budgets.hand_over(work for work, _ in chunk if work.job.id in gone)
            for work, _ in chunk:
                # One whose fence has moved on is somebody else's already.
                self._endings.leave(work)
            if len(gone) >= room.max_lines:
                self._wake()

    async def _attach(
        self, destination: Destination, lines: Sequence[NewLine], room: Room
    ) -> set[uuid.UUID]:
        new_id = uuid7()
        while True:
            gone = await self._database.insist(
                lambda connection: store.attach(
                    connection, destination, lines, new_id=new_id, room=room
                ),
                patience_s=PATIENCE_S,
            )
            if gone is not None:
                return gone
            await self._database.insist(
                lambda connection: store.seal(connection, destination), patience_s=PATIENCE_S
            )
            self._wake()

    def _line(self, work: Work, place: _Place) -> NewLine:
        # An answer of another model than the one it is named for is not kept.
        is_kept = work.key is not None and work.key_model == place.candidate.model
        return NewLine(
            job_id=work.job.id,
            fence=work.job.fence,
            bytes=place.size,
            request=None if work.request == work.job.request else work.request,
            cache_key=work.key if is_kept else None,
            queued_ms=work.job.queued_ms,
            decision=work.decision,
            reserved=None if self._budgets is None else self._budgets.record(work),
        )


def _chunks(given: Sequence[_Given], room: Room) -> Iterator[list[_Given]]:
    """So many lines at a time as a batch, and a statement, can hold."""
    chunk: list[_Given] = []
    size = 0
    for item in given:
        is_full = len(chunk) >= min(CHUNK, room.max_lines) or size + item[1].bytes > room.max_bytes
        if chunk and is_full:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item[1].bytes
    if chunk:
        yield chunk
