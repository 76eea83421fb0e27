"""Signed delivery of callbacks, from inside every worker, and never in its jobs' way."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from promptfleet_shared.errors import InvalidRequestError, StoreRefusedError, StoreUnavailableError
from promptfleet_shared.store import deliveries as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.deliveries import Attempt, Delivery, Endpoint, Verdict
from promptfleet_workers.callback_message import sign_message
from promptfleet_workers.callback_verdicts import judge_failure, judge_reply
from promptfleet_workers.egress import DeliveryError, Reply
from promptfleet_workers.telemetry import CallbacksDelivered, Emit

log = logging.getLogger(__name__)

FLUSH_AFTER_S: Final = 0.02
FLUSH_AT: Final = 100
TIDY_EVERY_S: Final = 60.0
LOOK_AT: Final = 200
"""Endpoints in one look."""
MAX_BARREN_LOOKS: Final = 10
"""Looks in a row that find nothing, after which the database gets a rest."""


class Poster(Protocol):
    """Sends requests to URLs that strangers gave; see `egress.GuardedClient`."""

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> Reply:
        """Post once; whatever is no answer is an error."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryOptions:
    """How callbacks are delivered.

    Attributes:
        secrets: What they are signed with; two while rotating. Without one, nothing is delivered.
        delays_s: Seconds before each attempt, counted from the one before.
        timeout_s: Seconds that one attempt may take.
        concurrency: Posts that this worker has in flight.
        endpoint_concurrency: Posts that the whole fleet has in flight to one endpoint.
        poll_s: Seconds between two looks for what is due.
        public_url: Where results are linked to; empty for no link.
    """

    secrets: tuple[str, ...] = dataclasses.field(repr=False)
    delays_s: tuple[float, ...]
    timeout_s: float
    concurrency: int
    endpoint_concurrency: int
    poll_s: float
    public_url: str

    @property
    def lease_s(self) -> float:
        """Seconds until another worker takes the deliveries of one that was lost."""
        return 2 * self.timeout_s + 1

    @property
    def give_up_s(self) -> float:
        """Seconds after which a callback that only waited for its endpoint is given up."""
        return 1.1 * sum(self.delays_s) + store.MAX_PAUSE_S


