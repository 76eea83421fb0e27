"""Keeps what producers were told, so that it can be held against what became of it."""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
import uuid
from collections.abc import Sequence

from tests.faults.orders import Ask

from promptfleet_shared.errors import PromptFleetError, StoreUnavailableError


class Reply(enum.StrEnum):
    """What a submission was answered."""

    ACCEPTED = "accepted"
    REFUSED = "refused"  # nothing was accepted, it said
    UNKNOWN = "unknown"  # it may have been accepted, it said


@dataclasses.dataclass(kw_only=True, slots=True)
class Entry:
    """A prompt that was submitted, once or more often under its key.

    Attributes:
        ids: All ids that were given for it; more than one is a mistake.
        replies: What each of the calls was answered.
    """

    ask: Ask
    ids: set[uuid.UUID] = dataclasses.field(default_factory=set)
    replies: list[Reply] = dataclasses.field(default_factory=list)

    @property
    def may_exist(self) -> bool:
        """False if every call said that nothing was accepted."""
        return any(reply is not Reply.REFUSED for reply in self.replies)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cancel:
    """A cancellation that was answered; instants are by `time.monotonic`.

    Attributes:
        effective: False if the job was final already, it said.
    """

    job_id: uuid.UUID
    asked_at: float
    answered_at: float
    effective: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A final state that a client was shown."""

    job_id: uuid.UUID
    state: str
    text: str | None


class Recorder:
    """What all producers were told; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.entries: dict[str, Entry] = {}
        self.cancels: list[Cancel] = []
        self.tried_cancels: set[uuid.UUID] = set()
        self.readings: list[Reading] = []
        self.oddities: list[str] = []
        self.messages: set[str] = set()
        self.slowest_s = 0.0

    def begin(self, asks: Sequence[Ask]) -> float:
        """A submission is about to be made; until its end it may have been accepted."""
        with self._lock:
            for ask in asks:
                self.entries.setdefault(ask.name, Entry(ask=ask)).replies.append(Reply.UNKNOWN)
        return time.monotonic()

    def accepted(self, began: float, asks: Sequence[Ask], ids: Sequence[uuid.UUID]) -> None:
        """The ids that a submission returned."""
        with self._lock:
            self._took(began)
            for ask, job_id in zip(asks, ids, strict=True):
                entry = self.entries[ask.name]
                entry.ids.add(job_id)
                entry.replies[-1] = Reply.ACCEPTED

    def refused(self, began: float, asks: Sequence[Ask], error: PromptFleetError) -> None:
        """A submission raised one of the errors that it may."""
        with self._lock:
            self._took(began)
            self.messages.add(str(error))
            if isinstance(error, StoreUnavailableError) and error.unknown_outcome:
                return
            for ask in asks:
                self.entries[ask.name].replies[-1] = Reply.REFUSED

    def cancelled(self, job_id: uuid.UUID, asked_at: float, *, effective: bool) -> None:
        """A cancellation was answered."""
        with self._lock:
            answered_at = time.monotonic()
            self.cancels.append(
                Cancel(
                    job_id=job_id, asked_at=asked_at, answered_at=answered_at, effective=effective
                )
            )

    def cancelling(self, job_id: uuid.UUID) -> None:
        """A cancellation is about to be asked for; it may be heard though nobody answers."""
        with self._lock:
            self.tried_cancels.add(job_id)

    def read(self, reading: Reading) -> None:
        """A client was shown a result."""
        with self._lock:
            self.readings.append(reading)

    def odd(self, what: str) -> None:
        """Something that must never happen to a producer."""
        with self._lock:
            self.oddities.append(what)

    def said(self, error: PromptFleetError) -> None:
        """An error's text, to be searched for what must not be in it."""
        with self._lock:
            self.messages.add(str(error))

    def replies(self) -> list[str]:
        """What all calls were answered, for each of their prompts."""
        return [reply.value for entry in self.entries.values() for reply in entry.replies]

    def _took(self, began: float) -> None:
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
