"""When an insert whose reply was lost is repeated, and what is known of it in the end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from promptfleet_shared.errors import StoreUnavailableError
from promptfleet_shared.store.failures import is_collision, may_be_done

PAUSES_S = (0.1, 1.0)
"""Before the first and the second repeat: enough for a connection that went stale or was reset,
and for a pooler that moves on; who waits for a server to start again is the caller."""
REPEAT_WITHIN_S = 15.0
"""Seconds after the first try during which a repeat may begin."""
UNKNOWN_OUTCOME = (
    "The database was lost in mid-submission, and whether the jobs were accepted is not known."
    " Submitting again with the same idempotency key is safe, and without one may double them."
)


class Resubmission:
    """One submission, and the tries that failed so far.

    The ids come from us and the insert can be repeated, so a try that succeeds settles what the
    ones before it left open.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Nothing was tried yet.

        Args:
            clock: Monotonic seconds.
            jitter: A random number between its two arguments.
        """
        self._clock = clock
        self._jitter = jitter
        self._repeat_until = clock() + REPEAT_WITHIN_S
        self._pauses = iter(PAUSES_S)
        self._unknown = False

    def pause_s(self, error: BaseException) -> float | None:
        """Seconds until the insert is repeated after this failure; None to give up."""
        self._unknown |= may_be_done(error)
        if not self._unknown and not is_collision(error):
            return None  # nothing is open: the caller is told at once
        if self._clock() > self._repeat_until:
            return None
        pause_s = next(self._pauses, None)
        return None if pause_s is None else pause_s * self._jitter(0.5, 1)

    def told(self, error: StoreUnavailableError) -> StoreUnavailableError:
        """The error for the caller, which says so where the outcome is not known."""
        if not self._unknown:
            return error
        return StoreUnavailableError(UNKNOWN_OUTCOME, **error.facts, unknown_outcome=True)
