"""The programs in examples/ run as a reader would run them, against a real fleet."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.deployed import ROOT, simulated_fleet, started

from promptfleet_shared.settings import Settings
from promptfleet_shared.tiers import DEFAULT_TIERS, queue_name

PROGRAMS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a fleet with one worker for all tiers."""
    queues = ",".join(queue_name(tier) for tier in DEFAULT_TIERS)
    command = shlex.split(f"celery -A promptfleet_workers.app worker -Q {queues}")
    with simulated_fleet(tmp_path, DEFAULT_TIERS) as config:
        environment = {
            "PROMPTFLEET_DATABASE_URL": settings.database_url.get_secret_value(),
            "PROMPTFLEET_BROKER_URL": settings.broker_url.get_secret_value(),
            "PROMPTFLEET_CONFIG": str(config),
        }
        with started({"worker": command}, {"worker": environment}, tmp_path):
            yield environment


def _run(name: str, environment: dict[str, str], *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *flags, str(ROOT / "examples" / name)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_program_is_tested_and_told_of() -> None:
    here, tours = Path(__file__), ROOT / "tests/integration/test_tours.py"
    tested = "".join(p.read_text(encoding="utf-8") for p in (here, tours))
    told = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md"))
    for program in PROGRAMS:
        assert f'_run("{program.name}"' in tested
        assert f"examples/{program.name}" in told


def test_batch_of_prompts(fleet: dict[str, str]) -> None:
    printed = _run("batch_of_prompts.py", fleet)
    assert set(re.findall(r"^review (\d): \w", printed, re.MULTILINE)) == {"0", "1", "2", "3"}
    assert re.search(r"^4 reviews, [1-9]\d* tokens$", printed, re.MULTILINE)
    assert len(re.findall(r"\((?:coalesced|hit)\)$", printed, re.MULTILINE)) == 1


def test_in_a_transaction(fleet: dict[str, str]) -> None:
    printed = _run("in_a_transaction.py", fleet)
    assert re.fullmatch(r"article 1: \S.*\n", printed)
