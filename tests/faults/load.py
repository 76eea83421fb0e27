"""Producers: web apps that submit, submit again, cancel and read, whatever breaks around them."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tests.faults.orders import Ask, Order
from tests.faults.recorder import Reading, Recorder

from promptfleet import AsyncClient, Client
from promptfleet_shared.errors import (
    JobNotFoundError,
    PromptFleetError,
    StoreRefusedError,
    StoreUnavailableError,
)
from promptfleet_shared.settings import Settings

SLOW_S = 60.0
"""A submission that takes longer was not answered "at bounded latency"."""


class Door(Protocol):
    """What producers need of a client."""

    def submit(self, asks: Sequence[Ask], receiver_url: str | None) -> list[uuid.UUID]:
        """Submit in one call; the ids, in order."""
        ...

    def cancel(self, job_id: uuid.UUID) -> bool:
        """Ask for a cancellation; false if the job was final."""
        ...

    def result(self, job_id: uuid.UUID) -> Reading | None:
        """What became of a job, if that is known."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class SyncDoor:
    """By `Client`."""

    def __init__(self, settings: Settings) -> None:
        self._client = Client(settings)

    def submit(self, asks: Sequence[Ask], receiver_url: str | None) -> list[uuid.UUID]:
        if len(asks) == 1:
            options: Any = asks[0].options(receiver_url)
            return [self._client.enqueue_prompt(asks[0].text, **options).id]
        many = _many(asks, receiver_url)
        return [job.id for job in self._client.enqueue_prompts(many)]

    def cancel(self, job_id: uuid.UUID) -> bool:
        return self._client.cancel(job_id)

    def result(self, job_id: uuid.UUID) -> Reading | None:
        result = self._client.get_result(job_id)
        if result is None:
            return None
        return Reading(job_id=job_id, state=result.state.value, text=result.text)

    def close(self) -> None:
        self._client.close()


class AsyncDoor:
    """By `AsyncClient`, from one thread."""

    def __init__(self, settings: Settings) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(settings)

    def submit(self, asks: Sequence[Ask], receiver_url: str | None) -> list[uuid.UUID]:
        if len(asks) == 1:
            options: Any = asks[0].options(receiver_url)
            one = self._runner.run(self._client.enqueue_prompt(asks[0].text, **options))
            return [one.id]
        jobs = self._runner.run(self._client.enqueue_prompts(_many(asks, receiver_url)))
        return [job.id for job in jobs]

    def cancel(self, job_id: uuid.UUID) -> bool:
        return self._runner.run(self._client.cancel(job_id))

    def result(self, job_id: uuid.UUID) -> Reading | None:
        result = self._runner.run(self._client.get_result(job_id))
        if result is None:
            return None
        return Reading(job_id=job_id, state=result.state.value, text=result.text)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


def _many(asks: Sequence[Ask], receiver_url: str | None) -> list[Any]:
    return [{"prompt": ask.text, **ask.options(receiver_url)} for ask in asks]


class Producer:
    """One thread that carries out a stream of orders."""

    def __init__(
        self,
        name: str,
        open_door: Callable[[], Door],
        stream: Iterator[Order],
        recorder: Recorder,
        *,
        receiver_url: str | None,
        over: threading.Event,
    ) -> None:
        """Submit nothing yet.

        Args:
            name: For people.
            open_door: Makes its client; in its thread.
            stream: What to submit.
            recorder: Told what came of it.
            receiver_url: Where callbacks go; None for no callbacks.
            over: Ends it.
        """
        self._open_door = open_door
        self._stream = stream
        self._recorder = recorder
        self._receiver_url = receiver_url
        self._over = over
        self._later: list[tuple[float, int, Callable[[Door], None]]] = []
        self._numbers = itertools.count()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        door = self._open_door()
        try:
            for order in self._stream:
                if self._over.wait(order.pause_s):
                    break
                self._guarded(functools.partial(self._submit, order=order), door)
                self._follow_up(door)
            self._follow_up(door, all_of_it=True)
        finally:
            door.close()

    def _follow_up(self, door: Door, *, all_of_it: bool = False) -> None:
        while self._later and (all_of_it or self._later[0][0] <= time.monotonic()):
            self._guarded(heapq.heappop(self._later)[2], door)

    def _guarded(self, deed: Callable[[Door], None], door: Door) -> None:
        """Whatever else a client raises is a mistake of the product."""
        try:
            deed(door)
        except Exception as error:  # noqa: BLE001 - it is recorded, and fails the run
            self._recorder.odd(f"a producer got {type(error).__name__}: {error}")

    def _in(self, delay_s: float, deed: Callable[[Door], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._numbers), deed))

    def _submit(self, door: Door, order: Order, *, again: bool = False) -> None:
        began = self._recorder.begin(order.asks)
        try:
            ids = door.submit(order.asks, self._receiver_url)
        except (StoreUnavailableError, StoreRefusedError) as error:
            self._recorder.refused(began, order.asks, error)
            ids = []
        else:
            self._recorder.accepted(began, order.asks, ids)
        if order.repeat_in_s is not None and not again:
            self._in(order.repeat_in_s, lambda door: self._submit(door, order, again=True))
        if order.cancel_in_s is not None and not again:
            self._in(order.cancel_in_s, lambda door: self._cancel(door, ids))
        if order.read_in_s is not None and not again:
            self._in(order.read_in_s, lambda door: self._read(door, ids))

    def _cancel(self, door: Door, ids: Sequence[uuid.UUID]) -> None:
        for job_id in ids:
            self._recorder.cancelling(job_id)
            asked_at = time.monotonic()
            try:
                effective = door.cancel(job_id)
            except JobNotFoundError:
                self._recorder.odd(f"cancel: accepted job {job_id} was not found")
            except PromptFleetError as error:
                self._recorder.said(error)
            else:
                self._recorder.cancelled(job_id, asked_at, effective=effective)

    def _read(self, door: Door, ids: Sequence[uuid.UUID]) -> None:
        for job_id in ids:
            try:
                reading = door.result(job_id)
            except JobNotFoundError:
                self._recorder.odd(f"get_result: accepted job {job_id} was not found")
            except PromptFleetError as error:
                self._recorder.said(error)
            else:
                if reading is not None:
                    self._recorder.read(reading)
