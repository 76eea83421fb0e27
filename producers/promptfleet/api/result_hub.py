"""Waits for the ends of any number of jobs: `ResultHub.wait`.

Workers announce what they have committed; what was announced is looked up, all of a tenant's in one
statement. Notices are a convenience: whatever they leave out is found by a look at all that is
waited for, now and then while they come, and often while they don't.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.finish_notices import CHANNEL, decode_notice
from promptfleet_shared.jobs import Result
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.store.database import Statement
from promptfleet_shared.store.results import read_results

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks at all that a tenant waits for, while notices come."""
FIRST_PAUSE_S = 0.01
"""The same while none come, at first: it grows, and starts afresh with each new wait."""
GROWTH = 1.5
POLLS_PER_S = 200
"""Looks a second at most, over all tenants, beyond those that notices ask for."""
_LOOK_SHARE = 0.2
"""Of its time that a tenant's looks may take while no notices come."""
LOOKS_AT_ONCE = 4
IDS_A_LOOK = 1_000
RETRY_S = 0.5
REMEMBER_S = 2.0
"""Seconds that an announced id is remembered, at least: a wait may begin after its job's end."""
MAX_REMEMBERED = 100_000
_HEALTH_S = 10.0
_CONNECT_S = 5.0


class Store(Protocol):
    """Where results are; `Stores` is the real one."""

    async def run(
        self, tenant: str, statement: Statement[dict[uuid.UUID, Result]], /
    ) -> dict[uuid.UUID, Result]:
        """Run a tenant's statement."""
        ...


class _Wait:
    """One call of `ResultHub.wait`."""

    def __init__(self, ids: Iterable[uuid.UUID]) -> None:
        self.missing = dict.fromkeys(ids)
        self.found: dict[uuid.UUID, Result] = {}
        self.over = asyncio.Event()

    def take(self, result: Result) -> None:
        if result.job_id in self.missing:
            del self.missing[result.job_id]
            self.found[result.job_id] = result
            if not self.missing:
                self.over.set()


