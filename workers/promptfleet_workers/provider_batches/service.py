"""Moves providers' batches on: any number of workers share them, one at a time holds each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Mapping
from typing import Protocol

from promptfleet_shared.errors import ProviderError, StoreRefusedError, StoreUnavailableError
from promptfleet_shared.policies.provider_batches import BatchServiceSection
from promptfleet_shared.store import provider_batches as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.provider_batches import Held
from promptfleet_workers.provider_batches.freeing import Freeing
from promptfleet_workers.sweeper import PRUNE_EVERY_S, oldest_id

log = logging.getLogger(__name__)

LEASE_S = 45.0
"""Seconds that a batch stays its worker's without a word from it."""
MAX_LOOK_S = 5.0
"""Seconds between two looks for batches that are due, at most."""
AT_ONCE = 4
"""Batches that a worker moves on at the same time."""
BACKOFF_S = 5.0
BACKOFF_MAX_S = 900.0


class Step(Protocol):
    """What is done about a batch in one of its states."""

    async def __call__(self, held: Held) -> None:
        """Move it on, and give it back.

        Raises:
            ProviderError: The provider refused, or nobody knows; to be tried again later.
        """
        ...


def backoff_s(tries: int) -> float:
    """Seconds until something that failed so often is tried again."""
    return float(min(BACKOFF_S * 2 ** min(tries, 16), BACKOFF_MAX_S))


class ProviderBatches:
    """Looks for batches that are due, and moves each on under a lease that it keeps."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        options: BatchServiceSection,
        deployments: tuple[str, ...],
        steps: Mapping[str, Step],
        owner: str,
        retention_s: float,
        lease_s: float = LEASE_S,
        freeing: Freeing | None = None,
    ) -> None:
        """Do nothing yet.

        Args:
            database: Used on the loop that `run` runs on.
            options: How often to look.
            deployments: Whose batches this worker can move on.
            steps: What is done, by a batch's state.
            owner: This worker's name, for the name that leases are in.
            retention_s: Seconds that ended batches are kept; 0 keeps them for ever.
            lease_s: Seconds that a batch stays ours without a word from here.
            freeing: Sees to what lines have reserved of budgets, where the fleet has any.
        """
        self._freeing = freeing
        self._database = database
        self._options = options
        self._deployments = deployments
        self._steps = steps
        self._owner = f"{owner}/{uuid.uuid4().hex[:12]}"
        self._retention_s = retention_s
        self._lease_s = lease_s
        self._interval_s = min(MAX_LOOK_S, options.gather_s / 2, options.poll_s / 2)
        self._woken = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pruned_at = time.monotonic()

    def wake(self) -> None:
        """Look now: a batch is full."""
        self._woken.set()

    async def run(self) -> None:
        """Look again and again, until cancelled; what is under way then is left to its lease."""
        try:
            while True:
                await self._pause()
                try:
                    await self.look()
                    await self._prune()
                except (StoreRefusedError, StoreUnavailableError) as error:
                    log.warning("provider_batches_failed", extra={"error": str(error)})
        finally:
            for task in self._tasks:
                task.cancel()

    async def look(self) -> None:
        """Take what is due, and begin to move it on."""
        room = AT_ONCE - len(self._tasks)
        if room <= 0:
            return
        due = await self._database.run(
            lambda connection: store.claim_due(
                connection,
                self._deployments,
                owner=self._owner,
                lease_s=self._lease_s,
                limit=room,
            )
        )
        for held in due:
            task = asyncio.create_task(self._see_to(held))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Wait until nothing is being moved on."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _pause(self) -> None:
        # Workers that started together must not look together.
        wait_s = self._interval_s * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, no secret
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), wait_s)
        self._woken.clear()

    async def _see_to(self, held: Held) -> None:
        step = asyncio.create_task(self._step(held))
        keeping = asyncio.create_task(self._keep(held, step))
        try:
            await asyncio.wait([step])
        finally:
            step.cancel()
            keeping.cancel()

    async def _step(self, held: Held) -> None:
        try:
            if self._freeing is not None:  # the sweeper may have ended or taken back some jobs
                await self._freeing(held)
            await self._steps[held.state](held)
        except ProviderError as error:
            facts = {"batch": str(held.id), "state": held.state, "code": error.code}
            log.warning("provider_batch_put_off", extra=facts)
            await self._put_off(held, error)
        except (StoreRefusedError, StoreUnavailableError) as error:
            # Its lease runs out, and whoever looks then goes on from what is written down.
            log.warning("provider_batch_left", extra={"batch": str(held.id), "error": str(error)})
        except Exception as error:  # noqa: BLE001 - a bug must not be repeated without a pause
            facts = {"batch": str(held.id), "state": held.state, "error": type(error).__name__}
            log.error("provider_batch_crashed", extra=facts)  # noqa: TRY400 - a traceback could show a prompt
            await self._put_off(held, None)

    async def _put_off(self, held: Held, error: ProviderError | None) -> None:
        wait_s = backoff_s(held.tries)
        if error is not None and error.retry_after_s is not None:
            wait_s = max(wait_s, error.retry_after_s)
        with contextlib.suppress(StoreRefusedError, StoreUnavailableError):
            await self._database.run(
                lambda connection: store.pause(connection, held, wait_s, failed=True)
            )

    async def _keep(self, held: Held, step: asyncio.Task[None]) -> None:
        """Extend the lease while the step runs; end the step once the lease is lost."""
        kept_at = time.monotonic()
        while not step.done():
            await asyncio.sleep(self._lease_s / 4)
            try:
                is_ours = await self._database.run(lambda connection: store.hold(connection, held))
            except (StoreRefusedError, StoreUnavailableError):
                is_ours = time.monotonic() - kept_at < self._lease_s * 3 / 4
            else:
                kept_at = time.monotonic()
            if not is_ours:
                step.cancel()
                return

    async def _prune(self) -> None:
        """Once a minute, forget batches that are older than the retention."""
        if not self._retention_s or time.monotonic() - self._pruned_at < PRUNE_EVERY_S:
            return
        self._pruned_at = time.monotonic()
        floor = oldest_id(time.time() - self._retention_s)
        await self._database.run(
            lambda connection: store.prune(connection, floor=floor, age_s=self._retention_s)
        )
