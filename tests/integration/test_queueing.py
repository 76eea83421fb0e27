"""Doorbells on a real broker: its death, its return, and a fork between two rings."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import Ringer, make_celery, publish, queue_depths

DEADLINE_S = 10.0


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A broker that a test may kill."""
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


def bells(count: int, priority: int = 5) -> list[Doorbell]:
    return [Doorbell(job_id=uuid.uuid4(), tier="basic", priority=priority) for _ in range(count)]


def test_depths_count_messages_of_all_priorities(broker_url: str) -> None:
    app = make_celery(broker_url, ["basic"])
    for priority in range(10):
        publish(app, bells(1, priority))

    assert queue_depths(app, ["basic", "advanced"]) == {"basic": 10, "advanced": 0}
    app.close()


def test_asking_a_broker_that_died_is_our_own_error(own_valkey: EmbeddedValkey) -> None:
    app = make_celery(own_valkey.url, ["basic"])
    assert queue_depths(app, ["basic"]) == {"basic": 0}
    own_valkey.kill()

    with pytest.raises(BrokerUnavailableError):
        queue_depths(app, ["basic"])


def test_the_ringer_outlives_its_broker(own_valkey: EmbeddedValkey) -> None:
    app = make_celery(own_valkey.url, ["basic"])
    ringer = Ringer(app, window_s=0.001)
    ringer.ring(bells(1))
    assert ringer.flush(DEADLINE_S)
    own_valkey.kill()
    ringer.ring(bells(1))
    assert ringer.flush(DEADLINE_S)

    own_valkey.start()

    def rings() -> bool:
        ringer.ring(bells(1))
        return ringer.flush(DEADLINE_S) and queue_depths(app, ["basic"])["basic"] > 1

    eventually(rings, "doorbells arrive again")
    ringer.close()
    app.close()


FORKING = """
import os, sys, uuid, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import Ringer, make_celery
bells = lambda n: [Doorbell(job_id=uuid.uuid4(), tier="basic") for _ in range(n)]
ringer = Ringer(make_celery(sys.argv[1], ["basic"]), window_s=30)
ringer.ring(bells(1))
assert ringer.flush(10)          # connected
ringer.ring(bells(1))            # waits while we fork
pid = os.fork()
ringer.ring(bells(1))
assert ringer.flush(10)
if pid:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    ringer.ring(bells(1))        # rung at exit
else:
    ringer.ring(bells(1))
    ringer.close()
    os._exit(0)
"""


def test_a_fork_neither_loses_nor_doubles_doorbells(broker_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, broker_url],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    app = make_celery(broker_url, ["basic"])
    ids = [job_id for message in _messages(app) for job_id in message]
    # Before the fork 1; parent 1 + 1 and at its exit 1; child 1 and at its end 1.
    assert len(ids) == len(set(ids)) == 6
    app.close()


def _messages(app: Any) -> list[list[str]]:
    found = []
    with app.connection_or_acquire() as connection:
        channel = connection.default_channel
        channel.queue_declare(queue="prompts.basic", passive=False)
        while (message := channel.basic_get("prompts.basic", no_ack=True)) is not None:
            found.append(message.decode()[0][0])
    return found
