"""Jobs that their batch has no answer for go back to their queues, to be called by themselves."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import Doorbell, JobError, Service
from promptfleet_shared.policies.provider_batches import OPTION
from promptfleet_shared.store import provider_batches as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.provider_batches import NO_ROW, Held, LineKey, Return
from promptfleet_workers.provider_batches.freeing import Freeing
from promptfleet_workers.providers.batch_protocol import NOT_DONE
from promptfleet_workers.retries import Verdict, classify

PAGE = 500
NO_ROOM_S = 300.0
"""Seconds until jobs of a batch that the account had no room for are gathered again."""
ALONE: Mapping[str, Any] = {OPTION: Service.STANDARD.value}
"""What such a job's policy says from then on."""


class Returner:
    """Queues jobs again, and rings for them."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        ring: Callable[[Iterable[Doorbell]], None],
        freeing: Freeing | None = None,
    ) -> None:
        """Return nothing yet; `ring` rings doorbells in the background."""
        self._database = database
        self._ring = ring
        self._freeing = freeing

    async def give_back(self, held: Held, returns: Sequence[Return]) -> None:
        """Queue them again where their fences still hold."""
        if not returns:
            return
        doorbells = await self._database.run(
            lambda connection: store.return_lines(connection, held, returns)
        )
        delays = {item.key.job_id: item.delay_s for item in returns}
        loop = asyncio.get_running_loop()
        for bell in doorbells:
            # Should this worker die before, the sweeper rings at the same time.
            loop.call_later(delays[bell.job_id], self._ring, [bell])
        if self._freeing is not None:
            await self._freeing(held)

    async def return_all(self, held: Held, error: ProviderError) -> None:
        """The provider took none of the lines: each is judged by itself, the ordinary way.

        Where it had no room only, they are gathered again, later.
        """
        facts = JobError(code=error.code, message=error.message, status=error.status)
        full = classify(error).otherwise is Verdict.DEFER
        after = NO_ROW
        while True:
            keys = await self._database.run(
                functools.partial(store.left_lines, held=held, after=after, limit=PAGE)
            )
            policy = None if full else ALONE
            delay_s = NO_ROOM_S if full else 0.0
            await self.give_back(
                held,
                [Return(key=key, error=facts, policy=policy, delay_s=delay_s) for key in keys],
            )
            if len(keys) < PAGE:
                break
            after = keys[-1].job_id
        await self._database.run(lambda connection: store.end(connection, held, error=facts))


def return_of(key: LineKey, error: ProviderError) -> Return:
    """How a job whose line failed goes back."""
    judgement = classify(error)
    undone = error.code in NOT_DONE or judgement.otherwise is Verdict.DEFER
    return Return(
        key=key,
        counts=error.code not in NOT_DONE and judgement.otherwise is Verdict.RETRY,
        calls=0 if undone else 1,
        unknown_calls=int(error.unknown_outcome and not undone),
        error=JobError(code=error.code, message=error.message, status=error.status),
        policy=ALONE,
    )
