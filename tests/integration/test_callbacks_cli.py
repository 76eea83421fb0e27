"""`promptfleet callbacks …` and what `doctor` says of callbacks, against a real Postgres."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from tests.integration.test_deliveries import HOOK, attempt, claim, finished, record
from typer.testing import CliRunner

from promptfleet.cli import app, doctor
from promptfleet_shared.settings import Settings, load_settings
from promptfleet_shared.signing import new_secret, split_secrets
from promptfleet_shared.store.deliveries import Verdict

Run = Callable[..., Any]


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("PROMPTFLEET_BROKER_URL", settings.broker_url.get_secret_value())
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("PROMPTFLEET_CALLBACK_SECRETS", raising=False)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["callbacks", *arguments])

    return run


def exhaust(database: sa.Engine, count: int, verdict: Verdict = Verdict.EXHAUSTED) -> list[str]:
    finished(database, count, url=HOOK + "?token=hunter2")
    claimed = claim(database)
    record(database, *(attempt(one, verdict, status=500, error="http_500: no") for one in claimed))
    return [str(one.id) for one in claimed]


def test_list_shows_what_became_of_them(run: Run, database: sa.Engine) -> None:
    (gone,) = exhaust(database, 1)
    (job_id,) = finished(database)

    shown = run("list")
    assert shown.exit_code == 0
    assert "http_500: no" in shown.stdout
    assert "hunter2" not in shown.stdout
    listed = json.loads(run("list", "--json").stdout)
    assert [row["state"] for row in listed] == ["pending", "exhausted"]
    assert listed[0]["job_id"] == str(job_id)
    only = json.loads(run("list", "--state", "exhausted", "--json").stdout)
    assert [row["id"] for row in only] == [gone]
    assert json.loads(run("list", "--limit", "1", "--json").stdout) == listed[:1]


def test_list_is_of_ones_own_tenant(
    run: Run, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (theirs,) = exhaust(database, 1)
    monkeypatch.setenv("PROMPTFLEET_TENANT", "acme")
    assert json.loads(run("list", "--json").stdout) == []
    assert run("replay", theirs).exit_code == 1
    assert run("enable", HOOK).exit_code == 1


def test_replay_of_one_by_either_form_of_its_id(run: Run, database: sa.Engine) -> None:
    first, second = exhaust(database, 2)
    assert "1 callback will" in run("replay", first).stdout
    assert run("replay", f"msg_{second.replace('-', '')}").exit_code == 0
    assert {str(one.id) for one in claim(database)} == {first, second}
    busy = run("replay", first)
    assert busy.exit_code == 1
    assert "being delivered just now" in busy.stderr


def test_replay_of_all_exhausted(run: Run, database: sa.Engine) -> None:
    exhaust(database, 3)
    done = run("replay", "--exhausted", "--endpoint", "https://elsewhere.example/", "--json")
    assert json.loads(done.stdout)["replayed"] == 0
    assert "3 callbacks will" in run("replay", "--exhausted", "--endpoint", HOOK).stdout
    assert "0 callbacks will" in run("replay", "--exhausted").stdout


def test_a_disabled_endpoint_is_enabled_first(run: Run, database: sa.Engine) -> None:
    (only,) = exhaust(database, 1, Verdict.DISABLED)
    refused = run("replay", only)
    assert refused.exit_code == 1
    assert "callbacks enable" in refused.stderr
    assert run("enable", HOOK.replace("https://e", "HTTPS://E")).exit_code == 0
    assert run("enable", HOOK).exit_code == 1
    assert run("replay", only).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay",),
        ("replay", "x", "--exhausted"),
        ("replay", "not-an-id"),
        ("replay", "msg_11", "--endpoint", HOOK),
        ("replay", "--exhausted", "--endpoint", "example.com"),
        ("enable", "ftp://example.com"),
        ("list", "--state", "lost"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    ended = run(*arguments)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: ")


def test_what_does_not_exist_ends_with_1(run: Run) -> None:
    ended = run("replay", "msg_" + "0" * 32)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "no such callback" in ended.stderr
    assert "no such callbacks" in run("list").stderr


def test_a_new_secret_can_be_signed_with(run: Run) -> None:
    first, second = run("secret").stdout.strip(), json.loads(run("secret", "--json").stdout)
    assert split_secrets(f"{first},{second['secret']}") == (first, second["secret"])
    assert first != second["secret"]


class TestDoctor:
    def check(self) -> doctor.Finding:
        findings = doctor.examine(load_settings(), flower="http://127.0.0.1:1")
        return next(finding for finding in findings if finding.check == "callbacks")

    def test_no_secret_is_a_failure_only_where_something_waits_for_it(
        self, run: Run, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.check().level is doctor.Level.OK
        finished(database, 2)
        found = self.check()
        assert (found.level, found.text[:11]) == (doctor.Level.FAIL, "2 callbacks")
        assert "PROMPTFLEET_CALLBACK_SECRETS" in found.advice
        monkeypatch.setenv("PROMPTFLEET_CALLBACK_SECRETS", new_secret())
        assert self.check().level is doctor.Level.OK

    def test_a_malformed_secret_is_not_shown(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROMPTFLEET_CALLBACK_SECRETS", "whsec_hunter2")
        found = self.check()
        assert found.level is doctor.Level.FAIL
        assert "hunter2" not in found.text + found.advice

    def test_what_was_given_up_is_told(
        self, run: Run, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROMPTFLEET_CALLBACK_SECRETS", new_secret())
        exhaust(database, 1, Verdict.DISABLED)
        found = self.check()
        assert found.level is doctor.Level.WARN
        assert found.text == "given up: 1; disabled endpoints: 1"
