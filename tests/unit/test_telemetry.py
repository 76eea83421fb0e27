"""Events: what they count, whom they reach, and what becomes a log line."""

from __future__ import annotations

import dataclasses
import logging
import uuid

import pytest
import structlog
from structlog.testing import capture_logs

from promptfleet_shared.jobs import JobError, JobState, Outcome, Release
from promptfleet_workers.telemetry import (
    BatchClaimed,
    BreakerChanged,
    Event,
    JobsFinished,
    JobsReleased,
    KeyStopped,
    LogHook,
    Swept,
    emit_to,
)


def ended(state: JobState, calls: int = 1) -> Outcome:
    return Outcome(job_id=uuid.uuid4(), fence=1, state=state, text="secret", calls=calls)


def released(code: str | None) -> Release:
    error = None if code is None else JobError(code=code, message="secret")
    return Release(job_id=uuid.uuid4(), fence=1, error=error)


class TestEvents:
    def test_finished_jobs_are_counted_by_state(self) -> None:
        outcomes = [
            ended(JobState.SUCCEEDED),
            ended(JobState.SUCCEEDED, calls=3),
            ended(JobState.FAILED),
        ]

        event = JobsFinished.of(outcomes, fenced=1)

        assert dict(event.states) == {"succeeded": 2, "failed": 1}
        assert (event.jobs, event.fenced, event.calls) == (3, 1, 5)

    def test_released_jobs_are_counted_by_cause(self) -> None:
        event = JobsReleased.of([released("timeout"), released(None), released(None)], fenced=0)

        assert dict(event.codes) == {"timeout": 1, "drained": 2}

    @pytest.mark.parametrize(
        "event",
        [
            JobsFinished.of([ended(JobState.SUCCEEDED)] * 2, fenced=0),
            JobsReleased.of([released("timeout")], fenced=0),
        ],
        ids=lambda event: type(event).__name__,
    )
    def test_their_fields_survive_becoming_a_dict(self, event: JobsFinished | JobsReleased) -> None:
        fields = dataclasses.asdict(event)

        name = "states" if isinstance(event, JobsFinished) else "codes"
        assert fields[name] == dict(getattr(event, name))


def test_every_hook_is_told() -> None:
    one: list[Event] = []
    two: list[Event] = []
    event = Swept(verdicts={"ring": 1})

    emit_to([one.append, two.append])(event)

    assert one == two == [event]


class TestLogHook:
    @pytest.fixture(autouse=True)
    def _fresh_structlog(self) -> None:
        structlog.reset_defaults()

    @pytest.mark.parametrize(
        ("event", "level"),
        [
            (JobsFinished.of([ended(JobState.SUCCEEDED)], fenced=1), "warning"),
            (JobsReleased.of([released("timeout")], fenced=1), "warning"),
            (Swept(verdicts={"lost": 2, "alive": 1}), "warning"),
            (Swept(verdicts={"poison": 1}), "warning"),
            (Swept(verdicts={"expired": 1}), "warning"),
            (Swept(verdicts={"unknown": 1}, unknown_calls=1), "warning"),
            (Swept(verdicts={"ring": 2}), None),
            (JobsFinished.of([ended(JobState.FAILED)], fenced=0), None),
            (BatchClaimed(tier="basic", rung=3, claimed=2), None),
            (BreakerChanged(deployment="a", state="open", fleet=True, for_s=5.0), "warning"),
            (BreakerChanged(deployment="a", state="ramp", fleet=True), "info"),
            (KeyStopped(deployment="a", for_s=300.0), "error"),
        ],
        ids=str,
    )
    def test_only_what_needs_attention_is_a_warning(
        self, event: Event, level: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("promptfleet"), "level", logging.INFO)
        with capture_logs() as lines:
            LogHook()(event)

        assert [line["log_level"] for line in lines] == ([level] if level else [])
        assert "secret" not in str(lines)

    def test_the_rest_is_for_debugging(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logging.getLogger("promptfleet"), "level", logging.DEBUG)
        logging.getLogger("promptfleet").manager._clear_cache()  # type: ignore[attr-defined]
        with capture_logs() as lines:
            LogHook()(JobsFinished.of([ended(JobState.FAILED)] * 2, fenced=0))

        (line,) = lines
        assert (line["event"], line["log_level"]) == ("JobsFinished", "debug")
        assert line["states"] == {"failed": 2}
