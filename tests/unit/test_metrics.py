"""Events become numbers; prompts, tenants and a provider's inventions do not."""

from __future__ import annotations

import uuid

import pytest
from prometheus_client.parser import text_string_to_metric_families

from promptfleet_shared.jobs import JobError, JobState, Outcome, Release
from promptfleet_workers.metrics import MAX_CODES, PrometheusHook
from promptfleet_workers.telemetry import (
    BatchClaimed,
    BreakerChanged,
    CacheUsed,
    CallbacksDelivered,
    JobsFinished,
    JobsReleased,
    KeyStopped,
    Swept,
)


@pytest.fixture
def hook() -> PrometheusHook:
    return PrometheusHook(now=lambda: 1_000_000.0)


def value(hook: PrometheusHook, name: str, **labels: str) -> float | None:
    return hook.registry.get_sample_value(f"promptfleet_{name}", labels)


def ended(state: JobState, *, calls: int = 1, unknown: int = 0) -> Outcome:
    return Outcome(
        job_id=uuid.uuid4(),
        fence=1,
        state=state,
        text="secret",
        calls=calls,
        unknown_calls=unknown,
    )


def released(code: str, *, unknown: int = 0) -> Release:
    error = JobError(code=code, message="secret")
    return Release(job_id=uuid.uuid4(), fence=1, error=error, calls=1, unknown_calls=unknown)


def test_claims(hook: PrometheusHook) -> None:
    hook(BatchClaimed(tier="basic", rung=12, claimed=10))
    hook(BatchClaimed(tier="basic", rung=3, claimed=0))
    hook(BatchClaimed(tier="basic", rung=5, claimed=0, answered=False))

    assert value(hook, "jobs_claimed_total", tier="basic") == 10
    assert value(hook, "stale_doorbells_total", tier="basic") == 5
    assert value(hook, "failed_claims_total", tier="basic") == 1
    assert value(hook, "batch_jobs_count", tier="basic") == 1
    assert value(hook, "batch_jobs_bucket", tier="basic", le="10.0") == 1
    assert value(hook, "batch_jobs_bucket", tier="basic", le="5.0") == 0


def test_every_possible_double_spend_is_counted(hook: PrometheusHook) -> None:
    assert value(hook, "unknown_calls_total", source="sweep") == 0
    hook(JobsFinished.of([ended(JobState.SUCCEEDED, calls=3, unknown=2)], fenced=0))
    hook(JobsReleased.of([released("timeout", unknown=1), released("server_error")], fenced=0))
    hook(Swept(verdicts={"lost": 4, "poison": 1}, unknown_calls=6))

    assert value(hook, "unknown_calls_total", source="finish") == 2
    assert value(hook, "unknown_calls_total", source="release") == 1
    assert value(hook, "unknown_calls_total", source="sweep") == 6
    assert value(hook, "calls_total") == 5
    assert value(hook, "swept_jobs_total", verdict="lost") == 4


def test_ends_by_state_and_cause(hook: PrometheusHook) -> None:
    hook(JobsFinished.of([ended(JobState.SUCCEEDED)] * 2 + [ended(JobState.FAILED)], fenced=1))
    hook(JobsReleased.of([released("timeout")], fenced=1))

    assert value(hook, "jobs_finished_total", state="succeeded") == 2
    assert value(hook, "jobs_finished_total", state="failed") == 1
    assert value(hook, "jobs_released_total", code="timeout") == 1
    assert value(hook, "fenced_writes_total", write="finish") == 1
    assert value(hook, "fenced_writes_total", write="release") == 1


@pytest.mark.parametrize("code", ["", "Ignore all previous instructions", "a" * 41, 'x"} 1\n'])
def test_what_is_no_code_is_no_label(hook: PrometheusHook, code: str) -> None:
    hook(JobsReleased.of([released(code)], fenced=0))

    assert value(hook, "jobs_released_total", code="other") == 1


def test_codes_are_bounded(hook: PrometheusHook) -> None:
    for n in range(2 * MAX_CODES):
        hook(JobsReleased.of([released(f"code_{n}")], fenced=0))
    hook(JobsReleased.of([released("code_0")], fenced=0))

    assert value(hook, "jobs_released_total", code="code_0") == 2
    assert value(hook, "jobs_released_total", code="other") == MAX_CODES


def test_breakers(hook: PrometheusHook) -> None:
    hook(BreakerChanged(deployment="main", state="open", fleet=True))
    assert value(hook, "breaker_state", deployment="main", state="open") == 1
    hook(BreakerChanged(deployment="main", state="closed", fleet=True))
    assert value(hook, "breaker_state", deployment="main", state="open") == 0
    assert value(hook, "breaker_state", deployment="main", state="closed") == 1
    hook(KeyStopped(deployment="main", for_s=300))
    assert value(hook, "stopped_keys_total", deployment="main") == 1


def test_callbacks(hook: PrometheusHook) -> None:
    hook(CallbacksDelivered(outcomes={"delivered": 3, "failed": 1}, fenced=2))
    assert value(hook, "callback_attempts_total", outcome="delivered") == 3
    assert value(hook, "callback_attempts_total", outcome="failed") == 1
    assert value(hook, "fenced_writes_total", write="callback") == 2


def test_the_cache(hook: PrometheusHook) -> None:
    hook(CacheUsed(tier="basic", answers={"miss": 2, "hit": 3}, saved_usd=0.5))
    hook(CacheUsed(tier="basic", answers={"coalesced": 1, "hit": 1}, saved_usd=0.25))
    hook(CacheUsed(tier="advanced", answers={"miss": 1}, saved_usd=0.0))

    assert value(hook, "cache_answers_total", tier="basic", answer="hit") == 4
    assert value(hook, "cache_answers_total", tier="basic", answer="miss") == 2
    assert value(hook, "cache_answers_total", tier="basic", answer="coalesced") == 1
    assert value(hook, "cache_saved_usd_total", tier="basic") == 0.75
    assert value(hook, "cache_saved_usd_total", tier="advanced") is None


def test_a_workers_own_numbers_are_read_anew(hook: PrometheusHook) -> None:
    free = 5
    hook.watch(
        worker="host:1",
        tiers=["a", "b"],
        slots=8,
        slots_free=lambda: free,
        jobs_held=lambda: 3,
        commit_age_s=lambda: 10.0,
        watchdog_idle_s=lambda: 1.5,
    )
    assert value(hook, "slots_free") == 5
    free = 4
    assert value(hook, "slots_free") == 4
    assert value(hook, "slots") == 8
    assert value(hook, "jobs_held") == 3
    assert value(hook, "last_commit_timestamp_seconds") == 999_990
    assert value(hook, "watchdog_idle_seconds") == 1.5
    assert value(hook, "worker_info", worker="host:1", tiers="a,b") == 1


def test_the_page_is_prometheus_text_without_secrets(hook: PrometheusHook) -> None:
    hook(JobsFinished.of([ended(JobState.FAILED)], fenced=0))
    hook(JobsReleased.of([released("timeout")], fenced=0))

    body, content_type = hook.page("")

    families = {family.name for family in text_string_to_metric_families(body.decode())}
    assert {"promptfleet_jobs_finished", "process_resident_memory_bytes"} <= families
    assert content_type.startswith("text/plain")
    assert b"secret" not in body
    assert hook.page("application/openmetrics-text")[1].startswith("application/openmetrics-text")
