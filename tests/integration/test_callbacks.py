"""Callbacks from the outbox to a real receiver, with a real Postgres between the workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
import sqlalchemy as sa
import standardwebhooks
from tests.integration.test_deliveries import endpoint_row, finished, pass_time
from tests.receiver import Answer, Received, Receiver
from tests.rows import callback_rows

from promptfleet import verify_callback
from promptfleet_shared.jobs import JobError, JobState
from promptfleet_shared.signing import new_secret
from promptfleet_shared.store import deliveries
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.deliveries import DueEndpoints, Endpoint, due_endpoints
from promptfleet_workers import callbacks
from promptfleet_workers.callbacks import Deliverer, DeliveryOptions
from promptfleet_workers.egress import GuardedClient, Reply
from promptfleet_workers.telemetry import CallbacksDelivered, Event

SECRET, OLD_SECRET = new_secret(), new_secret()
OPTIONS = DeliveryOptions(
    secrets=(SECRET,),
    delays_s=(0.0, 0.05, 0.05),
    timeout_s=5.0,
    concurrency=20,
    endpoint_concurrency=4,
    poll_s=0.05,
    public_url="https://api.example.com",
)


@dataclasses.dataclass(kw_only=True)
class Fleet:
    """Deliverers as workers have them, and what they told."""

    database: sa.Engine
    url: str
    events: list[CallbacksDelivered] = dataclasses.field(default_factory=list)

    @contextlib.asynccontextmanager
    async def worker(self, **changes: Any) -> AsyncIterator[Deliverer]:
        def hear(event: Event) -> None:
            assert isinstance(event, CallbacksDelivered)
            self.events.append(event)

        deliverer = Deliverer(
            database=AsyncDatabase(self.url, application_name="tests", pool_size=2),
            client=GuardedClient(allow_loopback=True),
            options=dataclasses.replace(OPTIONS, **changes),
            emit=hear,
        )
        deliverer.start()
        try:
            yield deliverer
        finally:
            await deliverer.drain(0)
            await deliverer.aclose()

    def outcomes(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for event in self.events:
            for name, count in event.outcomes.items():
                counts[name] = counts.get(name, 0) + count
        return counts

    def row(self, job_id: uuid.UUID) -> sa.RowMapping:
        (row,) = callback_rows(self.database, job_id)
        return row


@pytest.fixture
def fleet(database: sa.Engine, database_url: str) -> Fleet:
    return Fleet(database=database, url=database_url)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait for a condition while the loop goes on."""
    give_up = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < give_up, f"never happened: {what}"
        await asyncio.sleep(0.01)


async def look(deliverer: Deliverer) -> None:
    """Wait until the deliverer has looked at the outbox anew, from the beginning."""
    for _ in range(2):  # one may have been under way
        deliverer.wake()
        await until(functools.partial(_has_committed, deliverer, _last(deliverer)), "a look")


def _last(deliverer: Deliverer) -> float:
    return deliverer._database.last_commit


def _has_committed(deliverer: Deliverer, since: float) -> bool:
    return _last(deliverer) > since


