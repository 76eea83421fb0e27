"""Which fleet a command talks to: the environment's, else the one `promptfleet dev` runs here."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit, urlunsplit

import typer

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from promptfleet.client import Client

DEFAULT_DATA_DIR = Path(".promptfleet")
DEFAULT_FLOWER_URL = "http://127.0.0.1:5555"
_ADDRESSES = ("PROMPTFLEET_DATABASE_URL", "PROMPTFLEET_BROKER_URL")

DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="PROMPTFLEET_DATA_DIR",
        help="Where `promptfleet dev` runs; used while no PROMPTFLEET_DATABASE_URL is set.",
        show_default=True,
    ),
]


def running_fleet(data_dir: Path) -> Mapping[str, str]:
    """The variables of the fleet that `promptfleet dev` runs on `data_dir`; nothing without one.

    Raises:
        ConfigurationError: The file is not private to this user, so it can't be trusted.
    """
    from promptfleet.dev_stack.stack import ENVIRONMENT_FILE, read_environment  # noqa: PLC0415

    path = data_dir / ENVIRONMENT_FILE
    if not path.is_file():
        return {}
    facts = path.stat()
    private = not stat.S_IMODE(facts.st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
    if not private or facts.st_uid not in {os.geteuid(), 0}:
        msg = f"{path} is not used: it must belong to you and be readable by nobody else"
        raise ConfigurationError(msg)
    return read_environment(path)


def fleet_environment(data_dir: Path) -> Mapping[str, str]:
    """What our own environment lacks to reach the fleet on `data_dir`.

    Nothing where it names other servers: two fleets are never mixed.

    Raises:
        ConfigurationError: See `running_fleet`.
    """
    found = running_fleet(data_dir)
    if any(os.environ.get(name, found.get(name)) != found.get(name) for name in _ADDRESSES):
        return {}
    return {name: value for name, value in found.items() if name not in os.environ}


def find_settings(data_dir: Path) -> Settings:
    """The settings of the environment, completed by those of a fleet that runs here."""
    found = fleet_environment(data_dir)
    settings = load_settings()
    fields = {name.removeprefix("PROMPTFLEET_").lower(): value for name, value in found.items()}
    return Settings.model_validate(fields) if fields else settings


def open_client(data_dir: Path) -> Client:
    """A client of the fleet."""
    from promptfleet.client import Client  # noqa: PLC0415  # the database's library is slow

    return Client(find_settings(data_dir))


def flower_url(data_dir: Path) -> str:
    """Where Flower should be."""
    name = "PROMPTFLEET_FLOWER_URL"
    found = os.environ.get(name) or fleet_environment(data_dir).get(name)
    return found or DEFAULT_FLOWER_URL


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.password is not None:
            user, host = parts.username or "", parts.netloc.rpartition("@")[2]
            return urlunsplit(parts._replace(netloc=f"{user}:***@{host}"))
    return url
