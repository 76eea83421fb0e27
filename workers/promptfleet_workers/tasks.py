"""The Celery task behind a doorbell: thin, since all that matters is on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery, Task

from promptfleet_shared.queueing import RUN_PROMPTS, ids_of, priority_of_step
from promptfleet_shared.tiers import tier_of_queue


def register(app: Celery, run: Callable[[str, Sequence[Any], int], None]) -> None:
    """Add the task that runs the jobs of a doorbell.

    Args:
        app: The worker's app.
        run: Given a tier, job ids and the priority that they came with, returns once each of the
            jobs is finished, given back or found to be somebody else's: so that Flower's states
            and runtimes are true.
    """

    @app.task(name=RUN_PROMPTS, bind=True, ignore_result=True, acks_late=False)
    def run_prompts(self: Task, ids: Sequence[str]) -> None:
        delivery = self.request.delivery_info or {}
        tier = tier_of_queue(str(delivery.get("routing_key", ""))) or "default"
        priority = priority_of_step(int(delivery.get("priority") or 0))
        run(tier, ids_of(ids), priority)
