"""What docs/explanation/guarantees.md promises, kept by real workers that are being broken."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.fleet import Fleet
from tests.acceptance.site import Site, open_site, prompt_key, unique
from tests.waiting import eventually

from promptfleet import PromptJob
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.migrating import migrate

NO_CALL_AFTER_S = 5.0
RING_S = 5.0


@pytest.fixture
def site(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Site]:
    with open_site(tmp_path, database_url, broker_url) as opened:
        yield opened


def test_the_usual_settings_keep_the_promise_of_a_minute() -> None:
    settings = Settings()
    found_s = settings.lease_s + 1.25 * settings.sweep_interval_s
    assert found_s < 60 - RING_S


@pytest.mark.parametrize("latency_ms", [0, 5000], ids=["done", "in flight"])
def test_a_prompt_that_kills_its_workers_is_stopped_and_its_neighbours_are_not(
    site: Site, latency_ms: int
) -> None:
    """A watcher kills the worker whenever the provider has been asked the poison."""
    fleet = site.workers("a", "b", "c", lease_s=1)
    well = site.submit(*(unique(f"{n}") for n in range(60)))
    eventually(lambda: site.finished(*well), "the provider is seen to be well")
    poison = unique("[[sim:hang]] poison")
    neighbours = [unique(f"[[sim:latency-ms={latency_ms}]] neighbour {n}") for n in range(3)]
    (bad, *good) = site.submit(poison, *neighbours)

    for deaths in (1, 2, 3):
        eventually(lambda n=deaths: site.provider.calls_of(poison) == n, "it is called")  # type: ignore[misc]
        if not latency_ms:
            eventually(lambda: site.finished(*good), "its neighbours are done")
        os.kill(_owner(site.jobs()[bad.id]), signal.SIGKILL)

    eventually(lambda: site.finished(bad, *good), "all are final", timeout_s=60)
    assert len(fleet.exits) == 3
    rows = site.jobs()
    row = rows[bad.id]
    assert (row.state, row.crashes, row.results) == ("failed", 3, 1)
    assert row.result_error["code"] == "poison"
    assert row.unknown_calls == site.provider.calls_of(poison) == 3
    assert [rows[job.id].state for job in good] == ["succeeded"] * len(good)


def test_a_worker_that_stood_still_neither_writes_nor_calls(site: Site) -> None:
    """Stopped beyond its leases with calls in flight and jobs that wait for one."""
    fleet = site.workers("a", "b", calls=8, at_once=2)
    texts = [unique(f"[[sim:latency-ms=1000]] {n}") for n in range(6)]
    jobs = site.submit(*texts)
    eventually(lambda: site.states() == ["running"] * 6, "all are claimed")
    eventually(lambda: site.provider.stats()["in_flight"] == 2, "two are being called")
    (zombie,) = {_owner(row) for row in site.jobs().values()}
    (other,) = {fleet.pid(name) for name in ("a", "b")} - {zombie}
    os.kill(zombie, signal.SIGSTOP)

    eventually(lambda: site.finished(*jobs), "another worker does them")
    before, calls = site.jobs(), site.calls()
    os.kill(other, signal.SIGKILL)  # so that the next job is the zombie's
    os.kill(zombie, signal.SIGCONT)
    (fresh,) = site.submit(unique("Are you there?"))
    eventually(lambda: site.finished(fresh), "it works again")
    assert fleet.supervisor.stop(grace_s=30) == ()

    after = site.jobs()
    assert {job.id: after[job.id] for job in jobs} == before
    assert all((row.state, row.results) == ("succeeded", 1) for row in after.values())
    made = site.calls()
    assert {prompt_key(text): made[prompt_key(text)] for text in texts} == calls
    assert sum(calls.values()) == len(texts) + 2
    assert all(
        row.unknown_calls >= calls[prompt_key(text)] - 1
        for text, row in _by_text(texts, jobs, after)
    )


def test_cancelled_jobs_stay_cancelled_though_everything_restarts(tmp_path: Path) -> None:
    with (
        EmbeddedPostgres(tmp_path / "postgres") as postgres,
        EmbeddedValkey(tmp_path / "valkey") as valkey,
        open_site(tmp_path, postgres.url, valkey.url) as site,
    ):
        migrate(site.watch.engine)
        fleet = site.workers("a", "b", calls=6, at_once=2)
        deferred = [unique("[[sim:status=429,retry-after-ms=2500]] later") for _ in range(2)]
        jobs = site.submit(*deferred)
        eventually(lambda: [r.deferrals for r in site.jobs().values()] == [1, 1], "they wait")
        texts = [unique(f"[[sim:latency-ms=60000]] {n}") for n in range(30)]
        jobs += site.submit(*texts)
        eventually(lambda: site.provider.stats()["in_flight"] == 4, "some are being called")
        eventually(lambda: site.states().count("running") >= 8, "some wait for a call")
        assert site.states().count("queued") >= 8

        assert all(job.cancel() for job in jobs)
        acknowledged = time.monotonic()
        for name in ("a", "b"):
            os.kill(fleet.pid(name), signal.SIGKILL)
        postgres.restart("immediate")
        valkey.restart()
        fleet.wait_until_ready(4)

        eventually(lambda: site.finished(*jobs), "all are final", timeout_s=60)
        eventually(lambda: site.provider.stats()["in_flight"] == 0, "all calls are closed")
        rows = site.jobs().values()
        assert {(r.state, r.result_state, r.results) for r in rows} == {("cancelled",) * 2 + (1,)}
        starts = site.provider.stats()["last_call_by_prompt"].values()
        print(f"the last call began {max(starts) - acknowledged:.2f} s after the cancellation")
        assert max(starts) <= acknowledged + NO_CALL_AFTER_S


CLAIM_LOG = """
CREATE TABLE claim_log (owner text, at timestamptz);
CREATE FUNCTION log_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO claim_log VALUES (NEW.lease_owner, clock_timestamp()); RETURN NULL; END $$;
CREATE TRIGGER log_claim AFTER UPDATE OF state ON jobs FOR EACH ROW
    WHEN (OLD.state = 'queued' AND NEW.state = 'running') EXECUTE FUNCTION log_claim();
