"""The API's way to the database: whatever it runs, it runs for one tenant, behind two walls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from promptfleet.backends import Bell
from promptfleet.postgres import AsyncPostgresBackend, plain_errors
from promptfleet_shared.jobs import JobSpec
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.database import Statement
from promptfleet_shared.store.engines import make_async_engine
from promptfleet_shared.store.tenancy import NO_TENANT, set_tenant, step_down

T = TypeVar("T")

APPLICATION_NAME = "promptfleet-api"


class Stores:
    """Runs statements of `promptfleet_shared.store` for tenants, on one pool of connections.

    Each statement carries its tenant; the second wall is that its connection sees the rows of that
    tenant only, whatever the statement says. A connection is held while a statement runs, and by
    nobody who waits.
    """

    def __init__(self, settings: Settings, *, bell: Bell, pool_size: int | None = None) -> None:
        """Connect at first use.

        Args:
            settings: Of the process.
            bell: Rings for what is submitted; it stays the caller's to close.
            pool_size: Connections at most; by default what the settings say.

        Raises:
            ConfigurationError: The database's URL or fleet.toml is wrong.
        """
        self._engine = make_async_engine(
            settings.database_url.get_secret_value(),
            application_name=APPLICATION_NAME,
            pool_size=pool_size or settings.database_pool_size,
            connect_timeout_s=settings.database_connect_timeout_s,
            patience_s=settings.database_patience_s,
        )
        step_down(self._engine.sync_engine)
        # One statement needs no BEGIN and COMMIT: one round trip instead of three.
        self._single = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._jobs = AsyncPostgresBackend(
            settings, engine=self._engine, bell=bell, prepare=set_tenant
        )

    async def run(self, tenant: str, statement: Statement[T]) -> T:
        """Run one statement for a tenant and commit it.

        Raises:
            StoreUnavailableError: The database can't be reached, was lost on the way, or has no
                room for it now.
            StoreRefusedError: It did not take the statement.
            ConfigurationError: It has no tables.
        """
        return await self._run(self._single, tenant, statement)

    async def run_whole(self, tenant: str, statements: Statement[T]) -> T:
        """Run several statements for a tenant in one transaction; errors as for `run`.

        Between two of them the server waits for this process: let it not wait for long.
        """
        return await self._run(self._engine, tenant, statements)

    async def admin(self, statements: Statement[T]) -> T:
        """Run, in one transaction, what belongs to no tenant; errors as for `run`.

        No tenant's rows are seen. What needs the rows of all of them is a worker's to do.
        """
        return await self._run(self._engine, NO_TENANT, statements)

    async def submit(self, tenant: str, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
        """Accept a tenant's jobs, all or none, and ring for them.

        What a producer is promised holds here, too: a lost reply is settled by a repeat, and a
        broker that is away delays the jobs.

        Returns:
            The id of each spec's job: its own, or the one accepted earlier under its key.

        Raises:
            IdempotencyConflictError: A key was used with another request.
            StoreUnavailableError: Nothing was accepted, unless `unknown_outcome`.
        """
        if any(spec.tenant != tenant for spec in specs):
            msg = "a job of another tenant"
            raise ValueError(msg)
        return await self._jobs.submit(specs) if specs else []

    async def close(self) -> None:
        """Give the connections back."""
        await self._engine.dispose()

    async def _run(self, engine: AsyncEngine, tenant: str, work: Statement[T]) -> T:
        def prepared(connection: sa.Connection) -> T:
            set_tenant(connection, tenant)
            return work(connection)

        with plain_errors():
            async with engine.begin() as connection:
                return await connection.run_sync(prepared)
