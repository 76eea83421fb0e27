"""Doorbells: how they share messages, and how they are rung in the background."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from tests.waiting import eventually

from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import (
    MAX_IDS,
    PRIORITY_STEPS,
    RUN_PROMPTS,
    Ringer,
    ids_of,
    make_celery,
    priority_of_step,
    publish,
    redis_step,
)

DEADLINE_S = 10.0


class FakeApp:
    """Records the messages that would be sent; may fail, and may be held back."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.fail_with: list[Exception] = []
        self.may_send = threading.Event()
        self.may_send.set()
        self.sending = threading.Event()
        self.celery: Any = self  # for who asks for a Celery app

    @contextlib.contextmanager
    def producer_or_acquire(self) -> Iterator[str]:
        yield "producer"

    def send_task(self, name: str, args: list[Any], **options: Any) -> None:
        self.sending.set()
        assert self.may_send.wait(DEADLINE_S)
        if self.fail_with:
            raise self.fail_with.pop(0)
        self.messages.append({"name": name, "ids": args[0], **options})

    @property
    def ids(self) -> list[str]:
        return [job_id for message in self.messages for job_id in message["ids"]]


def bells(count: int, tier: str = "basic", priority: int = 5) -> list[Doorbell]:
    return [Doorbell(job_id=uuid.uuid4(), tier=tier, priority=priority) for _ in range(count)]


class TestPublish:
    def test_a_message_carries_a_hundred_ids_in_order(self) -> None:
        app, rung = FakeApp(), bells(250)

        assert publish(app.celery, rung) == 3

        assert [len(message["ids"]) for message in app.messages] == [MAX_IDS, MAX_IDS, 50]
        assert app.ids == [str(bell.job_id) for bell in rung]

    def test_tiers_and_priorities_travel_apart(self) -> None:
        app = FakeApp()
        rung = [*bells(2, "basic", 9), *bells(3, "basic", 0), *bells(4, "advanced", 9)]

        assert publish(app.celery, rung) == 3

        sent = {(m["queue"], m["priority"]): len(m["ids"]) for m in app.messages}
        assert sent == {
            ("prompts.basic", 1): 2,
            ("prompts.basic", 7): 3,
            ("prompts.advanced", 1): 4,
        }

    def test_neighbouring_priorities_share_a_message(self) -> None:
        app = FakeApp()

        publish(
            app.celery, [bell for priority in range(10) for bell in bells(1, priority=priority)]
        )

        sent = {message["priority"]: len(message["ids"]) for message in app.messages}
        assert sent == {1: 3, 3: 3, 5: 3, 7: 1}

    def test_a_more_urgent_job_is_never_behind_a_less_urgent_one(self) -> None:
        app = FakeApp()
        steps = []
        for priority in range(10):
            publish(app.celery, bells(1, priority=priority))
            steps.append(app.messages[-1]["priority"])

        assert steps == sorted(steps, reverse=True)

    def test_what_came_back_goes_before_its_equals_and_no_others(self) -> None:
        for priority in range(10):
            returned, usual = redis_step(priority, returned=True), redis_step(priority)
            assert {returned, usual} <= set(PRIORITY_STEPS)
            assert returned == usual - 1
            assert redis_step(priority_of_step(usual)) == usual
            assert redis_step(priority_of_step(returned), returned=True) == returned

    def test_nothing_to_ring_sends_nothing(self) -> None:
        app = FakeApp()

        assert publish(app.celery, []) == 0
        assert app.messages == []

    def test_a_message_names_the_task_and_does_not_wait(self) -> None:
        app = FakeApp()

        publish(app.celery, bells(1))

        (message,) = app.messages
        assert message["name"] == RUN_PROMPTS
        assert message["retry"] is False
        assert message["ignore_result"] is True


class TestIds:
    def test_what_is_no_id_is_left_out(self) -> None:
        good = uuid.uuid4()

        assert ids_of([str(good), "nonsense", None, 7, {}, ""]) == [good]


class TestConfiguration:
    def test_only_json_and_only_our_queues(self) -> None:
        app = make_celery("redis://h", ["basic", "advanced"])

        assert app.conf.accept_content == ["json"]
        assert [queue.name for queue in app.conf.task_queues] == [
            "prompts.basic",
            "prompts.advanced",
        ]
        assert app.conf.broker_transport_options["ack_emulation"] is False


