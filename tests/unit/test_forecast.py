"""A forecast checks every line, guesses answers by what was seen, and says what it guessed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_audit import FLEET
from typer.testing import CliRunner

from promptfleet.bulk.forecast import Forecast, Forecaster
from promptfleet.bulk.lines import read_lines
from promptfleet.cli import app
from promptfleet.estimates import DEFAULT_OUTPUT, Estimates
from promptfleet.postgres import make_defaults
from promptfleet_shared.fleet import parse_fleet
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.costs import ObservedOutputs

SEEN = {"basic": ObservedOutputs(answers=50, mean=40.2, p50=30, p95=100)}


def forecast(
    *lines: Any,
    observed: Mapping[str, ObservedOutputs] | None = None,
    rates: Mapping[str, float] | None = None,
    **options: Any,
) -> Forecast:
    fleet = parse_fleet(FLEET)
    defaults = make_defaults(Settings(config=Path("fleet.toml")), fleet)
    forecaster = Forecaster(
        Estimates(fleet, observed),
        options=options,
        defaults=defaults,
        keep_model=True,
        rates=rates or {},
    )
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return forecaster.read(read_lines(io.BytesIO(text.encode())))


def test_answers_are_as_long_as_earlier_ones() -> None:
    found = forecast({"prompt": "Hi"}, {"prompt": "Hi", "max_tokens": 7}, observed=SEEN)
    (tier,) = found.tiers
    assert (tier.prompts, tier.output_tokens) == (2, 40 + 7)
    assert tier.sources == {"observed": 2}
    assert tier.high_usd.usd > tier.usd.usd


def test_few_answers_prove_nothing() -> None:
    few = {"basic": ObservedOutputs(answers=3, mean=1, p50=1, p95=1)}
    found = forecast({"prompt": "Hi"}, {"prompt": "Hi", "max_tokens": 7}, observed=few)
    assert found.tiers[0].output_tokens == DEFAULT_OUTPUT + 7
    assert found.tiers[0].sources == {"default": 1, "max_tokens": 1}


def test_prices_by_tier_and_by_batch() -> None:
    found = forecast({"prompt": "Hi", "max_tokens": 1000}, {"prompt": "Hi", "tier": "top"})
    basic, top = found.tiers
    assert float(basic.usd.usd) == pytest.approx(1000 * 0.6e-6, rel=0.01)
    assert basic.batch_usd.usd == basic.usd.usd / 2
    assert top.tier == "top"
    ordinary, batch = found.all_on["top"]
    assert ordinary is not None
    assert batch == ordinary / 2
    assert ordinary > basic.usd.usd + top.usd.usd


def test_time_is_that_of_the_slowest_tier() -> None:
    lines = [{"prompt": "Hi"}, {"prompt": "Hi", "tier": "top"}]
    assert forecast(*lines, rates={"basic": 2.0, "top": 0.1}).duration_s == 10
    assert forecast(*lines, rates={"basic": 2.0}).duration_s is None


def test_lines_that_can_not_be_submitted_are_told() -> None:
    found = forecast({"prompt": "Hi"}, "{", {"prompt": 7}, {"prompt": "x", "tier": "none"})
    assert (found.lines, found.invalid) == (4, 3)
    assert [mistake.line for mistake in found.mistakes] == [2, 3, 4]
    assert found.mistakes[0].message.startswith("not JSON")


def test_an_embedding_has_no_answer() -> None:
    found = forecast({"prompt": "Hi", "kind": "embedding"})
    assert found.tiers[0].output_tokens == 0


def test_the_command_submits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a database is needed."""
    (tmp_path / "fleet.toml").write_text(FLEET)
    (tmp_path / "in.jsonl").write_text('"Hello"\n{"nothing": 1}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    result = CliRunner().invoke(app, ["submit", "in.jsonl", "--dry-run", "--json"])

    assert result.exit_code == 3  # a line is not valid
    found = json.loads(result.stdout)
    assert found["tiers"]["basic"]["prompts"] == 1
    assert found["mistakes"][0]["line"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.toml", "in.jsonl"]


def test_the_command_needs_an_output_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('"Hello"\n')
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["submit", "in.jsonl"])
    assert result.exit_code == 2
    assert "--dry-run" in result.stderr
