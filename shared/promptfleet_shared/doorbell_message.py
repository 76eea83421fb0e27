"""A doorbell as kombu's Redis transport writes it, for a script within Redis to fill in.

What a script moves from the place where doorbells wait to a Celery queue never leaves Redis: no
message is lost between the two, and none takes a round trip of its own. The format is that of
Celery's task messages, protocol 2 (docs.celeryq.dev, "Message Protocol"), in the envelope of
kombu's virtual transports; a test compares it with what Celery itself sends.
"""

from __future__ import annotations

import json

from celery import Celery
from kombu.serialization import dumps

from promptfleet_shared.queueing import RUN_PROMPTS
from promptfleet_shared.tiers import queue_name

TASK = "@task@"
"""Stands where the message's own id belongs."""
STEP = "@step@"
"""Stands, with its quotes, where the number of the list belongs that the message goes to."""
ARGUMENTS = "@args@"
"""Stands, with its quotes, where the task's arguments belong: JSON within a string of JSON."""
SHOWN = "@shown@"
"""Stands where they belong as Flower shows them."""


def doorbell_template(app: Celery, tier: str) -> str:
    """The text of a message to a tier's queue.

    Args:
        app: From `make_celery`.
        tier: Whose queue.
    """
    task = app.amqp.as_task_v2(
        TASK, RUN_PROMPTS, args=(), root_id=TASK, argsrepr=SHOWN, ignore_result=True
    )
    kind, encoding, body = dumps([ARGUMENTS, *task.body[1:]], serializer="json")
    message = {
        "body": body,
        "content-encoding": encoding,
        "content-type": kind,
        "headers": task.headers,
        "properties": {
            **task.properties,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue_name(tier)},
            "priority": STEP,
            "body_encoding": encoding,  # the body is a string of JSON as it stands
            "delivery_tag": TASK,
        },
    }
    return json.dumps(message, separators=(",", ":"))