class TestRinger:
    @pytest.fixture
    def app(self) -> FakeApp:
        return FakeApp()

    def test_concurrent_calls_share_a_message(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=60)
        rung = [bells(1) for _ in range(50)]
        threads = [threading.Thread(target=ringer.ring, args=[some]) for some in rung]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)

        assert app.messages == []
        assert ringer.flush(DEADLINE_S)
        assert len(app.messages) == 1
        assert sorted(app.ids) == sorted(str(bell.job_id) for some in rung for bell in some)
        ringer.close()

    def test_the_first_call_after_a_quiet_time_is_rung_at_once(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=60)
        ringer._rung_at -= 61  # so long ago

        ringer.ring(bells(1))
        eventually(lambda: len(app.ids) == 1, "the doorbell is rung")

        ringer.ring(bells(1))
        ringer.ring(bells(1))
        assert len(app.ids) == 1  # within the window of the first one
        assert ringer.flush(DEADLINE_S)
        assert [len(message["ids"]) for message in app.messages] == [1, 2]
        ringer.close()

    def test_the_window_ends_by_itself(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=0.001)

        ringer.ring(bells(3))

        eventually(lambda: len(app.ids) == 3, "the doorbells are rung")
        ringer.close()

    def test_ringing_does_not_wait_for_the_broker(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=0)
        app.may_send.clear()
        ringer.ring(bells(1))
        assert app.sending.wait(DEADLINE_S)

        ringer.ring(bells(1))  # the test would hang here

        assert not ringer.flush(0.01)
        app.may_send.set()
        assert ringer.flush(DEADLINE_S)
        assert len(app.ids) == 2
        ringer.close()

    def test_closing_rings_what_waits(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=60)
        ringer.ring(bells(2))

        ringer.close()

        assert len(app.ids) == 2

    def test_after_closing_nothing_is_rung(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=0)
        ringer.ring(bells(1))
        ringer.close()

        ringer.ring(bells(1))

        assert ringer.flush(DEADLINE_S)
        assert len(app.ids) == 1

    def test_closing_ends_the_thread(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=0)
        ringer.ring(bells(1))
        thread = ringer._thread
        assert thread is not None

        ringer.close()

        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    def test_no_thread_before_the_first_doorbell(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery)

        assert ringer.flush()
        assert ringer._thread is None
        ringer.close()

    @pytest.mark.parametrize("error", [OperationalError("down"), ConnectionResetError()], ids=repr)
    def test_a_broker_that_is_down_loses_doorbells_and_nothing_else(
        self, app: FakeApp, error: Exception
    ) -> None:
        ringer = Ringer(app.celery, window_s=0)
        app.fail_with.append(error)
        ringer.ring(bells(2))
        assert ringer.flush(DEADLINE_S)
        assert app.ids == []

        ringer.ring(bells(3))

        assert ringer.flush(DEADLINE_S)
        assert len(app.ids) == 3
        ringer.close()

    def test_a_child_process_starts_empty_with_a_connection_of_its_own(self, app: FakeApp) -> None:
        """What the hook does after a fork; a real fork is in the integration tests."""
        celery = make_celery("memory://", ["basic", "advanced"])
        ringer = Ringer(celery, window_s=60)
        ringer._waiting.extend(bells(5))  # without the thread, which no child inherits

        ringer.start_afresh()

        assert ringer._waiting == []
        assert ringer._thread is None
        assert ringer._app is not celery
        assert ringer._app.conf.broker_url == "memory://"
        assert [queue.name for queue in ringer._app.conf.task_queues] == [
            "prompts.basic",
            "prompts.advanced",
        ]
        ringer.close()

    def test_flush_of_nothing_is_quick_and_repeatable(self, app: FakeApp) -> None:
        ringer = Ringer(app.celery, window_s=0)
        for _ in range(3):
            ringer.ring(bells(1))
            assert ringer.flush(DEADLINE_S)
            assert ringer.flush(DEADLINE_S)
        assert len(app.ids) == 3
        ringer.close()