"""
DRAIN_S = 2.5
TAKEN_AT_MOST_S = 1.5


def test_a_rolling_restart_under_load_loses_nothing(site: Site) -> None:
    with site.watch.engine.begin() as connection:
        connection.exec_driver_sql(CLAIM_LOG)
    names = ("a", "b")
    fleet = site.workers(*names, calls=16, drain_s=DRAIN_S)
    texts = [unique(f"[[sim:latency-ms={6000 if n % 25 == 0 else 700}]] {n}") for n in range(200)]
    jobs = site.submit(*texts)
    eventually(lambda: site.provider.stats()["in_flight"] >= 24, "both are busy")

    in_flight = 0
    for done, name in enumerate(names):
        fleet.wait_until_ready(len(names) + done)
        in_flight += _stop_and_see(site, fleet, name)

    eventually(lambda: site.finished(*jobs), "all are final", timeout_s=60)
    rows = site.jobs()
    assert {(r.state, r.result_state, r.results) for r in rows.values()} == {
        ("succeeded", "succeeded", 1)
    }
    assert {(row.attempt, row.crashes) for row in rows.values()} == {(1, 0)}
    calls = site.calls()
    for text, row in _by_text(texts, jobs, rows):
        assert calls[prompt_key(text)] == 1 + row.unknown_calls == row.calls
        assert row.unknown_calls <= row.deferrals
    doubled = sum(calls.values()) - len(jobs)
    print(f"{doubled} calls were made twice, {in_flight} were in flight when workers were stopped")
    assert 0 < doubled <= in_flight


def _stop_and_see(site: Site, fleet: Fleet, name: str) -> int:
    """SIGTERM: how many jobs the worker had; it claims no more, and ends in time."""
    pid = fleet.pid(name)
    (owned,) = site.watch.rows(
        "SELECT count(*) AS jobs, clock_timestamp() AS at FROM jobs"
        " WHERE state = 'running' AND lease_owner LIKE :owner",
        owner=f"%:{pid}",
    )
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: pid in {e.pid for e in fleet.exits}, "it ends", timeout_s=DRAIN_S + 10)
    took_s = time.monotonic() - started
    (exit_,) = [e for e in fleet.exits if e.pid == pid]
    assert exit_.returncode == 0
    assert TAKEN_AT_MOST_S < took_s < DRAIN_S + 5, "a drain lasts as long as it may, and no longer"
    (last,) = site.watch.rows(
        "SELECT extract(epoch FROM max(at) - CAST(:term AS timestamptz))::float8 AS after_s"
        " FROM claim_log WHERE owner LIKE :owner",
        term=owned.at,
        owner=f"%:{pid}",
    )
    print(f"{name}: {owned.jobs} jobs, ended after {took_s:.1f} s, last claim {last.after_s:.2f} s")
    assert last.after_s < TAKEN_AT_MOST_S
    return int(owned.jobs)


def _owner(row: Any) -> int:
    """The process that has the job."""
    return int(row.lease_owner.rpartition(":")[2])


def _by_text(
    texts: Sequence[str], jobs: Sequence[PromptJob], rows: Mapping[uuid.UUID, Any]
) -> list[tuple[str, Any]]:
    return [(text, rows[job.id]) for text, job in zip(texts, jobs, strict=True)]
