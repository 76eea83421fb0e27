"""The command that serves the HTTP API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, fleet_environment
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.settings import load_settings

APP = "promptfleet.api.app:create_app"
PORT = 8000
KEEP_ALIVE_S = 75
"""Seconds that an idle connection is kept: longer than the proxies in front keep theirs."""
WORKER_PATIENCE_S = 30
"""A worker process that does not answer for so long is replaced; on a busy machine, starting one
takes longer than the five seconds that are usual."""
BACKLOG = 2_048


def api(
    *,
    host: Annotated[
        str, typer.Option(envvar="PROMPTFLEET_API_HOST", help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            envvar="PROMPTFLEET_API_PORT", min=0, max=65_535, help="0 takes any free one."
        ),
    ] = PORT,
    workers: Annotated[
        int, typer.Option(envvar="PROMPTFLEET_API_WORKERS", min=1, help="Processes that answer.")
    ] = 1,
    root_path: Annotated[
        str, typer.Option(help="The path that a proxy in front takes away, e.g. /llm.")
    ] = "",
    log_level: Annotated[str, typer.Option(help="DEBUG (a line a request) to ERROR.")] = "INFO",
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Serve the HTTP API; SIGTERM lets running requests end."""
    require_api()
    # Here, since it is an extra.
    import uvicorn  # noqa: PLC0415

    from promptfleet.api.logs import log_config  # noqa: PLC0415

    os.environ.update(fleet_environment(data_dir))
    settings = load_settings()
    load_fleet(settings.config_path)  # what is wrong is told here, in one line
    uvicorn.run(
        APP,
        factory=True,
        host=host,
        port=port,
        workers=workers,
        root_path=root_path,
        http="httptools",
        loop="auto",
        ws="none",
        access_log=False,  # a query may hold a tenant's metadata
        server_header=False,
        log_config=log_config(settings.log_format, log_level),
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_worker_healthcheck=WORKER_PATIENCE_S,
        timeout_graceful_shutdown=max(1, round(settings.api_drain_s)),
    )


def require_api() -> None:
    """Refuse where the API's packages are not installed.

    Raises:
        ConfigurationError: Says what to install.
    """
    if not has_api():
        raise ConfigurationError(
            "The API's packages are not installed: pip install 'promptfleet[api]'"
        )


def has_api() -> bool:
    """True where the API's packages are installed."""
    needed = ("fastapi", "uvicorn", "httptools", "prometheus_client", "multipart")
    return all(find_spec(name) is not None for name in needed)