class ResultHub:
    """Waits for jobs' ends; one for each process, on its event loop.

    Nobody holds a connection of the database while waiting, and no job is asked for alone.
    """

    def __init__(
        self, store: Store, url: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Wait for nothing and connect to nothing yet.

        Args:
            store: Where results are.
            url: The server of the workers' notices, as in redis://user:password@host:6379/0.
            clock: Monotonic seconds.
        """
        self._store = store
        self._clock = clock
        self._notices = _Notices(url, on_ids=self._announced, on_change=self._notices_changed)
        self._desks: dict[str, _Desk] = {}
        self._by_id: dict[bytes, set[_Desk]] = {}
        self._looks = asyncio.Semaphore(LOOKS_AT_ONCE)
        # Two generations, so that forgetting is dropping a set.
        self._fresh: set[bytes] = set()
        self._older: set[bytes] = set()
        self._turned_at = clock()

    async def wait(
        self, tenant: str, ids: Sequence[uuid.UUID], timeout_s: float, *, is_new: bool = False
    ) -> dict[uuid.UUID, Result]:
        """Wait for all of the jobs.

        Args:
            tenant: Who waits; another tenant's jobs never end for it.
            ids: The jobs; what does not exist is waited for as well.
            timeout_s: Seconds.
            is_new: True for jobs that were accepted just now: no look is spent on whether they have
                ended already.

        Returns:
            The results of those that have ended, when all have, or when the time is up.

        Raises:
            StoreUnavailableError: The time is up, and the database can't be reached for a last
                look.
        """
        wait = _Wait(ids)
        self._notices.start()
        desk = self._desk(tenant)
        self._enter(desk, wait, is_new=is_new)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await wait.over.wait()
        finally:
            self._leave(desk, wait)
        if wait.missing:
            wait.found.update(await desk.look(list(wait.missing)))
        return wait.found

    @property
    def waited_for(self) -> int:
        """How many jobs are waited for now."""
        return len(self._by_id)

    async def aclose(self) -> None:
        """End what runs in the background; who still waits gets what has ended by its time."""
        for desk in self._desks.values():
            await desk.close()
        await self._notices.aclose()

    def _desk(self, tenant: str) -> _Desk:
        desk = self._desks.get(tenant)
        if desk is None:
            desk = self._desks[tenant] = _Desk(
                tenant, self._store, self._looks, pause_s=self._pause_s, clock=self._clock
            )
        return desk

    def _enter(self, desk: _Desk, wait: _Wait, *, is_new: bool) -> None:
        announced = []
        for job_id in wait.missing:
            key = job_id.bytes
            self._by_id.setdefault(key, set()).add(desk)
            if not is_new or key in self._fresh or key in self._older:
                announced.append(job_id)
        desk.enter(wait, announced)

    def _leave(self, desk: _Desk, wait: _Wait) -> None:
        desk.leave(wait)
        for job_id in [*wait.missing, *wait.found]:
            if job_id in desk.awaited:
                continue
            desks = self._by_id.get(job_id.bytes)
            if desks is not None:
                desks.discard(desk)
                if not desks:
                    del self._by_id[job_id.bytes]
        if not desk.awaited:
            self._desks.pop(desk.tenant, None)
            desk.stop()

    def _announced(self, keys: list[bytes]) -> None:
        now = self._clock()
        if now - self._turned_at > REMEMBER_S or len(self._fresh) > MAX_REMEMBERED:
            self._older, self._fresh, self._turned_at = self._fresh, set(), now
        self._fresh.update(keys)
        for key in keys:
            for desk in self._by_id.get(key, ()):
                desk.announce(uuid.UUID(bytes=key))

    def _notices_changed(self) -> None:
        """Notices come again, or none come any more: look at everything."""
        for desk in self._desks.values():
            desk.hurry()

    def _pause_s(self, calm_looks: int, look_s: float) -> float:
        """Seconds until a desk looks at all of its jobs again.

        Args:
            calm_looks: How many looks have found nothing, since something happened.
            look_s: What the last one took.
        """
        pause_s = POLL_S
        if not self._notices.are_heard:
            pause_s = min(POLL_S, FIRST_PAUSE_S * GROWTH ** min(calm_looks, 20))
            pause_s = max(pause_s, look_s / _LOOK_SHARE)
        return max(pause_s, len(self._desks) / POLLS_PER_S)


class _Desk:
    """What one tenant waits for: looked up in one statement at a time."""

    def __init__(
        self,
        tenant: str,
        store: Store,
        looks: asyncio.Semaphore,
        *,
        pause_s: Callable[[int, float], float],
        clock: Callable[[], float],
    ) -> None:
        self.tenant = tenant
        self.awaited: dict[uuid.UUID, set[_Wait]] = {}
        self._store = store
        self._looks = looks
        self._pause_s = pause_s
        self._clock = clock
        self._announced: dict[uuid.UUID, None] = {}
        self._stirred = asyncio.Event()
        self._calm_looks = 0
        self._look_s = 0.0
        self._looked_at = clock()
        self._is_away = False
        self._task: asyncio.Task[None] | None = None

    def enter(self, wait: _Wait, announced: Iterable[uuid.UUID]) -> None:
        """Wait for these, and look at some of them at once."""
        for job_id in wait.missing:
            self.awaited.setdefault(job_id, set()).add(wait)
        self._announced.update(dict.fromkeys(announced))
        self._calm_looks = 0
        self._stirred.set()
        if self._task is None:
            self._looked_at = self._clock()
            self._task = asyncio.create_task(self._run())

    def leave(self, wait: _Wait) -> None:
        """Wait for these no longer, unless others do."""
        for job_id in [*wait.missing, *wait.found]:
            waits = self.awaited.get(job_id)
            if waits is not None:
                waits.discard(wait)
                if not waits:
                    del self.awaited[job_id]
                    self._announced.pop(job_id, None)

    def announce(self, job_id: uuid.UUID) -> None:
        """The job has ended, as is said."""
        self._announced[job_id] = None
        self._stirred.set()

    def hurry(self) -> None:
        """Look at everything soon."""
        self._calm_looks = 0
        self._announced.update(dict.fromkeys(self.awaited))
        self._stirred.set()

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def close(self) -> None:
        """Look no more, and wait until that is so."""
        task = self._task
        self.stop()
        if task is not None:
            await asyncio.wait({task})

    async def look(self, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Result]:
        """The results of those that have ended. Raises as `Stores.run`."""
        found: dict[uuid.UUID, Result] = {}
        for at in range(0, len(ids), IDS_A_LOOK):
            look = _reading(ids[at : at + IDS_A_LOOK], self.tenant)
            async with self._looks:
                found |= await self._store.run(self.tenant, look)
        return found

    async def _run(self) -> None:
        while True:
            ids = await self._due()
            began = self._clock()
            try:
                found = await self.look(ids)
            except PromptFleetError as error:
                self._say_away(error)
                found = {}
                await asyncio.sleep(RETRY_S)
                self._announced.update((id_, None) for id_ in ids if id_ in self.awaited)
            else:
                self._is_away = False
            self._look_s = self._clock() - began
            self._calm_looks = 0 if found else self._calm_looks + 1
            for job_id, result in found.items():
                for wait in tuple(self.awaited.get(job_id, ())):
                    wait.take(result)

    async def _due(self) -> list[uuid.UUID]:
        """Wait until something was announced, or it is time to look at everything."""
        while True:
            pause_s = self._pause_s(self._calm_looks, self._look_s)
            left_s = self._looked_at + pause_s - self._clock()
            if left_s <= 0:
                self._looked_at = self._clock()
                self._announced.clear()
                return list(self.awaited)
            if self._announced:
                ids = list(self._announced)
                self._announced.clear()
                return ids
            self._stirred.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._stirred.wait()

    def _say_away(self, error: PromptFleetError) -> None:
        if not self._is_away:
            log.warning("results_unavailable", extra={"error": error.code})
        self._is_away = True


def _reading(ids: Sequence[uuid.UUID], tenant: str) -> Statement[dict[uuid.UUID, Result]]:
    return lambda connection: read_results(connection, ids, tenant=tenant)


class _Notices:
    """Listens to what workers announce, on one connection, and connects again for ever.

    Attributes:
        are_heard: True while the subscription stands.
    """

    def __init__(
        self,
        url: str,
        *,
        on_ids: Callable[[list[bytes]], object],
        on_change: Callable[[], object],
    ) -> None:
        self.are_heard = False
        self._on_ids = on_ids
        self._on_change = on_change
        self._is_away = False
        self._task: asyncio.Task[None] | None = None
        self._redis: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=_CONNECT_S,
            socket_keepalive=True,
            health_check_interval=_HEALTH_S,
        )

    def start(self) -> None:
        """Listen from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        """Listen no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._redis.aclose()

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except REDIS_FAILURES as error:
                if not self._is_away:
                    log.warning("notices_unavailable", extra={"error": type(error).__name__})
                self._is_away = True
            finally:
                self.are_heard = False
            self._on_change()
            await asyncio.sleep(RETRY_S)

    async def _listen(self) -> None:
        async with self._redis.pubsub() as subscription:
            await subscription.subscribe(CHANNEL)
            while True:
                message: Any = await subscription.get_message(timeout=_HEALTH_S)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self.are_heard, self._is_away = True, False
                    self._on_change()
                elif message["type"] == "message":
                    self._on_ids(decode_notice(message["data"]))
