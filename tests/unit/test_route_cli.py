"""`promptfleet route` explains, and submits nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from promptfleet.cli import app
from promptfleet.cli.exits import ExitCode

FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["small"]
max_tokens = 100
conditions = { complexity = "low" }
[tiers.top]
models = ["large", "small"]
conditions = [{ complexity = ["medium", "high"] }, { critical_task = true }]
[models.small]
deployments = [{ base_url = "http://a", model = "gpt-4o-mini" }]
[models.large]
deployments = [{ base_url = "http://a", model = "gpt-4o" }]
"""
HARD = "Prove step by step why x^2 = 2. Compare 3 proofs."


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text(FLEET, encoding="utf-8")
    monkeypatch.setenv("PROMPTFLEET_CONFIG", str(config))
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    monkeypatch.chdir(tmp_path)


def run(*words: str, input: str | None = None) -> Result:  # noqa: A002
    return CliRunner().invoke(app, ["route", *words], input=input, catch_exceptions=False)


def test_a_choice_is_explained() -> None:
    shown = run(HARD).output
    assert shown.startswith("top: high complexity")
    for word in ("reasoning", "basic: complexity is low (here: high)", "models: large, small"):
        assert word in shown
    assert "expected cost: 0.00" in shown


def test_a_choice_as_json() -> None:
    told = json.loads(run("--json", "Hi").output)
    assert (told["tier"], told["models"]) == ("basic", ["small"])
    assert told["decision"]["by"] == "rules"
    assert told["conditions"] == [
        {
            "tier": "basic",
            "attribute": "complexity",
            "wanted": ["low"],
            "found": "low",
            "holds": True,
        }
    ]
    assert 0 < told["expected_cost_usd"] < 0.001


def test_what_is_said_counts() -> None:
    for words in (["--attribute", "critical_task=true"], ["--complexity", "9"]):
        assert json.loads(run("--json", *words, "Hi").output)["tier"] == "top"
    assert json.loads(run("--json", "-", input=HARD).output)["tier"] == "top"


def test_a_file_is_explained_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Hi"},
        {"messages": [{"role": "user", "content": HARD}], "metadata": {"n": 1}},
        {"prompt": "Hi", "attributes": {"critical_task": True}},
        {"prompt": ""},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = run("--file", str(path))
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert rows == [["1", "basic"], ["2", "top"], ["3", "top"]]
    assert "line 4" in done.stderr
    assert "2 top, 1 basic" in done.stderr


def test_mistakes_are_named() -> None:
    assert run().exit_code == ExitCode.USAGE
    for words in (["--complexity", "hard", "Hi"], ["--attribute", "x", "Hi"]):
        done = run(*words)
        assert done.exit_code == ExitCode.USAGE
        assert "error:" in done.output
    assert "--since" in run("--regret", "--since", "soon").output
