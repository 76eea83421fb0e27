"""Moves batches on from inside every API process: any number of them share the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import Any

from promptfleet.api.batch_work import BatchWork
from promptfleet.api.errors import ApiError
from promptfleet.api.services import Services
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.store.batches import Held, claim_batches, pause_batch

POLL_S = 1.0
"""Seconds between two looks for batches that somebody should look at."""
AT_ONCE = 4
"""Batches that one process works on."""
NO_ROOM_PAUSE_S = 5.0
BROKEN_PAUSE_S = 15.0

log = logging.getLogger(__name__)


class BatchRunner:
    """Claims batches that are due, and works on each in a task of its own.

    A process that is killed loses nothing: its leases lapse, and others go on from what was
    committed.
    """

    def __init__(self, services: Services, *, poll_s: float = POLL_S) -> None:
        """Claim nothing yet.

        Args:
            services: Of the process.
            poll_s: Seconds between two looks.
        """
        self._services = services
        self._bell = services.batch_bell
        self._name = uuid.uuid4().hex
        self._poll_s = poll_s
        self._running: asyncio.Task[None] | None = None
        self._moving: set[asyncio.Task[float | None]] = set()

    def start(self) -> None:
        """Begin to look; on the loop."""
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(_tell_of_death)

    async def close(self) -> None:
        """Break off, and give the batches back for others to go on with."""
        tasks: set[asyncio.Task[Any]] = set(self._moving)
        if self._running is not None:
            tasks.add(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            self._bell.clear()
            with contextlib.suppress(PromptFleetError):  # the next look may find the database back
                await self._claim()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._bell.wait()

    async def _claim(self) -> None:
        room = AT_ONCE - len(self._moving)
        if room <= 0:
            return
        lease_s = self._services.settings.lease_s
        claimed = await self._services.stores.admin(
            lambda c: claim_batches(c, self._name, lease_s=lease_s, limit=room)
        )
        for held in claimed:
            task = asyncio.create_task(self._move(held))
            self._moving.add(task)
            task.add_done_callback(self._moved)

    def _moved(self, task: asyncio.Task[float | None]) -> None:
        self._moving.discard(task)
        pause_s = None if task.cancelled() else task.result()
        if pause_s is not None and pause_s < self._poll_s:
            asyncio.get_running_loop().call_later(pause_s, self._bell.set)
        elif len(self._moving) == AT_ONCE - 1:
            self._bell.set()  # others may have waited for this place

    async def _move(self, held: Held) -> float | None:
        """See `BatchWork.run`."""
        pause_s: float | None = BROKEN_PAUSE_S
        try:
            pause_s = await BatchWork(self._services, held).run()
        except asyncio.CancelledError:
            pause_s = 0.0
            raise
        except ApiError:  # too many jobs wait
            pause_s = NO_ROOM_PAUSE_S
        except PromptFleetError as error:
            _warn(held, error)
        except Exception as error:  # noqa: BLE001  # one batch must not stop the others
            _warn(held, error)
        finally:
            if pause_s is not None:
                await self._pause(held, pause_s)
        return pause_s

    async def _pause(self, held: Held, pause_s: float) -> None:
        with contextlib.suppress(PromptFleetError):  # then its lease lapses
            await self._services.stores.run(held.tenant, lambda c: pause_batch(c, held, pause_s))


def _warn(held: Held, error: Exception) -> None:
    """Its kind alone: its text could hold a line."""
    extra = {"batch": str(held.id), "error": type(error).__name__}
    log.warning("batch_not_moved", extra=extra)


def _tell_of_death(running: asyncio.Task[None]) -> None:
    """Nobody waits for the task that claims: without this, its end would pass in silence."""
    if not running.cancelled() and (error := running.exception()):
        log.error("batches_stopped", extra={"error": type(error).__name__})
