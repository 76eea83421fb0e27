"""The API's composition root: builds the services, and hangs the routers into one app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline

from promptfleet.api import (
    admin,
    conversations,
    costs,
    errors,
    health,
    jobs,
    openapi,
    results,
    streams,
)
from promptfleet.api.auth import Authenticator
from promptfleet.api.batch_runner import BatchRunner
from promptfleet.api.edge import Edge
from promptfleet.api.limits import Limits
from promptfleet.api.metrics import ApiMetrics
from promptfleet.api.openai import batches, completing, files, models, responses
from promptfleet.api.result_hub import ResultHub
from promptfleet.api.services import Services
from promptfleet.api.stores import Stores
from promptfleet.api.stream_hub import StreamHub
from promptfleet.postgres import make_defaults, make_ringer
from promptfleet_shared import __version__
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.settings import Settings, load_settings

# Each part of the API adds its router here, and what it needs of `Services` in `_services`.
_ROUTERS: tuple[APIRouter, ...] = (
    jobs.router,
    streams.router,
    results.router,
    conversations.router,
    costs.router,
    health.router,
    admin.router,
    completing.router,
    models.router,
    responses.router,
    files.router,
    batches.router,
)

_DESCRIPTION = """\
Prompts in, answers out: jobs of a fleet of workers, batched, cached, retried and never lost.

Authenticate with `Authorization: Bearer pf_…`. Every error is `{"error": {"message", "type",
"param", "code"}}`; every response has an `x-request-id`.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API as an ASGI app, to be served or mounted.

    It reads the settings now, and connects once its lifespan begins. Starlette runs no lifespan of
    an app that is mounted: enter `lifespan` in that of your own.

    Args:
        settings: By default those of the environment.

    Raises:
        ConfigurationError: A setting is wrong.
    """
    app = FastAPIOffline(  # its /docs needs no internet
        title="promptfleet",
        version=__version__,
        summary="A fleet of workers for LLM prompts",
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.settings = settings or load_settings()
    app.state.metrics = ApiMetrics()
    app.add_middleware(Edge, metrics=app.state.metrics)
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    openapi.install(app)
    return app


@contextlib.asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    """Connect the API, and give all back at the end.

    A server does this by itself; whoever mounts the API does it in the lifespan of the outer app:

        @contextlib.asynccontextmanager
        async def my_lifespan(app):
            async with promptfleet.api.lifespan(api):
                yield

    Args:
        api: From `create_app`.

    Raises:
        ConfigurationError: A URL or fleet.toml is wrong.
    """
    async with _services(api.state.settings, api.state.metrics) as services:
        api.state.services = services
        runner = BatchRunner(services)
        runner.start()
        try:
            yield
        finally:
            await runner.close()
            del api.state.services


@contextlib.asynccontextmanager
async def _services(settings: Settings, metrics: ApiMetrics) -> AsyncIterator[Services]:
    """Everything a process needs, closed in the opposite order."""
    fleet = load_fleet(settings.config_path)
    async with contextlib.AsyncExitStack() as closing:
        ringer = make_ringer(settings, fleet)
        closing.push_async_callback(asyncio.to_thread, ringer.close)
        stores = Stores(settings, bell=ringer)
        closing.push_async_callback(stores.close)
        auth = Authenticator(stores, settings)
        closing.push_async_callback(auth.close)
        hub = ResultHub(stores, settings.cache_server_url)
        closing.push_async_callback(hub.aclose)
        stream_hub = StreamHub(settings.cache_server_url, stores=stores, results=hub)
        closing.push_async_callback(stream_hub.aclose)
        yield Services(
            settings=settings,
            fleet=fleet,
            stores=stores,
            ringer=ringer,
            auth=auth,
            results=hub,
            streams=stream_hub,
            limits=Limits(settings, stores, metrics),
            metrics=metrics,
            defaults=make_defaults(settings, fleet),
        )
