"""Settings, read once: `PROMPTFLEET_*` for the process, fleet.toml for tiers and models."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.jobs import DEFAULT_TENANT

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """What a process must know; every field is `PROMPTFLEET_<NAME>` in the environment.

    Attributes:
        database_url: Where Postgres is; the truth.
        broker_url: Where Redis or Valkey is; the doorbell.
        cache_url: Where the response cache is; the broker's server when empty.
        config: The path of fleet.toml; ./fleet.toml where there is one, else the defaults.
        tenant: Whose jobs this process submits and reads.
        deadline_s: Seconds until a job without a deadline of its own expires.
        doorbell_window_ms: How long the background ringer collects the ids of concurrent calls.
        lease_s: Seconds that a worker's claim lasts without a heartbeat.
        sweep_interval_s: Seconds between a worker's looks for lost and overdue jobs.
        drain_s: Seconds that a worker's running jobs have to end after SIGTERM.
        log_format: Of a worker's log lines; "auto" is "console" on a terminal, else "json".
        retention_days: Days that ended jobs and their results are kept; 0 keeps them for ever.
    """

    model_config = SettingsConfigDict(env_prefix="PROMPTFLEET_", extra="ignore", frozen=True)

    database_url: SecretStr = SecretStr("postgresql://promptfleet@127.0.0.1:5432/promptfleet")
    broker_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    cache_url: SecretStr = SecretStr("")
    config: Path | None = None
    tenant: str = DEFAULT_TENANT
    deadline_s: Seconds = 86_400.0
    doorbell_window_ms: Annotated[float, Field(ge=0)] = 10.0
    lease_s: Annotated[float, Field(ge=1)] = 45.0
    sweep_interval_s: Seconds = 1.0
    drain_s: Seconds = 25.0
    retention_days: Annotated[float, Field(ge=0)] = 30.0
    database_pool_size: Annotated[int, Field(ge=1)] = 5
    log_format: Literal["auto", "console", "json"] = "auto"
    worker_name: str = ""

    @property
    def cache_server_url(self) -> str:
        """The URL of the server that holds the response cache."""
        return self.cache_url.get_secret_value() or self.broker_url.get_secret_value()

    @property
    def config_path(self) -> Path | None:
        """fleet.toml's path, if there is one to read."""
        if self.config is not None:
            return self.config
        default = Path("fleet.toml")
        return default if default.is_file() else None


def load_settings() -> Settings:
    """The settings of this process.

    Raises:
        ConfigurationError: A variable holds something it can't; names the variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False, include_input=False):
        name = "PROMPTFLEET_" + "_".join(str(part) for part in item["loc"]).upper()
        parts.append(f"{name}: {item['msg']}")
    return "; ".join(parts)


def default_worker_name() -> str:
    """A name for this worker process that no other one has: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"
