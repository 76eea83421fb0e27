"""Wait for jobs by polling: when to look, at which of them, and when to give up. No I/O."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Sequence

from promptfleet.backends import Lookup
from promptfleet.options import refuse
from promptfleet_shared.errors import (
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobNotFoundError,
    WaitTimeoutError,
)
from promptfleet_shared.jobs import JobState, Result

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.5
_GROWTH = 1.5
_LOOKS_A_CHECK = 64


class Watch:
    """Some jobs that are waited for.

    Pauses grow from 10 ms to 500 ms while nothing happens, and start afresh when a job ends.
    """

    def __init__(
        self,
        ids: Iterable[uuid.UUID],
        timeout: float | None,
        *,
        clock: Callable[[], float],
        patient: bool = False,
    ) -> None:
        """Start the time.

        Args:
            ids: The jobs; each is waited for once.
            timeout: Seconds, or None for as long as it takes.
            clock: Monotonic seconds.
            patient: True to wait for jobs that don't exist (yet) as well.

        Raises:
            InvalidRequestError: The timeout is no number from 0.
        """
        if timeout is not None and (
            not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout >= 0
        ):
            refuse("timeout", "seconds from 0, or None", timeout)
        self._pending = dict.fromkeys(ids)
        self._clock = clock
        self._patient = patient
        self._timeout = timeout
        self._end = math.inf if timeout is None else clock() + timeout
        self._pause = FIRST_PAUSE_S
        self._looks = 0
        self._looked_at = 0.0

    @property
    def pending(self) -> Sequence[uuid.UUID]:
        """The jobs to look up now."""
        self._looked_at = self._clock()
        return list(self._pending)

    @property
    def wants_states(self) -> bool:
        """True when a look should tell which jobs exist at all: at first, then seldom."""
        return not self._patient and self._looks % _LOOKS_A_CHECK == 0

    @property
    def left_s(self) -> float:
        """Seconds that are left; infinite without a timeout."""
        return max(0.0, self._end - self._clock())

    def feed(self, lookup: Lookup) -> list[Result]:
        """Take a look's findings and return the jobs that have ended since the last one.

        Raises:
            JobNotFoundError: A job does not exist.
        """
        ended = [id_ for id_ in self._pending if id_ in lookup.results]
        for id_ in ended:
            del self._pending[id_]
        if self.wants_states:
            for id_ in self._pending:
                if id_ not in lookup.states:
                    raise JobNotFoundError(job_id=id_)
        self._looks += 1
        self._pause = FIRST_PAUSE_S if ended else min(self._pause * _GROWTH, LONGEST_PAUSE_S)
        return [lookup.results[id_] for id_ in ended]

    def pause(self) -> float:
        """Seconds until the next look; at least what a look takes, at most what time is left.

        Raises:
            WaitTimeoutError: No time is left.
        """
        now = self._clock()
        if now >= self._end:
            raise WaitTimeoutError(job_ids=tuple(self._pending), timeout_s=self._timeout)
        return min(max(self._pause, now - self._looked_at), self._end - now)


def succeeded(result: Result) -> Result:
    """The result, if it is a success.

    Raises:
        JobFailedError: Or `JobCancelledError` or `JobExpiredError`, with the facts.
    """
    if result.state is JobState.SUCCEEDED:
        return result
    kind = _ERRORS.get(result.state, JobFailedError)
    message = None
    if result.error is not None:
        message = f"The job {result.state}: {result.error.code}: {result.error.message}"
    raise kind(
        message,
        job_id=result.job_id,
        state=result.state,
        error=result.error,
        attempts=result.attempts,
        calls=result.calls,
        result=result,
    )


_ERRORS = {JobState.CANCELLED: JobCancelledError, JobState.EXPIRED: JobExpiredError}
