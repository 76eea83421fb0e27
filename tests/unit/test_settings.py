"""Settings from the environment, and what is said of wrong ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.settings import Settings, default_worker_name, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PROMPTFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults_are_complete() -> None:
    settings = load_settings()

    assert settings.tenant == "default"
    assert settings.lease_s == 45
    assert settings.config_path is None
    assert settings.health_port == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TENANT", "acme", "acme"),
        ("LEASE_S", "3", 3.0),
        ("SWEEP_INTERVAL_S", "0.3", 0.3),
        ("RETENTION_DAYS", "0", 0.0),
        ("DOORBELL_WINDOW_MS", "0", 0.0),
        ("DATABASE_POOL_SIZE", "9", 9),
        ("WATCHDOG_S", "0", 0.0),
        ("HEALTH_HOST", "0.0.0.0", "0.0.0.0"),
        ("HEALTH_PORT", "9470", 9470),
        ("HEALTH_PORT", "0", 0),
        ("HEALTH_PORT", "", None),
        ("HEALTH_STALE_S", "90", 90.0),
        ("LOG_FORMAT", "json", "json"),
        ("CONFIG", "/etc/fleet.toml", Path("/etc/fleet.toml")),
    ],
)
def test_every_setting_is_a_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: object
) -> None:
    monkeypatch.setenv(f"PROMPTFLEET_{name}", value)

    assert getattr(load_settings(), name.lower()) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_S", "0.5"),
        ("LEASE_S", "soon"),
        ("SWEEP_INTERVAL_S", "0"),
        ("DRAIN_S", "-1"),
        ("DATABASE_POOL_SIZE", "0"),
        ("WATCHDOG_S", "-1"),
        ("HEALTH_PORT", "65536"),
        ("HEALTH_PORT", "none"),
        ("HEALTH_STALE_S", "0"),
        ("LOG_FORMAT", "xml"),
        ("RETENTION_DAYS", "-1"),
    ],
)
def test_a_wrong_value_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PROMPTFLEET_{name}", value)

    with pytest.raises(ConfigurationError, match=f"PROMPTFLEET_{name}: "):
        load_settings()


def test_all_mistakes_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_LEASE_S", "x")
    monkeypatch.setenv("PROMPTFLEET_DRAIN_S", "y")

    with pytest.raises(ConfigurationError, match=r"PROMPTFLEET_LEASE_S.*; PROMPTFLEET_DRAIN_S"):
        load_settings()


def test_passwords_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("PROMPTFLEET_BROKER_URL", "redis://:hunter2@h")

    settings = load_settings()

    assert "hunter2" not in f"{settings!r} {settings}"
    assert settings.database_url.get_secret_value() == "postgresql://u:hunter2@h/d"


def test_a_mistake_does_not_tell_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_LEASE_S", "hunter2")

    with pytest.raises(ConfigurationError) as caught:
        load_settings()

    assert "hunter2" not in str(caught.value)


def test_the_cache_is_on_the_brokers_server_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_BROKER_URL", "redis://broker")
    assert load_settings().cache_server_url == "redis://broker"

    monkeypatch.setenv("PROMPTFLEET_CACHE_URL", "redis://cache")
    assert load_settings().cache_server_url == "redis://cache"


def test_a_fleet_toml_in_the_working_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text("")

    assert Settings().config_path == Path("fleet.toml")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(Settings(), "tenant", "other")  # noqa: B010 - the checkers know that it is frozen


def test_a_workers_name_tells_where_it_runs() -> None:
    assert default_worker_name().endswith(f":{os.getpid()}")
