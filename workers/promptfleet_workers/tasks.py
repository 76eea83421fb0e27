"""The Celery task behind a doorbell: thin, since all that matters is on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Celery, Task

from promptfleet_shared.queueing import RUN_PROMPTS, ids_of, priority_of_step
from promptfleet_shared.tiers import tier_of_queue

RunDoorbell = Callable[[str, Sequence[Any], int, Mapping[str, object] | None], None]


def register(app: Celery, run: RunDoorbell) -> None:
    """Add the task that runs the jobs of a doorbell.

    Args:
        app: The worker's app.
        run: Given a tier, job ids, the priority that they came with and what they have waited
            for, returns once each of the jobs is finished, given back or found to be somebody
            else's: so that Flower's states and runtimes are true.
    """

    @app.task(name=RUN_PROMPTS, bind=True, ignore_result=True, acks_late=False)
    def run_prompts(
        self: Task, ids: Sequence[str], why: Mapping[str, object] | None = None
    ) -> None:
        delivery = self.request.delivery_info or {}
        tier = tier_of_queue(str(delivery.get("routing_key", ""))) or "default"
        priority = priority_of_step(int(delivery.get("priority") or 0))
        run(tier, ids_of(ids), priority, why)
