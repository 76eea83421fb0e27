"""The queues as the sweeper, the watchdog and the health page see them: by asking the broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from promptfleet_shared.errors import BrokerUnavailableError


class QueueWatch:
    """Asks how long the queues are, and remembers when the broker answered last."""

    def __init__(
        self,
        depths: Callable[[Sequence[str]], Mapping[str, int]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask nothing yet.

        Args:
            depths: The messages in each tier's queue; raises `BrokerUnavailableError`.
            clock: In seconds.
        """
        self._depths = depths
        self._clock = clock
        self.answered_at = 0.0

    def look(self, tiers: Sequence[str]) -> Mapping[str, int]:
        """The messages in each tier's queue; blocks.

        Raises:
            BrokerUnavailableError: The broker can't be reached.
        """
        depths = self._depths(tiers)
        self.answered_at = self._clock()
        return depths

    async def empty(self, tiers: Sequence[str]) -> list[str]:
        """Those of the tiers whose queue holds no message; none while nobody knows."""
        loop = asyncio.get_running_loop()
        try:
            depths = await loop.run_in_executor(None, self.look, tiers)
        except BrokerUnavailableError:
            return []  # nothing can be rung now, either
        return [tier for tier, depth in depths.items() if depth == 0]
