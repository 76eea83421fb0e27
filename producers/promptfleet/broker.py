"""What the command line asks the broker and, through it, the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.queueing import (
    asking_broker,
    make_celery,
    parked_jobs,
    queued_messages,
)
from promptfleet_shared.tiers import tier_of_queue

T = TypeVar("T")


class Broker:
    """A connection to the broker for a few questions; each raises `BrokerUnavailableError`."""

    def __init__(self, url: str, tiers: Iterable[str]) -> None:
        """Connect at the first question."""
        self._tiers = tuple(tiers)
        self._app = make_celery(url, self._tiers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(BrokerUnavailableError), asking_broker(self._app):
            self._app.close()

    def doorbells(self) -> Mapping[str, int]:
        """How many messages wait in each tier's queue."""
        return self._ask(lambda: queued_messages(self._app, self._tiers))

    def parked(self) -> Mapping[str, int]:
        """How many jobs of each tier wait for their tenant's turn, before its queue."""
        return self._ask(lambda: parked_jobs(self._app, self._tiers))

    def workers(self, *, timeout_s: float) -> Mapping[str, Sequence[str]]:
        """The workers that answer in time, and the tiers that each serves."""
        answers: Mapping[str, Sequence[Mapping[str, Any]]] = self._ask(
            lambda: self._app.control.inspect(timeout=timeout_s).active_queues() or {}
        )
        served = {}
        for worker, queues in answers.items():
            tiers = [tier_of_queue(queue["name"]) for queue in queues]
            served[worker] = [tier for tier in tiers if tier is not None]
        return served

    def ping(self, *, timeout_s: float, enough: int) -> set[str]:
        """The names before the @ of the workers that answer; waits for no more than `enough`."""
        replies = self._ask(lambda: self._app.control.ping(timeout=timeout_s, limit=enough) or [])
        return {name.partition("@")[0] for reply in replies for name in reply}

    def _ask(self, question: Callable[[], T]) -> T:
        with asking_broker(self._app):
            return question()
