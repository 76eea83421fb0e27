"""Jobs in Postgres, doorbells through the broker: what clients use outside of tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine

from promptfleet.backends import Bell, Lookup, doorbells
from promptfleet.requests import Defaults
from promptfleet.resubmission import Resubmission
from promptfleet.transactions import CommitBells, async_connection, sync_connection
from promptfleet_shared.errors import (
    ConfigurationError,
    StoreRefusedError,
    StoreUnavailableError,
)
from promptfleet_shared.fleet import Fleet, load_fleet
from promptfleet_shared.jobs import Conversation, Doorbell, JobSpec
from promptfleet_shared.parking import ParkingLot
from promptfleet_shared.queueing import Ringer, make_celery, publish
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.conversations import delete_conversation, read_conversation
from promptfleet_shared.store.engines import make_async_engine, make_engine, store_errors
from promptfleet_shared.store.failures import sqlstate_of
from promptfleet_shared.store.results import read_results, request_cancel, states
from promptfleet_shared.store.submissions import give_up_soon, insert_jobs

if TYPE_CHECKING:
    from promptfleet.backends import AsyncTokenSource, TokenSource
    from promptfleet.token_sources import AsyncTokenSources, TokenSources

T = TypeVar("T")
E = TypeVar("E", sa.Engine, AsyncEngine)

APPLICATION_NAME = "promptfleet"
ROWS_A_STATEMENT = 1_000
IDS_A_STATEMENT = 1_000
_UNDEFINED_TABLE = "42P01"


class _Servers(Generic[E]):
    """What both backends stand on: an engine, a bell, and what fleet.toml tells.

    Attributes:
        defaults: What holds for a job that says nothing.
    """

    def __init__(
        self, settings: Settings, engine: E | None, bell: Bell | None, make: Callable[..., E]
    ) -> None:
        fleet = load_fleet(settings.config_path)
        self.defaults = make_defaults(settings, fleet)
        self._bell = bell or make_ringer(settings, fleet)
        self._streams_url = settings.cache_server_url
        self._own_engine = engine is None
        self._engine: E = engine or make(
            settings.database_url.get_secret_value(),
            application_name=APPLICATION_NAME,
            pool_size=settings.database_pool_size,
            connect_timeout_s=settings.database_connect_timeout_s,
            patience_s=settings.database_patience_s,
        )
        # One statement needs no BEGIN and COMMIT: one round trip instead of three.
        self._single: E = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._commit_bells = _commit_bells(self._bell, settings.tenant)
        if self._own_engine:
            made = self._engine
            _forget_connections_after_fork(
                made if isinstance(made, sa.Engine) else made.sync_engine
            )


class PostgresBackend(_Servers[sa.Engine]):
    """Jobs in Postgres for synchronous callers."""

    def __init__(
        self,
        settings: Settings,
        *,
        engine: sa.Engine | None = None,
        bell: Bell | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Connect to nothing yet.

        Args:
            settings: Of the process.
            engine: The caller's own; by default one is made, and closed by `close`.
            bell: By default a `Ringer` on the broker.
            sleep: Waits so many seconds before a repeat.

        Raises:
            ConfigurationError: A URL or fleet.toml is wrong.
        """
        super().__init__(settings, engine, bell, make_engine)
        self._sleep = sleep
        self._tokens: TokenSources | None = None

    def submit(self, specs: Sequence[JobSpec], session: object | None = None) -> list[uuid.UUID]:
        """See `Backend`."""
        if session is not None:
            with plain_errors():
                connection = sync_connection(session)
                ids = _insert_within(connection, specs)
            self._commit_bells.add(connection, doorbells(specs, ids))
            return ids
        tries = Resubmission()
        with plain_errors(tries):
            ids = self._insert(specs, tries)
        self._bell.ring(doorbells(specs, ids))
        return ids

    def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        """See `Backend`."""
        return self._run(lambda c: _look_up(c, ids, self.defaults.tenant, with_states=with_states))

    def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """See `Backend`."""
        return self._run(lambda c: request_cancel(c, ids, tenant=self.defaults.tenant))

    def token_source(self, job_id: uuid.UUID) -> contextlib.AbstractContextManager[TokenSource]:
        """See `Backend`."""
        if self._tokens is None:
            # Here, since only who reads tokens needs what it imports.
            from promptfleet.token_sources import TokenSources  # noqa: PLC0415

            self._tokens = TokenSources(self._streams_url)
        return self._tokens.of(job_id)

    def conversation(self, memory_id: str) -> Conversation | None:
        """See `Backend`."""
        return self._run(lambda c: read_conversation(c, memory_id, tenant=self.defaults.tenant))

    def forget(self, memory_id: str) -> bool:
        """See `Backend`."""
        with plain_errors():
            return _in_transaction(
                self._engine,
                lambda c: delete_conversation(c, memory_id, tenant=self.defaults.tenant),
            )

    def close(self) -> None:
        """See `Backend`."""
        self._bell.close()
        if self._tokens is not None:
            self._tokens.close()
        if self._own_engine:
            self._engine.dispose()

    def _insert(self, specs: Sequence[JobSpec], tries: Resubmission) -> list[uuid.UUID]:
        single = _is_single_statement(specs)
        engine, insert = (self._single, _insert) if single else (self._engine, _insert_whole)
        while True:
            try:
                return _in_transaction(engine, lambda connection: insert(connection, specs))
            except exc.SQLAlchemyError as error:
                pause_s = tries.pause_s(error)
                if pause_s is None:
                    raise
            self._sleep(pause_s)

    def _run(self, work: Callable[[sa.Connection], T]) -> T:
        """Run what may be repeated; once more where a pooled connection had gone stale."""
        with plain_errors():
            try:
                return _in_transaction(self._single, work)
            except exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            return _in_transaction(self._single, work)


