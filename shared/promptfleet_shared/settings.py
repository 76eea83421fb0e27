"""Settings, read once: `PROMPTFLEET_*` for the process, fleet.toml for tiers and models."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.jobs import DEFAULT_TENANT

Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65_535)]


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


def _delays(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _schedule(text: str) -> str:
    message = "expected seconds with commas between them, the first of them 0"
    try:
        first, *others = _delays(text)
    except ValueError:
        raise ValueError(message) from None
    if first != 0 or not all(0 <= other < math.inf for other in others):
        raise ValueError(message)
    return text


def _public_url(text: str) -> str:
    if text and not text.startswith(("https://", "http://")):
        message = "expected a URL that begins with https:// or http://"
        raise ValueError(message)
    return text.rstrip("/")


class Settings(BaseSettings):
    """What a process must know; every field is `PROMPTFLEET_<NAME>` in the environment.

    Attributes:
        database_url: Where Postgres is; the truth.
        broker_url: Where Redis or Valkey is; the doorbell.
        cache_url: Where the response cache is; the broker's server when empty.
        config: The path of fleet.toml; ./fleet.toml where there is one, else the defaults.
        tenant: Whose jobs this process submits and reads.
        deadline_s: Seconds until a job without a deadline of its own expires.
        doorbell_window_ms: How long the background ringer collects the ids of concurrent calls; the
            first one after a quiet time is rung at once.
        lease_s: Seconds that a worker's claim lasts without a heartbeat.
        sweep_interval_s: Seconds between a worker's looks for lost and overdue jobs.
        drain_s: Seconds that a worker's running jobs have to end after SIGTERM.
        log_format: Of a worker's log lines; "auto" is "console" on a terminal, else "json".
        watchdog_s: Seconds without a claim, while work waits and slots are free, after which a
            worker exits to be restarted; 0 never does.
        health_host: The address that a worker's health and metrics are served on.
        health_port: Their port; 0 takes any free one, and None (an empty variable) serves nothing.
        health_stale_s: Seconds since its last commit after which a worker is not healthy.
        database_connect_timeout_s: Seconds that a producer may take to connect to Postgres, for
            each of its addresses.
        database_patience_s: Seconds that a producer waits for Postgres' answer to one statement.
        retention_days: Days that ended jobs and their results are kept; 0 keeps them for ever.
        callback_secrets: What callbacks are signed with, `whsec_…`; two while rotating, with a
            comma between them.
        callback_allow_loopback: Lets callbacks go to this very machine; for development.
        callback_schedule_s: Seconds before each attempt to deliver a callback, with commas between
            them, each counted from the attempt before; the first of them is 0.
        callback_timeout_s: Seconds that one attempt may take.
        callback_concurrency: Callbacks that a worker posts at once.
        callback_endpoint_concurrency: Callbacks that the whole fleet posts to one endpoint at once.
        callback_poll_s: Seconds between a worker's looks for callbacks that are due.
        public_url: Where clients reach the fleet's API; callbacks link to results there.
        api_max_body_bytes: Bytes that one request to the API may have; uploads of many jobs and
            of files are not limited by it.
        api_max_line_bytes: Bytes of one job of an upload of many.
        api_body_memory_bytes: Bytes of bodies that an API process holds at once.
        api_max_prompts: Prompts that one request may hold where it takes a list of them.
        api_max_prompt_tokens: Tokens (estimated) of one prompt.
        api_max_submissions: Requests that submit at once, in an API process.
        api_max_uploads: Of those, uploads of many jobs.
        api_max_waiting: Requests that wait for results or stream tokens at once, in an API process.
        api_max_waiting_per_tenant: The same, of one tenant.
        api_max_queued: Jobs of the whole fleet that are not final, beyond which the API accepts no
            more; 0 for any number.
        api_max_queued_per_tenant: The same, of one tenant.
        api_max_file_bytes: Bytes of one uploaded file.
        api_max_stored_bytes_per_tenant: Bytes of all files of one tenant, beyond which no more are
            taken; 0 for any number.
        api_file_days: Days that files of batches are kept where the client does not say; 0 keeps
            them until somebody deletes them.
        api_wait_s: Seconds that a request to one of OpenAI's endpoints waits for its answer, at
            most; then it is told its job's id.
        api_drain_s: Seconds that an API process's requests have to end after SIGTERM.
        api_keep_alive_s: Seconds without an event after which a stream sends a comment.
        api_keyless: Lets the API serve this very machine without a key, as `tenant`.
        operator_tenant: Whose keys with the scope admin manage the keys of all tenants.
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
    watchdog_s: Annotated[float, Field(ge=0)] = 60.0
    health_host: str = "127.0.0.1"
    health_port: Annotated[Port | None, BeforeValidator(_none_if_empty)] = 0
    health_stale_s: Seconds = 60.0
    retention_days: Annotated[float, Field(ge=0)] = 30.0
    database_pool_size: Annotated[int, Field(ge=1)] = 5
    database_connect_timeout_s: Annotated[int, Field(ge=2)] = 5  # 2 is libpq's own least
    database_patience_s: Seconds = 10.0
    log_format: Literal["auto", "console", "json"] = "auto"
    worker_name: str = ""
    callback_secrets: SecretStr = SecretStr("")
    callback_allow_loopback: bool = False
    callback_schedule_s: Annotated[str, AfterValidator(_schedule)] = (
        "0,5,300,1800,7200,18000,36000,36000"
    )
    callback_timeout_s: Annotated[float, Field(gt=0, le=300)] = 15.0
    callback_concurrency: Annotated[int, Field(ge=1)] = 64
    callback_endpoint_concurrency: Annotated[int, Field(ge=1)] = 10
    callback_poll_s: Seconds = 1.0
    public_url: Annotated[str, AfterValidator(_public_url)] = ""
    api_keyless: bool = False
    api_max_body_bytes: Annotated[int, Field(ge=1_024)] = 32 * 1024 * 1024
    api_max_line_bytes: Annotated[int, Field(ge=1_024)] = 8 * 1024 * 1024
    api_body_memory_bytes: Annotated[int, Field(ge=1_024)] = 256 * 1024 * 1024
    api_max_prompts: Annotated[int, Field(ge=1)] = 2_048
    api_max_prompt_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    api_max_submissions: Annotated[int, Field(ge=1)] = 512
    api_max_uploads: Annotated[int, Field(ge=1)] = 16
    api_max_waiting: Annotated[int, Field(ge=1)] = 4_000
    api_max_waiting_per_tenant: Annotated[int, Field(ge=1)] = 2_000
    api_max_queued: Annotated[int, Field(ge=0)] = 2_000_000
    api_max_queued_per_tenant: Annotated[int, Field(ge=0)] = 1_000_000
    api_max_file_bytes: Annotated[int, Field(ge=1_024)] = 200_000_000
    api_max_stored_bytes_per_tenant: Annotated[int, Field(ge=0)] = 20_000_000_000
    api_file_days: Annotated[float, Field(ge=0)] = 30.0
    api_wait_s: Seconds = 600.0
    api_drain_s: Seconds = 25.0
    api_keep_alive_s: Seconds = 15.0
    operator_tenant: str = ""

    @property
    def cache_server_url(self) -> str:
        """The URL of the server that holds the response cache."""
        return self.cache_url.get_secret_value() or self.broker_url.get_secret_value()

    @property
    def callback_delays_s(self) -> tuple[float, ...]:
        """The schedule of callbacks: seconds before each attempt, counted from the one before."""
        return _delays(self.callback_schedule_s)

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
