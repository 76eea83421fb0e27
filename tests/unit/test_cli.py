"""The command line on a fleet in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from promptfleet import local_model
from promptfleet.cli import app, demo, doctor, servers
from promptfleet.cli.environment import find_settings, flower_url, without_password
from promptfleet.cli.exits import ExitCode
from promptfleet.dev_stack.local_fleet import LocalProvider, fleet_toml, provider_command
from promptfleet.dev_stack.stack import worker_command
from promptfleet.requests import Defaults, make_specs
from promptfleet.testing import FakeFleet, fake_fleet
from promptfleet_shared.errors import ConfigurationError, ProviderError
from promptfleet_shared.fleet import load_fleet, parse_fleet
from promptfleet_shared.settings import Settings
from promptfleet_shared.tiers import DEFAULT_TIERS

NOBODY = "0190a000-0000-7000-8000-000000000000"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fleet of the developer's own is found."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("PROMPTFLEET_"):
            monkeypatch.delenv(name)


@pytest.fixture
def fleet() -> Iterator[FakeFleet]:
    with fake_fleet(lambda prompt: f"You said: {prompt.text}", tiers=DEFAULT_TIERS) as made:
        yield made


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_enqueue_prints_the_id_that_result_takes(fleet: FakeFleet) -> None:
    enqueued = run("enqueue", "Hello", "--tier", "basic", "--metadata", "a=b=c", "--priority", "9")
    assert enqueued.exit_code == 0
    prompt = fleet.assert_enqueued("Hello", tier="basic", metadata={"a": "b=c"}, times=1)
    assert enqueued.stdout.strip() == str(prompt.id)
    assert prompt.priority == 9
    answer = run("result", str(prompt.id))
    assert (answer.exit_code, answer.stdout) == (0, "You said: Hello\n")


def test_enqueue_reads_stdin_and_waits(fleet: FakeFleet) -> None:
    ended = run("enqueue", "-", "--wait", "--json", stdin="from a pipe [bold]")
    assert ended.exit_code == 0
    assert json.loads(ended.stdout)["text"] == "You said: from a pipe [bold]"
    assert ended.stderr == ""


def test_enqueue_prints_the_answer_as_it_comes(fleet: FakeFleet) -> None:
    ended = run("enqueue", "Hello", "--stream")
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "You said: Hello\n", "")
    assert fleet.enqueued[0].stream


def test_a_stream_that_fails_says_why() -> None:
    def fails(_: object) -> str:
        raise ProviderError("no such thing", code="bad_request", status=400)

    with fake_fleet(fails, tiers=DEFAULT_TIERS):
        ended = run("enqueue", "Hello", "--stream")
    assert (ended.exit_code, ended.stdout) == (3, "")
    assert "bad_request: no such thing" in ended.stderr


def test_a_stream_is_no_json(fleet: FakeFleet) -> None:
    ended = run("enqueue", "Hello", "--stream", "--json")
    assert ended.exit_code == 2
    assert fleet.enqueued == []


def test_the_cache_is_switched_off(fleet: FakeFleet) -> None:
    run("enqueue", "x", "--no-cache")
    cache = fleet.enqueued[0].cache
    assert cache is not None
    assert cache.mode == "off"


def test_a_prompt_that_must_not_be_asked_twice(fleet: FakeFleet) -> None:
    run("enqueue", "x", "--on-unknown", "fail")
    run("enqueue", "y")
    assert [prompt.on_unknown for prompt in fleet.enqueued] == ["fail", "retry"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("enqueue", "x", "--on-unknown", "maybe"), ExitCode.USAGE, "--on-unknown"),
        (("enqueue", "x", "--tier", "nope"), ExitCode.USAGE, "no tier 'nope'"),
        (("enqueue", "x", "--temperature", "9"), ExitCode.USAGE, "temperature: must be"),
        (("enqueue", "x", "--metadata", "novalue"), ExitCode.USAGE, "NAME=VALUE"),
        (("enqueue",), ExitCode.USAGE, "Missing argument"),
        (("result", "no-id"), ExitCode.USAGE, "id: must be"),
        (("result", NOBODY), ExitCode.FAILED, "no such job"),
        (("worker",), ExitCode.USAGE, "promptfleet worker --tier basic"),
        (("dev", "--provider", "nope"), ExitCode.USAGE, "local, simulated, config"),
        (("dev", "--provider", "config"), ExitCode.USAGE, "there is no ./fleet.toml"),
        (("env",), ExitCode.FAILED, "no fleet"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    fleet: FakeFleet, arguments: tuple[str, ...], code: int, text: str
) -> None:
    ended = run(*arguments)
    assert ended.exit_code == code
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_failed_job_ends_with_3_and_its_reason() -> None:
    def fail(_prompt: object) -> str:
        raise ProviderError("the model is out of order", code="broken")

    with fake_fleet(fail):
        ended = run("enqueue", "x", "--wait")
    assert ended.exit_code == ExitCode.JOBS_FAILED
    assert "broken: the model is out of order" in ended.stderr


def test_cancel_tells_of_each_job(fleet: FakeFleet) -> None:
    finished = run("enqueue", "x").stdout.strip()
    ended = run("cancel", finished, NOBODY)
    assert ended.exit_code == ExitCode.FAILED
    assert ended.stdout.splitlines() == [
        f"{finished}: was finished already",
        f"{NOBODY}: not found",
    ]


def test_submit_answers_a_file_and_ends_with_3_for_bad_lines(fleet: FakeFleet) -> None:
    Path("in.jsonl").write_text('"good"\nbad\n', encoding="utf-8")
    ended = run("submit", "in.jsonl", "-o", "out.jsonl", "--tier", "basic", "--json")
    assert ended.exit_code == ExitCode.JOBS_FAILED
    told = json.loads(ended.stdout)
    assert (told["succeeded"], told["invalid"]) == (1, 1)
    (row,) = (json.loads(line) for line in Path("out.jsonl").read_text().splitlines())
    assert (row["line"], row["text"], row["run"]) == (1, "You said: good", told["run"])
    assert json.loads(Path("out.errors.jsonl").read_text())["line"] == 2


def test_submit_leaves_no_empty_errors_file_and_knows_the_same_content_elsewhere(
    fleet: FakeFleet,
) -> None:
    Path("a.jsonl").write_text('"good"\n', encoding="utf-8")
    first = run("submit", "a.jsonl", "-o", "out.jsonl", "--json")
    Path("a.jsonl").rename("b.jsonl")
    again = run("submit", "b.jsonl", "-o", "out.jsonl", "--json")
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert json.loads(again.stdout)["earlier"] == 1
    assert len(fleet.enqueued) == 1
    other = run("submit", "b.jsonl", "-o", "out.jsonl", "--max-tokens", "5")
    assert other.exit_code == ExitCode.USAGE
    assert "another run" in other.stderr
    assert not Path("out.errors.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("missing.jsonl", "-o", "out.jsonl"), "missing.jsonl: can't be read"),
        (("in.jsonl", "-o", "in.jsonl"), "must be different files"),
        (("in.jsonl", "-o", "no/such/out.jsonl"), "can't be written"),
        (("in.jsonl", "-o", "out.jsonl", "--run-id", "a b"), "--run-id"),
    ],
)
def test_submit_refuses_files_that_can_not_be_used(
    fleet: FakeFleet, arguments: tuple[str, ...], text: str
) -> None:
    Path("in.jsonl").write_text('"good"\n', encoding="utf-8")
    ended = run("submit", *arguments)
    assert ended.exit_code == ExitCode.USAGE
    assert text in ended.stderr
    assert Path("in.jsonl").read_text(encoding="utf-8") == '"good"\n'


def test_config_check_prints_file_line_field_and_message() -> None:
    Path("fleet.toml").write_text('default_tier = "x"\n\n[tiers.basic]\n', encoding="utf-8")
    ended = run("config", "check")
    assert ended.exit_code == ExitCode.USAGE
    assert ended.stdout == "fleet.toml:3: tiers.basic.models: Field required\n"
    (mistake,) = json.loads(run("config", "check", "--json").stdout)["mistakes"]
    assert (mistake["line"], mistake["field"]) == (3, "tiers.basic.models")


UNPRICED = """
default_tier = "basic"
[tiers.basic]
models = ["mine", "known"]
[models.mine]
deployments = [{ name = "mine", base_url = "http://mine" }]
[models.free]
price_as = "free"
deployments = [{ name = "free", base_url = "http://free" }]
[models.known]
deployments = [{ name = "known", base_url = "http://known", model = "gpt-4o" }]
"""


def test_what_no_budget_can_count_is_warned_of() -> None:
    for budget, warns in (
        ("", False),
        ('[[budgets]]\nname = "b"\nhard_usd = 5', True),
        ('[[budgets]]\nname = "b"\nsoft_usd = 5\nby = "tenant"\nonly = ["x"]', True),
        ('[[budgets]]\nname = "b"\nhard_usd = 5\nby = "model"\nonly = ["known"]', False),
        ('[[budgets]]\nname = "b"\nhard_usd = 5\nby = "tier"\nonly = ["basic"]', True),
        ('[[budgets]]\nname = "b"\nhard_usd = 5\nby = "tier"\nonly = ["other"]', False),
    ):
        Path("fleet.toml").write_text(UNPRICED + budget, encoding="utf-8")
        found = json.loads(run("config", "check", "--json").stdout)["warnings"]
        expected = (
            "mine: no price is known, so that its calls count nothing in the budget b:"
            ' set models.mine.price_as to "provider/model", or to "free"'
        )
        assert found == ([expected] if warns else [])
        gaps = [finding.level for finding in doctor._budgets(load_fleet(Path("fleet.toml")))]
        levels = [doctor.Level.WARN] if warns else [doctor.Level.OK]
        assert gaps == (levels if budget else [])


def test_config_show_hides_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", "postgresql://me:hunter2@db.example/fleet")
    monkeypatch.setenv("PROMPTFLEET_BROKER_URL", "redis://:hunter2@redis.example/0")
    for arguments in (("config", "show"), ("config", "show", "--json")):
        ended = run(*arguments)
        assert ended.exit_code == 0
        assert "hunter2" not in ended.stdout
        assert "postgresql://me:***@db.example/fleet" in ended.stdout


def test_a_url_is_shown_without_its_password() -> None:
    assert without_password("redis://:s%40cret@h:1/0") == "redis://:***@h:1/0"
    assert without_password("redis://h:1/0") == "redis://h:1/0"


def _leave_environment(folder: Path, *, mode: int = 0o600) -> None:
    folder.mkdir()
    (folder / "env").write_text(
        "PROMPTFLEET_DATABASE_URL=postgresql://dev@127.0.0.1:1/d\n"
        "PROMPTFLEET_BROKER_URL=redis://127.0.0.1:2/0\n"
        "PROMPTFLEET_CONFIG='/a folder/fleet.toml'\n"
        "PROMPTFLEET_FLOWER_URL=http://127.0.0.1:3\n",
        encoding="utf-8",
    )
    (folder / "env").chmod(mode)


def test_a_fleet_that_runs_here_is_found_unless_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".promptfleet"
    _leave_environment(folder)
    found = find_settings(folder)
    assert found.broker_url.get_secret_value() == "redis://127.0.0.1:2/0"
    assert found.config == Path("/a folder/fleet.toml")
    assert flower_url(folder) == "http://127.0.0.1:3"
    assert "export PROMPTFLEET_CONFIG='/a folder/fleet.toml'" in run("env").stdout
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", "postgresql://prod.example/d")
    other = find_settings(folder)
    assert "prod.example" in other.database_url.get_secret_value()
    assert other.broker_url == Settings().broker_url  # never the broker of another fleet


def test_addresses_that_others_could_have_written_are_not_used(tmp_path: Path) -> None:
    _leave_environment(tmp_path / ".promptfleet", mode=0o640)
    with pytest.raises(ConfigurationError, match="readable by nobody else"):
        find_settings(tmp_path / ".promptfleet")


@pytest.mark.parametrize("provider", LocalProvider)
@pytest.mark.parametrize("tiers", [DEFAULT_TIERS, ("basic",)])
def test_the_made_fleet_toml_is_valid(provider: LocalProvider, tiers: tuple[str, ...]) -> None:
    text = fleet_toml(provider, base_url="http://127.0.0.1:9/v1", tiers=tiers, cache_namespace="n")
    fleet = parse_fleet(text)
    assert fleet.tier_names == tiers
    assert fleet.cache.namespace == "n"
    assert fleet.default_tier in tiers


def test_a_worker_is_the_ordinary_celery_command() -> None:
    command = worker_command(("basic", "standard"), extra=("--loglevel", "INFO"))
    assert command == [
        *(sys.executable, "-m", "celery", "-A", "promptfleet_workers.app", "worker"),
        *("-Q", "prompts.basic,prompts.standard", "-n", "basic-standard@%h"),
        *("--loglevel", "INFO"),
    ]


def test_worker_becomes_celery_with_the_fleets_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave_environment(tmp_path / ".promptfleet")
    executed: list[list[str]] = []
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "execv", lambda _path, command: executed.append(command))
    ended = run("worker", "--tier", "basic", "--concurrency", "3", "--", "--max-tasks-per-child=1")
    assert ended.exit_code == 0, ended.output
    (command,) = executed
    assert command[-3:] == ["--concurrency", "3", "--max-tasks-per-child=1"]
    assert environment["PROMPTFLEET_BROKER_URL"] == "redis://127.0.0.1:2/0"


def test_flags_of_the_provider_win_over_ours() -> None:
    command = provider_command(LocalProvider.SIMULATED, port=7, flags=("--latency-ms", "0"))
    assert command[-2:] == ["--latency-ms", "0"]


def test_a_missing_local_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = local_model.Availability(reason="the model server is not installed: pip install x")
    monkeypatch.setattr(local_model, "available", lambda: missing)
    with pytest.raises(ConfigurationError, match=r"pip install x; or run with .*simulated"):
        servers.choose_provider(None, Settings())
    assert servers.choose_provider("simulated", Settings()) is LocalProvider.SIMULATED


def test_the_demos_prompts_are_valid_mixed_and_partly_equal() -> None:
    prompts = demo.load_prompts()
    specs = make_specs(prompts, {}, Defaults(tiers=DEFAULT_TIERS))
    assert len(specs) >= 40
    assert {spec.tier for spec in specs} == set(DEFAULT_TIERS)
    assert len({(spec.tier, spec.request) for spec in specs}) < len(specs)


def test_doctor_tells_what_to_do_about_each_failure() -> None:
    settings = Settings.model_validate(
        {
            "database_url": "postgresql://me:hunter2@127.0.0.1:1/d",
            "broker_url": "redis://:hunter2@127.0.0.1:1/0",
        }
    )
    findings = {
        finding.check: finding for finding in doctor.examine(settings, flower="http://127.0.0.1:1")
    }
    for check in ("database", "broker"):
        assert findings[check].level is doctor.Level.FAIL
        assert findings[check].advice
        assert "hunter2" not in findings[check].text
    assert findings["Flower"].level is doctor.Level.WARN
    assert findings["fleet.toml"].level is doctor.Level.WARN


def test_help_documents_the_exit_codes() -> None:
    ended = run("--help")
    assert ended.exit_code == 0
    text = " ".join(ended.stdout.split())
    for code in ("0 all went well", "3 it was done, but some jobs", "130 interrupted"):
        assert code in text


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, fleet: FakeFleet) -> None:
    program = (
        "import signal, os, promptfleet.cli.jobs as jobs\n"
        "def stop(*args, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT); signal.pause()\n"
        "jobs.open_client = stop\n"
        "from promptfleet.cli import main\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "result", NOBODY],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in ended.stderr


def test_a_usage_error_of_typer_ends_with_2() -> None:
    assert run("no-such-command").exit_code == ExitCode.USAGE