class Deliverer:
    """Claims callbacks that are due, posts them, and writes down what became of them."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        client: Poster,
        options: DeliveryOptions,
        emit: Emit,
        now: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Deliver nothing yet.

        Args:
            database: Of its own, since a claim may wait for those of other workers; used on the
                loop that `start` is called on.
            client: Who posts; of its own, too.
            options: See there.
            emit: Told what was delivered.
            now: Seconds since 1970.
            uniform: For jitter.
        """
        self._database = database
        self._client = client
        self._options = options
        self._emit = emit
        self._now = now
        self._uniform = uniform
        self._woken = asyncio.Event()
        self._stopping = False
        self._running: asyncio.Task[None] | None = None
        self._posts: dict[asyncio.Task[None], Delivery] = {}
        self._attempts: list[Attempt] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writes: set[asyncio.Task[None]] = set()
        self._after: Endpoint | None = None
        self._barren = 0
        self._tidy_at = time.monotonic()

    # -- its life ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to deliver; on the loop."""
        run = self._run() if self._options.secrets else self._watch_unsigned()
        self._running = asyncio.create_task(run)
        self._running.add_done_callback(_tell_of_death)

    def wake(self) -> None:
        """Look for what is due at once: something may be; on the loop."""
        self._woken.set()

    async def drain(self, grace_s: float) -> None:
        """Claim nothing more, let posts in flight end within `grace_s`, give back the others."""
        self._stopping = True
        self.wake()
        due = time.monotonic() + grace_s
        if self._running is not None:
            await asyncio.wait([self._running], timeout=grace_s)
            self._running.cancel()
        if self._posts:
            await asyncio.wait(set(self._posts), timeout=max(0.0, due - time.monotonic()))
        if late := list(self._posts):
            for post in late:
                post.cancel()
            await asyncio.wait(late)
        self._flush()
        while self._writes:
            await asyncio.wait(set(self._writes))

    async def aclose(self) -> None:
        """Close all connections; after `drain`."""
        await self._client.aclose()
        await self._database.close()

    # -- claiming ----------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            more = False
            try:
                more = await self._look()
                await self._tidy()
            except (StoreRefusedError, StoreUnavailableError) as error:
                log.warning("callbacks_not_claimed", extra={"error": str(error)})
                self._woken.clear()  # or a wake from before would be tried again without a pause
            if not more:
                await self._rest()

    async def _look(self) -> bool:
        """Start what is due and fits; false if there is nothing more to look for now."""
        self._woken.clear()
        room = self._options.concurrency - len(self._posts)
        if room <= 0:
            return False  # the end of a post wakes us
        per_endpoint = self._options.endpoint_concurrency
        look = functools.partial(
            store.due_endpoints, per_endpoint=per_endpoint, after=self._after, limit=LOOK_AT
        )
        found = await self._database.run(look)
        self._after = found.last
        self._barren = 0 if found.open else self._barren + 1
        if not found.open:
            return found.last is not None and self._barren % MAX_BARREN_LOOKS != 0
        random.shuffle(found.open)  # or the first ones would always come first
        claimed = await self._database.transact(
            lambda c: store.claim_deliveries(
                c,
                found.open,
                limit=room,
                per_endpoint=per_endpoint,
                lease_s=self._options.lease_s,
            )
        )
        for delivery in claimed:
            self._start(delivery)
        return bool(claimed)

    async def _rest(self) -> None:
        """Wait until somebody wakes us, or for the next look; not all workers at once."""
        if self._stopping:
            return
        pause_s = self._options.poll_s * self._uniform(0.75, 1.25)
        try:
            async with asyncio.timeout(pause_s):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _tidy(self) -> None:
        """Once a minute, give up what waits for endpoints that are beyond hope."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + TIDY_EVERY_S
        abandoned = limit = 1000
        while abandoned == limit:
            abandoned = await self._database.run(
                lambda c: store.abandon_hopeless(c, give_up_s=self._options.give_up_s, limit=limit)
            )
            if abandoned:
                self._emit(CallbacksDelivered(outcomes={Verdict.EXHAUSTED.value: abandoned}))
        await self._database.run(store.forget_endpoints)

    async def _watch_unsigned(self) -> None:
        """Without a secret, warn once when something waits for one."""
        while not self._stopping:
            self._woken.clear()
            try:
                found = await self._database.run(
                    functools.partial(store.due_endpoints, per_endpoint=1)
                )
            except (StoreRefusedError, StoreUnavailableError):
                found = None  # others tell
            if found and found.open:
                log.warning(
                    "callbacks_unsigned", extra={"cure": "set PROMPTFLEET_CALLBACK_SECRETS"}
                )
                return
            await self._rest()

    # -- posting -----------------------------------------------------------------------------

    def _start(self, delivery: Delivery) -> None:
        if self._stopping:
            self._record(_returned(delivery))
            return
        post = asyncio.create_task(self._deliver(delivery))
        self._posts[post] = delivery
        post.add_done_callback(self._posted)

    async def _deliver(self, delivery: Delivery) -> None:
        facts = delivery.facts
        if facts is None and delivery.payload is None:
            self._record(
                Attempt(
                    callback_id=delivery.id,
                    held=delivery.lease_until,
                    verdict=Verdict.EXHAUSTED,
                    error="result_gone: the result was deleted",
                )
            )
            return
        message = sign_message(
            delivery,
            facts,
            secrets=self._options.secrets,
            public_url=self._options.public_url,
            now=self._now(),
        )
        delays_s, jitter = self._options.delays_s, self._uniform(0.9, 1.1)
        try:
            reply = await self._client.post(
                delivery.url, message.headers, message.body, self._options.timeout_s
            )
        except (DeliveryError, InvalidRequestError) as error:
            attempt = judge_failure(delivery, error, delays_s=delays_s, jitter=jitter)
        else:
            attempt = judge_reply(delivery, reply, delays_s=delays_s, jitter=jitter)
        self._record(attempt)

    def _posted(self, post: asyncio.Task[None]) -> None:
        delivery = self._posts.pop(post)
        if post.cancelled():
            # The receiver may have it: it will know the next one by its id.
            self._record(_returned(delivery))
        elif error := post.exception():
            # A mistake of ours, which must not be made for ever. Only its kind: no URL, no secret.
            kind = type(error).__name__
            log.error("callback_broke", extra={"callback": str(delivery.id), "error": kind})
            broken = DeliveryError("internal_error", f"the worker could not post it ({kind})")
            delays_s = self._options.delays_s
            self._record(judge_failure(delivery, broken, delays_s=delays_s, jitter=1.0))

    # -- writing down ------------------------------------------------------------------------

    def _record(self, attempt: Attempt) -> None:
        self._attempts.append(attempt)
        if len(self._attempts) >= FLUSH_AT:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        attempts, self._attempts = self._attempts, []
        if attempts:
            write = asyncio.create_task(self._write(attempts))
            self._writes.add(write)
            write.add_done_callback(self._writes.discard)

    async def _write(self, attempts: Sequence[Attempt]) -> None:
        try:
            written = await self._database.insist(
                lambda c: store.record_attempts(c, attempts), patience_s=self._options.lease_s
            )
            outcomes = {verdict.value: count for verdict, count in written.items()}
            fenced = len(attempts) - sum(outcomes.values())
            self._emit(CallbacksDelivered(outcomes=outcomes, fenced=fenced))
            if Verdict.DISABLED in written:
                self._tidy_at = time.monotonic()
        except (StoreRefusedError, StoreUnavailableError) as error:
            # Their leases lapse, and their receivers hear it again.
            extra = {"attempts": len(attempts), "error": str(error)}
            log.error("callbacks_not_recorded", extra=extra)  # noqa: TRY400 - no traceback needed
        self.wake()  # there is room again


def _tell_of_death(running: asyncio.Task[None]) -> None:
    """Nobody waits for the task that claims: without this, its end would pass in silence."""
    if not running.cancelled() and (error := running.exception()):
        log.error("callbacks_stopped", extra={"error": type(error).__name__})


def _returned(delivery: Delivery) -> Attempt:
    return Attempt(callback_id=delivery.id, held=delivery.lease_until, verdict=Verdict.RETURNED)