class AsyncPostgresBackend(_Servers[AsyncEngine]):
    """Jobs in Postgres for asynchronous callers, of one event loop after the other."""

    def __init__(
        self,
        settings: Settings,
        *,
        engine: AsyncEngine | None = None,
        bell: Bell | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        prepare: Callable[[sa.Connection, str], None] | None = None,
    ) -> None:
        """Connect to nothing yet; the parameters are those of `PostgresBackend`, and one more.

        Args:
            settings: Of the process.
            engine: The caller's own; by default one is made, and closed by `close`.
            bell: By default a `Ringer` on the broker.
            sleep: Waits so many seconds before a repeat.
            prepare: Given each connection before jobs are inserted on it, and their tenant.
        """
        super().__init__(settings, engine, bell, make_async_engine)
        self._sleep = sleep
        self._prepare = prepare
        self._tokens: AsyncTokenSources | None = None
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None

    async def submit(
        self, specs: Sequence[JobSpec], session: object | None = None
    ) -> list[uuid.UUID]:
        """See `Backend`."""
        if session is not None:
            return await self._submit_within(specs, session)
        tries = Resubmission()
        with plain_errors(tries):
            ids = await self._insert(specs, tries)
        self._bell.ring(doorbells(specs, ids))
        return ids

    async def look_up(self, ids: Sequence[uuid.UUID], *, with_states: bool) -> Lookup:
        """See `Backend`."""
        tenant = self.defaults.tenant
        return await self._run(lambda c: _look_up(c, ids, tenant, with_states=with_states))

    async def cancel(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """See `Backend`."""
        return await self._run(lambda c: request_cancel(c, ids, tenant=self.defaults.tenant))

    def token_source(
        self, job_id: uuid.UUID
    ) -> contextlib.AbstractContextManager[AsyncTokenSource]:
        """See `Backend`."""
        self._leave_former_loop()
        if self._tokens is None:
            from promptfleet.token_sources import AsyncTokenSources  # noqa: PLC0415  # as above

            self._tokens = AsyncTokenSources(self._streams_url)
        return self._tokens.of(job_id)

    async def conversation(self, memory_id: str) -> Conversation | None:
        """See `Backend`."""
        tenant = self.defaults.tenant
        return await self._run(lambda c: read_conversation(c, memory_id, tenant=tenant))

    async def forget(self, memory_id: str) -> bool:
        """See `Backend`."""
        tenant = self.defaults.tenant
        with plain_errors():
            return await self._in_transaction(
                self._engine, lambda c: delete_conversation(c, memory_id, tenant=tenant)
            )

    async def close(self) -> None:
        """See `Backend`."""
        self._leave_former_loop()
        if self._tokens is not None:
            await self._tokens.close()
        await asyncio.to_thread(self._bell.close)
        if self._own_engine:
            await self._engine.dispose()

    async def _submit_within(self, specs: Sequence[JobSpec], session: object) -> list[uuid.UUID]:
        with plain_errors():
            connection = await async_connection(session)
            ids = await connection.run_sync(_insert_within, specs)
        await connection.run_sync(self._commit_bells.add, doorbells(specs, ids))
        return ids

    async def _insert(self, specs: Sequence[JobSpec], tries: Resubmission) -> list[uuid.UUID]:
        single = _is_single_statement(specs)
        engine, insert = (self._single, _insert) if single else (self._engine, _insert_whole)

        def work(connection: sa.Connection) -> list[uuid.UUID]:
            if self._prepare is not None and specs:
                self._prepare(connection, specs[0].tenant)
            return insert(connection, specs)

        while True:
            try:
                return await self._in_transaction(engine, work)
            except exc.SQLAlchemyError as error:
                pause_s = tries.pause_s(error)
                if pause_s is None:
                    raise
            await self._sleep(pause_s)

    async def _run(self, work: Callable[[sa.Connection], T]) -> T:
        with plain_errors():
            try:
                return await self._in_transaction(self._single, work)
            except exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            return await self._in_transaction(self._single, work)

    async def _in_transaction(self, engine: AsyncEngine, work: Callable[[sa.Connection], T]) -> T:
        self._leave_former_loop()
        async with engine.begin() as connection:
            return await connection.run_sync(work)

    def _leave_former_loop(self) -> None:
        """Connections belong to the loop that opened them: a new one starts without any."""
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop() is not loop:
            if self._loop is not None and self._own_engine:
                self._engine.sync_engine.dispose(close=False)
            self._tokens = None
            self._loop = weakref.ref(loop)


def make_defaults(settings: Settings, fleet: Fleet) -> Defaults:
    """What holds for a job that says nothing."""
    return Defaults(
        tenant=settings.tenant,
        deadline_s=settings.deadline_s,
        tier=fleet.default_tier,
        tiers=fleet.tier_names if settings.config_path is not None else None,
        models=tuple(fleet.models) or None,
        callback_allow_loopback=settings.callback_allow_loopback,
        chooser=fleet.tier_chooser() if settings.config_path is not None else None,
    )


def make_ringer(settings: Settings, fleet: Fleet) -> Ringer:
    """What rings for jobs in the background; connects with the first one."""
    app = make_celery(settings.broker_url.get_secret_value(), fleet.tier_names)
    deliver = ParkingLot().deliver if fleet.fairness.enabled else publish
    return Ringer(app, window_s=settings.doorbell_window_ms / 1000, deliver=deliver)


@contextlib.contextmanager
def plain_errors(tries: Resubmission | None = None) -> Iterator[None]:
    """Turn the database's errors into our own, without URL, statement or parameters."""
    try:
        with store_errors():
            yield
    except StoreUnavailableError as error:
        if tries is None:
            raise
        raise tries.told(error) from error.__cause__
    except exc.DBAPIError as error:
        sqlstate = sqlstate_of(error)
        if sqlstate == _UNDEFINED_TABLE:
            msg = "the database has none of promptfleet's tables; run `promptfleet migrate`"
            raise ConfigurationError(msg) from None
        # Without the cause: its text may hold the statement's parameters, prompts among them.
        msg = f"the database refused a statement ({type(error.orig).__name__})"
        raise StoreRefusedError(msg, sqlstate=sqlstate) from None


def _in_transaction(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _is_single_statement(specs: Sequence[JobSpec]) -> bool:
    """True if the insert needs no transaction to be all or nothing."""
    if len(specs) <= 1:
        return True
    return len(specs) <= ROWS_A_STATEMENT and all(s.idempotency_key is None for s in specs)


def _insert(connection: sa.Connection, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
    ids: list[uuid.UUID] = []
    for start in range(0, len(specs), ROWS_A_STATEMENT):
        ids += insert_jobs(connection, specs[start : start + ROWS_A_STATEMENT])
    return ids


def _insert_within(connection: sa.Connection, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
    """Insert in the caller's transaction, all or none of the jobs."""
    if _is_single_statement(specs):
        return _insert(connection, specs)
    with connection.begin_nested():
        return _insert(connection, specs)


def _insert_whole(connection: sa.Connection, specs: Sequence[JobSpec]) -> list[uuid.UUID]:
    """Insert in several statements of one transaction of our own."""
    give_up_soon(connection)
    return _insert(connection, specs)


def _look_up(
    connection: sa.Connection, ids: Sequence[uuid.UUID], tenant: str, *, with_states: bool
) -> Lookup:
    found = Lookup(results={}, states={})
    for start in range(0, len(ids), IDS_A_STATEMENT):
        some = ids[start : start + IDS_A_STATEMENT]
        # States first: a job that ends in between has its result by then.
        known = states(connection, some, tenant=tenant) if with_states else {}
        results = read_results(connection, some, tenant=tenant)
        found.results.update(results)
        found.states.update({id_: known[id_] for id_ in known.keys() - results.keys()})
    return found


def _commit_bells(bell: Bell, tenant: str) -> CommitBells:
    def existing(connection: sa.Connection, waiting: Sequence[Doorbell]) -> list[Doorbell]:
        there = states(connection, [bell.job_id for bell in waiting], tenant=tenant)
        return [bell for bell in waiting if bell.job_id in there]

    return CommitBells(bell.ring, existing)


_engines: weakref.WeakSet[sa.Engine] = weakref.WeakSet()


def _forget_connections_after_fork(engine: sa.Engine) -> None:
    """A child of this process must not speak on the parent's sockets."""
    if not _engines and hasattr(os, "register_at_fork"):
        _register_fork_hook()
    _engines.add(engine)


def _register_fork_hook() -> None:
    global _fork_hook_registered  # noqa: PLW0603  # hooks can't be taken back
    if not _fork_hook_registered:
        os.register_at_fork(after_in_child=_in_child)
        _fork_hook_registered = True


_fork_hook_registered = False


def _in_child() -> None:
    for engine in list(_engines):
        engine.dispose(close=False)
