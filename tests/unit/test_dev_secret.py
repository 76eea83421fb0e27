"""The secret of a development fleet: made once, private, and found by its processes."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
from rich.console import Console

from promptfleet.dev_stack.stack import SECRET_FILE, Addresses, DevStack, StackOptions
from promptfleet_shared.signing import split_secrets


def stack(directory: Path) -> DevStack:
    return DevStack(StackOptions(data_dir=directory), console=Console(file=io.StringIO()))


def test_it_is_made_once_and_kept_private(tmp_path: Path) -> None:
    made = stack(tmp_path)._secret()
    assert split_secrets(made) == (made,)
    assert stack(tmp_path)._secret() == made
    assert stat.S_IMODE((tmp_path / SECRET_FILE).stat().st_mode) == 0o600


def test_processes_find_it_and_may_post_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTFLEET_CALLBACK_ALLOW_LOOPBACK", raising=False)
    addresses = Addresses(
        database_url="postgresql://",
        broker_url="redis://",
        config=Path("fleet.toml"),
        provider_url=None,
        flower_url=None,
        api_url=None,
        callback_secrets="whsec_x",
    )
    found = addresses.environment()
    assert found["PROMPTFLEET_CALLBACK_SECRETS"] == "whsec_x"
    assert found["PROMPTFLEET_CALLBACK_ALLOW_LOOPBACK"] == "true"
    assert "whsec_x" not in repr(addresses)
    monkeypatch.setenv("PROMPTFLEET_CALLBACK_ALLOW_LOOPBACK", "false")
    assert addresses.environment()["PROMPTFLEET_CALLBACK_ALLOW_LOOPBACK"] == "false"