class TestDelivery:
    async def test_a_receiver_can_trust_and_read_it(self, fleet: Fleet, receiver: Receiver) -> None:
        error = JobError(code="bad_request", message="No.", status=400)
        (job_id,) = finished(
            fleet.database, url=receiver.url + "/hook?a=b", state=JobState.FAILED, error=error
        )
        async with fleet.worker():
            await until(lambda: fleet.outcomes() == {"delivered": 1}, "it is delivered")

        (got,) = receiver.received
        assert got.path == "/hook?a=b"
        assert got.headers["content-type"] == "application/json"
        assert got.headers["user-agent"].startswith("promptfleet/")
        event = verify_callback(got.body, got.headers, SECRET)
        assert (event.type, event.job_id, event.state) == ("prompt.failed", job_id, "failed")
        assert event.data["error"]["code"] == "bad_request"
        assert event.data["result_url"] == f"https://api.example.com/v1/jobs/{job_id}"
        row = fleet.row(job_id)
        assert event.id == f"msg_{row['id'].hex}"
        assert row["delivered_at"]
        assert (row["attempts"], row["last_status"]) == (1, 204)
        assert b"An answer" not in got.body

    async def test_while_rotating_either_secret_verifies(
        self, fleet: Fleet, receiver: Receiver
    ) -> None:
        finished(fleet.database, url=receiver.url)
        async with fleet.worker(secrets=(SECRET, OLD_SECRET)):
            await until(lambda: receiver.received, "it is delivered")

        (got,) = receiver.received
        assert len(got.headers["webhook-signature"].split(" ")) == 2
        for secret in (SECRET, OLD_SECRET):
            standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(new_secret()).verify(got.body, dict(got.headers))

    async def test_a_wake_delivers_at_once(self, fleet: Fleet, receiver: Receiver) -> None:
        async with fleet.worker(poll_s=3600) as deliverer:
            await until(lambda: _last(deliverer), "its first look")
            finished(fleet.database, 11, url=receiver.url)
            deliverer.wake()  # once: the end of a post makes room for the next
            await until(lambda: len(receiver.received) == 11, "all are delivered")

    async def test_two_workers_share_the_work(self, fleet: Fleet, receiver: Receiver) -> None:
        hold = threading.Event()
        receiver.answer = lambda _: Answer(hold=hold)
        finished(fleet.database, 30, url=receiver.url)
        async with fleet.worker(), fleet.worker():
            await until(lambda: receiver.in_flight == 4, "the endpoint has its share")
            hold.set()
            await until(lambda: fleet.outcomes() == {"delivered": 30}, "all are delivered")
        assert len(set(receiver.ids)) == len(receiver.ids) == 30
        assert receiver.most_in_flight == 4

    async def test_a_slow_endpoint_holds_up_no_other(self, fleet: Fleet) -> None:
        hold = threading.Event()
        with Receiver(lambda _: Answer(hold=hold)) as slow, Receiver() as quick:
            finished(fleet.database, 30, url=slow.url)
            finished(fleet.database, 20, url=quick.url)
            async with fleet.worker():
                await until(lambda: len(quick.received) == 20, "the quick one has all")
                assert len(slow.received) <= 4
                hold.set()

    async def test_a_long_backlog_of_one_endpoint_holds_up_no_other(self, fleet: Fleet) -> None:
        order: list[str] = []

        def note(request: Received) -> Answer:
            order.append(request.path)
            return Answer()

        with Receiver(note) as receiver:
            finished(fleet.database, 20, url=receiver.url + "/a")
            finished(fleet.database, 20, url=receiver.url + "/b")
            async with fleet.worker(concurrency=1):
                await until(lambda: len(order) == 40, "all are delivered")
        assert "/b" in order[:20]
        assert "/a" in order[:20]

    async def test_many_endpoints_with_nothing_due_let_it_rest(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for n in range(5):
            finished(fleet.database, url=f"https://example.com/{n}")
        pass_time(fleet.database, -600)
        monkeypatch.setattr(callbacks, "LOOK_AT", 2)
        looks: list[Endpoint | None] = []
        rests = asyncio.Event()

        def count(*arguments: Any, **options: Any) -> DueEndpoints:
            looks.append(options["after"])
            return due_endpoints(*arguments, **options)

        async def rest(_: Deliverer) -> None:
            rests.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(deliveries, "due_endpoints", count)
        monkeypatch.setattr(Deliverer, "_rest", rest)
        async with fleet.worker():
            await until(rests.is_set, "it rests")
        assert [after and after.endpoint[-1] for after in looks] == [None, "1", "3"]


class TestFailures:
    async def test_each_attempt_has_the_same_id_until_it_is_exhausted(
        self, fleet: Fleet, receiver: Receiver
    ) -> None:
        receiver.answer = lambda _: Answer(status=500)
        (job_id,) = finished(fleet.database, url=receiver.url)
        async with fleet.worker():
            await until(lambda: fleet.outcomes().get("exhausted"), "it is exhausted")

        assert fleet.outcomes() == {"failed": 2, "exhausted": 1}
        assert len(receiver.ids) == 3
        assert len(set(receiver.ids)) == 1
        for got in receiver.received:
            verify_callback(got.body, got.headers, SECRET)
        row = fleet.row(job_id)
        assert row["exhausted_at"]
        assert not row["delivered_at"]
        assert row["last_error"] == "http_500: the receiver answered 500"

    async def test_it_gets_through_in_the_end(self, fleet: Fleet, receiver: Receiver) -> None:
        receiver.answer = lambda _: Answer(status=204 if len(receiver.received) > 1 else 503)
        (job_id,) = finished(fleet.database, url=receiver.url)
        async with fleet.worker():
            await until(lambda: fleet.row(job_id)["delivered_at"], "it is delivered")
        assert len(set(receiver.ids)) == 1
        assert fleet.row(job_id)["attempts"] == 2

    async def test_a_redirect_is_a_failure_and_not_followed(
        self, fleet: Fleet, receiver: Receiver
    ) -> None:
        with Receiver() as elsewhere:
            receiver.answer = lambda _: Answer(status=307, headers={"location": elsewhere.url})
            (job_id,) = finished(fleet.database, url=receiver.url)
            async with fleet.worker():
                await until(lambda: fleet.row(job_id)["exhausted_at"], "it is exhausted")
            assert not elsewhere.received
        assert (fleet.row(job_id)["last_error"] or "").startswith("redirect: ")

    async def test_nobody_listens(self, fleet: Fleet, receiver: Receiver) -> None:
        with Receiver() as gone:
            url = gone.url
        (job_id,) = finished(fleet.database, url=url)
        async with fleet.worker():
            await until(lambda: fleet.row(job_id)["exhausted_at"], "it is exhausted")
        row = fleet.row(job_id)
        assert row["last_error"].startswith("connect_error: ")
        assert row["last_status"] is None

    async def test_one_that_does_not_answer_in_time(self, fleet: Fleet, receiver: Receiver) -> None:
        hold = threading.Event()
        receiver.answer = lambda _: Answer(hold=hold)
        (job_id,) = finished(fleet.database, url=receiver.url)
        async with fleet.worker(timeout_s=0.1):
            await until(lambda: fleet.row(job_id)["exhausted_at"], "it is exhausted")
        hold.set()
        assert fleet.row(job_id)["last_error"].startswith("timeout: ")
        assert len(set(receiver.ids)) == 1

    async def test_an_address_that_is_not_public_is_not_called(self, fleet: Fleet) -> None:
        (job_id,) = finished(fleet.database, url="https://10.0.0.1/hook")
        async with fleet.worker():
            await until(lambda: fleet.row(job_id)["exhausted_at"], "it is exhausted")
        assert fleet.row(job_id)["last_error"].startswith("blocked_address: ")

    async def test_410_disables_the_endpoint(self, fleet: Fleet, receiver: Receiver) -> None:
        receiver.answer = lambda _: Answer(status=410)
        ids = finished(fleet.database, 9, url=receiver.url + "/gone")
        other = finished(fleet.database, 1, url=receiver.url + "/gone", tenant="acme")
        async with fleet.worker(endpoint_concurrency=1):
            await until(
                lambda: all(fleet.row(job_id)["exhausted_at"] for job_id in [*ids, *other]),
                "all are exhausted",
            )
            told = {"disabled": 2, "exhausted": 8}
            await until(lambda: fleet.outcomes() == told, "it is told")
        assert len(receiver.received) == 2  # one a tenant

    async def test_it_is_left_alone_for_as_long_as_it_asked(
        self, fleet: Fleet, receiver: Receiver
    ) -> None:
        receiver.answer = lambda _: Answer(status=429, headers={"retry-after": "100"})
        finished(fleet.database, 5, url=receiver.url)
        async with fleet.worker(endpoint_concurrency=1) as deliverer:
            await until(lambda: fleet.outcomes() == {"failed": 1}, "it was asked to wait")
            receiver.answer = lambda _: Answer()
            pass_time(fleet.database, 95)
            await look(deliverer)
            assert len(receiver.received) == 1
            pass_time(fleet.database, 6)
            await until(lambda: fleet.outcomes().get("delivered") == 5, "all are delivered")

    async def test_an_endpoint_that_fails_again_and_again_gets_a_probe_a_pause(
        self, fleet: Fleet, receiver: Receiver
    ) -> None:
        receiver.answer = lambda _: Answer(status=500)
        finished(fleet.database, 30, url=receiver.url)
        async with fleet.worker(delays_s=(0.0, 600.0)), fleet.worker(delays_s=(0.0, 600.0)):
            await until(lambda: endpoint_row_open(fleet.database), "its breaker is open")
            await until(lambda: receiver.in_flight == 0, "what was in flight has ended")
            calls = len(receiver.received)
            assert calls <= 5 + 4 - 1
            pass_time(fleet.database, 11)
            await until(lambda: len(receiver.received) == calls + 1, "a probe")
            receiver.answer = lambda _: Answer()
            await until(lambda: endpoint_row(fleet.database)["failures"] == 6, "it was written")
            pass_time(fleet.database, 700)
            await until(lambda: fleet.outcomes().get("delivered") == 30, "all are delivered")


def endpoint_row_open(database: sa.Engine) -> bool:
    with database.connect() as connection:
        count = connection.execute(
            sa.text("SELECT count(*) FROM callback_endpoints WHERE failures >= 5")
        )
        return bool(count.scalar_one())


class Broken:
    """A client with a mistake in it."""

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> Reply:
        raise KeyError("https://example.com/?token=hunter2")

    async def aclose(self) -> None:
        pass


async def test_a_mistake_of_ours_is_not_made_for_ever(
    fleet: Fleet, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    (job_id,) = finished(fleet.database)
    deliverer = Deliverer(
        database=AsyncDatabase(database_url, application_name="tests"),
        client=Broken(),
        options=OPTIONS,
        emit=lambda _: None,
    )
    deliverer.start()
    await until(lambda: fleet.row(job_id)["exhausted_at"], "it is exhausted")
    await deliverer.drain(0)
    await deliverer.aclose()
    row = fleet.row(job_id)
    assert (row["attempts"], row["last_error"]) == (
        3,
        "internal_error: the worker could not post it (KeyError)",
    )
    assert [record.message for record in caplog.records] == ["callback_broke"] * 3
    assert "hunter2" not in caplog.text


class TestStopping:
    async def test_what_is_in_flight_may_end(self, fleet: Fleet, receiver: Receiver) -> None:
        hold = threading.Event()
        receiver.answer = lambda _: Answer(hold=hold)
        ids = finished(fleet.database, 9, url=receiver.url)
        async with fleet.worker() as deliverer:
            await until(lambda: receiver.in_flight == 4, "some are in flight")
            draining = asyncio.create_task(deliverer.drain(20))
            await asyncio.sleep(0)
            hold.set()
            await draining
        assert fleet.outcomes() == {"delivered": 4}
        assert sum(fleet.row(job_id)["attempts"] for job_id in ids) == 4

    async def test_what_does_not_end_in_time_is_given_back(
        self, fleet: Fleet, receiver: Receiver
    ) -> None:
        hold = threading.Event()
        receiver.answer = lambda _: Answer(hold=hold)
        (job_id,) = finished(fleet.database, url=receiver.url)
        async with fleet.worker() as deliverer:
            await until(lambda: receiver.in_flight == 1, "it is in flight")
            await deliverer.drain(0.05)
        row = fleet.row(job_id)
        assert (row["lease_until"], row["attempts"]) == (None, 0)
        assert fleet.outcomes() == {"returned": 1}
        hold.set()
        async with fleet.worker():
            await until(lambda: fleet.row(job_id)["delivered_at"], "another worker delivers it")
        assert len(set(receiver.ids)) == 1
        assert len(receiver.ids) == 2

    async def test_what_was_claimed_too_late_is_given_back(
        self, fleet: Fleet, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (job_id,) = finished(fleet.database, url=receiver.url)
        claimed, go_on = asyncio.Event(), asyncio.Event()
        transact = AsyncDatabase.transact

        async def slowly(*arguments: Any) -> Any:
            result = await transact(*arguments)
            claimed.set()
            await go_on.wait()
            return result

        monkeypatch.setattr(AsyncDatabase, "transact", slowly)
        async with fleet.worker() as deliverer:
            await claimed.wait()
            draining = asyncio.create_task(deliverer.drain(20))
            await asyncio.sleep(0)
            go_on.set()
            await draining
        assert not receiver.received
        row = fleet.row(job_id)
        assert (row["lease_until"], row["attempts"]) == (None, 0)


class TestUnsigned:
    async def test_without_a_secret_nothing_leaves_and_one_warning_comes(
        self, fleet: Fleet, receiver: Receiver, caplog: pytest.LogCaptureFixture
    ) -> None:
        ids = finished(fleet.database, 3, url=receiver.url)
        with caplog.at_level(logging.WARNING):
            async with fleet.worker(secrets=()) as deliverer:
                running = deliverer._running
                assert running
                await until(running.done, "it gives up")
        assert [record.message for record in caplog.records] == ["callbacks_unsigned"]
        assert not receiver.received
        assert all(fleet.row(job_id)["attempts"] == 0 for job_id in ids)
        async with fleet.worker():
            await until(lambda: fleet.outcomes() == {"delivered": 3}, "they were kept")


def by_job(received: list[Received]) -> dict[str, list[Received]]:
    found: dict[str, list[Received]] = {}
    for one in received:
        found.setdefault(one.event["data"]["id"], []).append(one)
    return found


async def test_a_lost_worker_s_delivery_is_made_again_under_the_same_id(
    fleet: Fleet, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver has it, the sender died before it knew: at least once, and recognisable."""
    hold = threading.Event()
    receiver.answer = lambda _: Answer(hold=hold)
    (job_id,) = finished(fleet.database, url=receiver.url)
    async with fleet.worker() as lost:
        await until(lambda: receiver.in_flight == 1, "it is in flight")
        assert lost._running
        lost._running.cancel()  # it claims nothing more
        monkeypatch.setattr(lost, "_write", _forget)
        hold.set()
        await until(lambda: receiver.in_flight == 0, "it was received")
        pass_time(fleet.database, 12)
        receiver.answer = lambda _: Answer()
        async with fleet.worker():
            await until(lambda: fleet.row(job_id)["delivered_at"], "it is delivered again")
    (attempts,) = by_job(receiver.received).values()
    assert len(attempts) >= 2
    assert len({one.id for one in attempts}) == 1
    assert len({one.body for one in attempts}) == 1


async def _forget(_: object) -> None:
    """A worker that dies before it has written anything."""
