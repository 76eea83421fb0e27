"""Callbacks of real worker processes, which are killed and stopped in mid-delivery."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.processes import Process, provider, start_worker, worker_environment
from tests.receiver import Answer, Received, Receiver
from tests.rows import callback_rows
from tests.waiting import eventually

from promptfleet import Client, verify_callback
from promptfleet_shared.settings import Settings
from promptfleet_shared.signing import new_secret

FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["m"]
[models.m]
price_as = "free"
deployments = [{{ base_url = "{url}" }}]
"""
SECRET = new_secret()


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    """Starts workers that deliver callbacks to this machine."""
    started: list[Process] = []
    with provider(tmp_path) as simulated:
        config = tmp_path / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.base_url))
        env = worker_environment(
            database_url=settings.database_url.get_secret_value(),
            broker_url=settings.broker_url.get_secret_value(),
            config=config,
            callback_secrets=SECRET,
            callback_allow_loopback=True,
            callback_timeout_s=2,
            callback_poll_s=0.1,
        )

        def start(name: str) -> Process:
            log = tmp_path / f"{name}.log"
            started.append(start_worker(["basic"], name=name, env=env, log=log))
            return started[-1]

        yield start
        for process in started:
            process.kill()


class Site:
    """A client, a receiver that holds what it is told to, and the outbox."""

    def __init__(self, settings: Settings, database: sa.Engine, receiver: Receiver) -> None:
        self.client = Client(settings.model_copy(update={"callback_allow_loopback": True}))
        self.database = database
        self.receiver = receiver
        self.hold: threading.Event | None = None
        receiver.answer = lambda _: Answer(hold=self.hold)

    def submit(self) -> uuid.UUID:
        url = self.receiver.url + "/hook"
        return self.client.enqueue_prompt("Hello", tier="basic", cache=False, callback_url=url).id

    def of(self, job_id: uuid.UUID) -> list[Received]:
        return [r for r in self.receiver.received if r.event["data"]["id"] == str(job_id)]

    def row(self, job_id: uuid.UUID) -> sa.RowMapping | None:
        return next(iter(callback_rows(self.database, job_id)), None)

    def wait_until_delivered(self, job_id: uuid.UUID) -> sa.RowMapping:
        row = eventually(
            lambda: (found := self.row(job_id)) and found["delivered_at"] and found,
            "the callback is delivered",
        )
        assert isinstance(row, sa.RowMapping)
        return row


@pytest.fixture
def site(settings: Settings, database: sa.Engine) -> Iterator[Site]:
    with Receiver() as receiver:
        opened = Site(settings, database, receiver)
        yield opened
        opened.client.close()


def test_a_callback_survives_the_death_of_its_worker(
    site: Site, start: Callable[[str], Process]
) -> None:
    first = start("first")
    whole = site.submit()
    assert site.wait_until_delivered(whole)["attempts"] == 1
    site.hold = threading.Event()
    cut = site.submit()
    eventually(lambda: site.of(cut), "the delivery is under way")

    first.kill()
    site.hold.set()
    row = site.row(cut)
    assert row
    assert not row["delivered_at"]
    site.hold = None
    second = start("second")

    assert site.wait_until_delivered(cut)["attempts"] == 2
    once, again = site.of(cut)
    assert once.id == again.id == f"msg_{row['id'].hex}"
    assert once.body == again.body
    for received in site.receiver.received:
        event = verify_callback(received.body, received.headers, SECRET)
        assert event.type == "prompt.succeeded"
    assert len(site.of(whole)) == 1

    # SIGTERM lets what is in flight end.
    site.hold = threading.Event()
    last = site.submit()
    eventually(lambda: site.of(last), "the delivery is under way")
    second.terminate()
    eventually(lambda: "Warm shutdown" in second.output, "it is asked to stop")
    site.hold.set()
    assert second.wait() == 0
    assert site.wait_until_delivered(last)["attempts"] == 1
    assert len(site.of(last)) == 1
    assert "Traceback" not in second.output
    assert SECRET.removeprefix("whsec_") not in first.output + second.output
