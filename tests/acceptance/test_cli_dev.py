"""The command line against `promptfleet dev`: everything as a user sees it."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import httpx
import psutil
import sqlalchemy as sa
from tests.acceptance.conftest import PROMPTFLEET, DevFleet
from tests.waiting import eventually

from promptfleet_shared.store.engines import make_engine

TIERS = {"basic", "standard", "advanced"}


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_is_answered(dev: DevFleet) -> None:
    for tier in sorted(TIERS):
        ended = dev.run("enqueue", f"Hello {tier}", "--tier", tier, "--wait", "--timeout", "30")
        assert ended.returncode == 0, ended.stderr
        assert f"Hello {tier}" in ended.stdout


def test_addresses_are_private_and_passwords_not_on_the_screen(dev: DevFleet) -> None:
    file = dev.data_dir / "env"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    values = json.loads(dev.run("env", "--json").stdout)
    password = sa.make_url(values["PROMPTFLEET_DATABASE_URL"]).password
    assert password
    assert password not in dev.output


def test_the_api_answers_this_machine_without_a_key(dev: DevFleet) -> None:
    url = json.loads(dev.run("env", "--json").stdout)["PROMPTFLEET_PUBLIC_URL"]
    assert f"{url}/docs" in dev.output
    with httpx.Client(base_url=url, timeout=40) as client:
        job = client.post("/v1/jobs", json={"prompt": "Hello API", "tier": "basic"})
        assert job.status_code == 202, job.text
        answer = client.get(job.headers["location"], params={"wait": 30}).json()
    assert answer["state"] == "succeeded", answer
    assert dev.run("result", answer["id"]).returncode == 0


def test_doctor_finds_nothing_wrong(dev: DevFleet) -> None:
    ended = dev.run("doctor", "--json")
    findings = json.loads(ended.stdout)
    assert [finding for finding in findings if finding["level"] != "ok"] == []
    assert ended.returncode == 0
    checks = {finding["check"] for finding in findings}
    assert {f"worker {tier}" for tier in TIERS} <= checks
    assert {"database", "schema", "broker", "memory", "persistence", "Flower"} <= checks


def test_a_file_is_submitted_interrupted_and_resumed_without_paying_twice(
    dev: DevFleet, tmp_path: Path
) -> None:
    lines = [json.dumps({"prompt": f"Line {n}", "custom_id": f"c{n}"}) for n in range(1, 61)]
    lines[9] = "not json"
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["submit", str(prompts), "-o", str(output), "--tier", "basic", "--json"]
    command += ["--max-in-flight", "10"]
    first = subprocess.Popen(
        [PROMPTFLEET, *command],
        env=dev.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: len(_rows(output)) >= 10, "the first results", timeout_s=60)
        first.send_signal(signal.SIGINT)
        _, told = first.communicate(timeout=30)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 130
    assert "interrupted" in told
    early = len(_rows(output))
    assert early < 59

    second = dev.run(*command)
    assert second.returncode == 3, second.stderr  # one line is not JSON
    summary = json.loads(second.stdout)
    assert summary["earlier"] == early
    assert summary["succeeded"] == 59 - early
    rows = _rows(output)
    assert {row["line"]: row["custom_id"] for row in rows} == {
        n: f"c{n}" for n in range(1, 61) if n != 10
    }
    assert len(rows) == 59
    assert [row["line"] for row in _rows(tmp_path / "results.errors.jsonl")] == [10]
    assert _jobs_of_run(dev, summary["run"]) == 59


def _jobs_of_run(dev: DevFleet, run: str) -> int:
    url = json.loads(dev.run("env", "--json").stdout)["PROMPTFLEET_DATABASE_URL"]
    engine = make_engine(url, application_name="tests", pool_size=1)
    try:
        with engine.connect() as connection:
            query = sa.text("SELECT count(*) FROM jobs WHERE metadata ->> 'run' = :run")
            return int(connection.execute(query, {"run": run}).scalar_one())
    finally:
        engine.dispose()


def test_status_counts_what_was_done(dev: DevFleet) -> None:
    asked = dev.run("enqueue", "Count me", "--tier", "standard", "--wait")
    assert asked.returncode == 0
    ended = dev.run("status", "--json")
    tiers = json.loads(ended.stdout)["tiers"]
    assert tiers.keys() >= TIERS
    assert tiers["standard"]["finished"]["succeeded"] >= 1
    assert tiers["standard"]["doorbells"] == 0
    assert "standard" in dev.run("status").stdout


def test_a_second_fleet_on_the_same_directory_is_refused_and_does_no_harm(dev: DevFleet) -> None:
    ended = dev.run("dev", "--provider", "simulated")
    assert ended.returncode == 1
    assert "is in use by process" in ended.stderr
    assert dev.run("status").returncode == 0


def test_two_fleets_run_at_once_and_ctrl_c_stops_all_of_one(dev: DevFleet, tmp_path: Path) -> None:
    other = DevFleet(
        tmp_path / "other", *("--provider", "simulated", "--tier", "basic", "--no-flower")
    )
    try:
        other.wait_until_ready()
        family = other.family()
        assert len(family) >= 5  # dev, Postgres, Valkey, provider, worker
        answer = other.run("enqueue", "Hello other", "--tier", "basic", "--wait")
        assert answer.returncode == 0, answer.stderr
        other.interrupt()
        assert other.wait() == 0, other.output
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        assert not (other.data_dir / "env").exists()
        assert dev.run("status").returncode == 0

        again = DevFleet(
            tmp_path / "other", *("--provider", "simulated", "--tier", "basic", "--no-flower")
        )
        try:
            again.wait_until_ready()
            kept = json.loads(again.run("status", "--json").stdout)
            assert kept["tiers"]["basic"]["finished"]["succeeded"] == 1
        finally:
            again.close()
    finally:
        other.close()


def test_a_second_ctrl_c_does_not_wait_for_what_runs(tmp_path: Path) -> None:
    fleet = DevFleet(
        tmp_path / "slow",
        *("--provider", "simulated", "--tier", "basic", "--no-flower"),
        *("--provider-option", "latency-ms=600000"),
    )
    try:
        fleet.wait_until_ready()
        family = fleet.family()
        job = fleet.run("enqueue", "Take your time", "--tier", "basic").stdout.strip()
        eventually(
            lambda: json.loads(fleet.run("result", job, "--json").stdout)["state"] == "running",
            "the job runs",
        )
        fleet.interrupt()
        fleet.wait_for("draining", timeout_s=10)
        fleet.interrupt()
        assert fleet.wait(timeout_s=15) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        assert "killed" in fleet.output
    finally:
        fleet.close()
