"""The wall between tenants, which Postgres keeps whatever a statement says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from pydantic import SecretStr
from sqlalchemy import event
from sqlalchemy.exc import ProgrammingError
from tests.rows import chat, claim_one, insert, job_row, outcome, spec
from typer.testing import CliRunner
from uuid_utils.compat import uuid7

from promptfleet.api.stores import Stores
from promptfleet.cli import app
from promptfleet.dev_stack import EmbeddedPostgres
from promptfleet_shared.errors import IdempotencyConflictError, StoreRefusedError
from promptfleet_shared.jobs import Doorbell, JobState
from promptfleet_shared.settings import Settings
from promptfleet_shared.store import migrating, row_security
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.keys import create_key, find_key, key_digest, list_keys
from promptfleet_shared.store.results import read_results, request_cancel, states
from promptfleet_shared.store.row_security import WALLED_TABLES, Wall, raise_wall
from promptfleet_shared.store.tables import metadata
from promptfleet_shared.store.tenancy import NO_TENANT, set_tenant

PAGE = Path(__file__).parents[2] / "docs/howto/separate-database-roles.md"
LOGINS = ("fleet_api", "fleet_worker", "fleet_migrate")
PASSWORD = "a-password-of-tests"
OURS, THEIRS = "acme", "globex"
API_GRANTS = row_security._GRANTS["promptfleet_api"]


class Bells:
    """Keeps what was rung for."""

    def __init__(self) -> None:
        self.rung: list[Doorbell] = []

    def ring(self, doorbells: Any) -> None:
        self.rung += doorbells

    def close(self) -> None: ...


class Site:
    """A database of three login roles, made with the statements of the documentation."""

    def __init__(self, postgres: EmbeddedPostgres, name: str) -> None:
        self.url = sa.make_url(postgres.url).set(database=name)
        self.engines: dict[str, sa.Engine] = {}

    def url_of(self, login: str) -> str:
        url = self.url.set(username=login, password=PASSWORD)
        return url.render_as_string(hide_password=False)

    def engine(self, login: str) -> sa.Engine:
        if login not in self.engines:
            self.engines[login] = make_engine(
                self.url_of(login), application_name="tests", pool_size=2
            )
        return self.engines[login]

    @contextlib.contextmanager
    def as_api(self, tenant: str | None) -> Iterator[sa.Connection]:
        with self.engine("fleet_api").begin() as connection:
            if tenant is not None:
                set_tenant(connection, tenant)
            yield connection


def documented_sql() -> list[str]:
    """The statements of the page, one by one."""
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    text = re.sub(r"--.*", "", blocks[0])
    return [statement.strip() for statement in text.split(";") if statement.strip()]


@pytest.fixture(scope="module")
def site(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[Site]:
    """Three logins and a database with rows of two tenants in every table."""
    name = f"walled_{uuid.uuid4().hex[:8]}"
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    found = Site(postgres, name)
    superuser = make_engine(found.url.render_as_string(hide_password=False), application_name="t")
    with superuser.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in documented_sql():
            with (
                contextlib.suppress(ProgrammingError)
                if _makes_a_group(statement)
                else contextlib.nullcontext()
            ):
                connection.execute(sa.text(statement.replace("change-me", PASSWORD)))
    superuser.dispose()
    try:
        assert migrating.migrate(found.engine("fleet_migrate")).gap is None
        fill(found.engine("fleet_migrate"))
        yield found
    finally:
        for engine in found.engines.values():
            engine.dispose()
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
            for login in LOGINS:
                connection.execute(sa.text(f"DROP ROLE IF EXISTS {login}"))


def _makes_a_group(statement: str) -> bool:
    """The migrations of the other tests' databases have made these, in the same cluster."""
    return re.match(r"CREATE ROLE promptfleet_\w+ NOLOGIN", statement) is not None


def fill(engine: sa.Engine) -> None:
    """A row of each tenant in every table."""
    with engine.begin() as connection:
        for tenant in (OURS, THEIRS):
            set_tenant(connection, tenant)
            for table in WALLED_TABLES:
                connection.execute(metadata.tables[table].insert().values(row_of(table, tenant)))


def row_of(table: str, tenant: str) -> dict[str, Any]:
    """A row that the table takes."""
    now = sa.text("clock_timestamp()")
    known = {
        "id": uuid7(),
        "tier": "basic",
        "request": {},
        "deadline": now,
        "sweep_at": now,
        "job_id": uuid7(),
        "state": "succeeded" if table == "results" else "queued",
        "created_at": now,
        "url": "https://example.com/hook",
        "event": "prompt.succeeded",
        "endpoint": "https://example.com/hook",
        "prefix": "abcdefgh",
        "digest": uuid7().bytes * 2,
        "scopes": ["read"],
        "purpose": "batch",
        "filename": "in.jsonl",
        "n": 0,
        "data": b"{}",
        "input_file_id": uuid7(),
        "expires_at": now,
        "custom_id": "line-1",
        "batch_id": uuid7(),
        "memory_id": "chat-1",
        "messages": [],
        "bytes": 2,
        "deployment": "main",
        "kind": "chat",
        "model": "gpt-4o-mini",
        "fence": 1,
        "name": "tenant:acme:requests_per_day",
        "pieces": {},
        "seen_us": 0,
    }
    columns = metadata.tables[table].columns
    needed = [c.name for c in columns if not c.nullable and c.server_default is None]
    row = {name: known[name] for name in needed if name in known}
    if table in {"ledger", "callbacks"}:
        row.pop("id", None)
        row.pop("endpoint", None)
        row["job_id"] = known["job_id"]
    if table == "callbacks":
        row["job_id"] = known["job_id"]
    if table == "file_chunks":
        row["file_id"] = (
            sa.select(metadata.tables["files"].c.id)
            .where(metadata.tables["files"].c.tenant == tenant)
            .limit(1)
            .scalar_subquery()
        )
    return {**row, "tenant": tenant}


def tenants_in(connection: sa.Connection, table: str) -> list[str]:
    query = sa.text(f"SELECT DISTINCT tenant FROM {table} ORDER BY tenant")
    return list(connection.execute(query).scalars())


class TestWall:
    def test_every_table_with_a_tenant_is_behind_it(self, site: Site) -> None:
        with_tenant = {name for name, table in metadata.tables.items() if "tenant" in table.c}
        assert with_tenant == set(WALLED_TABLES) == set(metadata.tables)

        with site.engine("fleet_migrate").connect() as connection:
            query = "SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"
            forced = set(connection.execute(sa.text(query)).scalars())
        assert forced >= with_tenant

    @pytest.mark.parametrize("table", WALLED_TABLES)
    def test_the_api_sees_its_tenant_alone(self, site: Site, table: str) -> None:
        for tenant, seen in ((OURS, [OURS]), (THEIRS, [THEIRS]), (NO_TENANT, []), (None, [])):
            with site.as_api(tenant) as connection:
                assert tenants_in(connection, table) == seen

    def test_nobody_else_calls_what_acts_as_the_owner(self, site: Site) -> None:
        query = sa.text("""
            SELECT proname, has_function_privilege('public', oid, 'EXECUTE'),
                   has_function_privilege('promptfleet_api', oid, 'EXECUTE')
              FROM pg_proc WHERE prosecdef AND pronamespace = current_schema()::regnamespace""")
        with site.as_api(OURS) as connection:
            rights = {name: rest for name, *rest in connection.execute(query)}
        assert set(rights) >= {"promptfleet_backlog", "promptfleet_claim_batches"}
        assert all(rest == [False, True] for rest in rights.values())

    @pytest.mark.parametrize("table", WALLED_TABLES)
    def test_the_api_writes_for_its_tenant_alone(self, site: Site, table: str) -> None:
        refused = "row-level security|permission denied"
        with pytest.raises(ProgrammingError, match=refused), site.as_api(OURS) as connection:
            connection.execute(metadata.tables[table].insert().values(row_of(table, THEIRS)))
        with pytest.raises(ProgrammingError, match=refused), site.as_api(None) as connection:
            connection.execute(metadata.tables[table].insert().values(row_of(table, OURS)))

    @pytest.mark.parametrize(
        "table",
        [t for t in WALLED_TABLES if "UPDATE" in row_security._GRANTS["promptfleet_api"][t]],
    )
    def test_the_api_changes_its_tenants_rows_alone(self, site: Site, table: str) -> None:
        with site.as_api(OURS) as connection:
            changed = connection.execute(
                sa.text(f"UPDATE {table} SET tenant = tenant RETURNING tenant")
            )
            assert set(changed.scalars()) == {OURS}
            connection.rollback()
        given = sa.text(f"UPDATE {table} SET tenant = :tenant")
        with (
            pytest.raises(ProgrammingError, match="row-level security"),
            site.as_api(OURS) as connection,
        ):
            connection.execute(given, {"tenant": THEIRS})

    @pytest.mark.parametrize(
        "table",
        [t for t in WALLED_TABLES if "DELETE" in row_security._GRANTS["promptfleet_api"][t]],
    )
    def test_the_api_deletes_its_tenants_rows_alone(self, site: Site, table: str) -> None:
        with site.as_api(OURS) as connection:
            where = " WHERE tenant = :tenant"
            theirs = connection.execute(sa.text(f"DELETE FROM {table}{where}"), {"tenant": THEIRS})
            assert theirs.rowcount == 0
            gone = connection.execute(sa.text(f"DELETE FROM {table} RETURNING tenant"))
            assert set(gone.scalars()) == {OURS}
            connection.rollback()

    @pytest.mark.parametrize("table", WALLED_TABLES)
    def test_the_others_see_all(self, site: Site, table: str) -> None:
        for login in ("fleet_worker", "fleet_migrate"):
            with site.engine(login).connect() as connection:
                if (login, table) == ("fleet_worker", "api_keys"):
                    with pytest.raises(ProgrammingError, match="permission denied"):
                        tenants_in(connection, table)
                else:
                    assert tenants_in(connection, table) == [OURS, THEIRS]

    def test_a_key_is_found_by_whoever_has_it(self, site: Site) -> None:
        with site.as_api(THEIRS) as connection:
            made = create_key(connection, tenant=THEIRS, scopes=["read"])
            digest = key_digest(made.secret)
            assert digest is not None

        with site.as_api(NO_TENANT) as connection:
            assert list_keys(connection, tenant=THEIRS) == []
            found = find_key(connection, digest)
            assert found is not None
            assert (found.id, found.tenant) == (made.key.id, THEIRS)
            seen = connection.execute(sa.text("SELECT id FROM api_keys")).scalars().all()
            assert seen == [made.key.id]  # that key, and no other of the tenant
        with site.as_api(OURS) as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM api_keys")).scalar_one() == 1
            connection.execute(sa.text(f"SET LOCAL promptfleet.key = '{digest.hex()}'"))
            changed = connection.execute(
                sa.text("UPDATE api_keys SET scopes = '{admin}' WHERE id = :id"),
                {"id": made.key.id},
            )
            assert changed.rowcount == 0


class TestRaisingIt:
    def test_is_done_once(self, site: Site) -> None:
        done: list[str] = []
        engine = site.engine("fleet_migrate")

        def note(*arguments: Any) -> None:
            done.append(arguments[2])

        event.listen(engine, "before_cursor_execute", note)
        try:
            assert migrating.migrate(engine).is_current
        finally:
            event.remove(engine, "before_cursor_execute", note)
        changes = [s for s in done if re.match(r"\s*(CREATE|ALTER|GRANT)", s)]
        assert done
        assert changes == []

    def test_waits_for_roles_that_the_login_may_not_make(
        self, empty_for: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(row_security, "ROLES", ("no_such_role", "promptfleet_api"))
        engine = empty_for("plain_owner", "")

        gap = migrating.migrate(engine).gap

        assert gap == "this login may not make the roles no_such_role"
        assert_goes_on_without(engine)

    def test_waits_where_it_would_shut_the_owner_out(
        self, empty_for: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = empty_for("plain_owner", "")
        url = engine.url.render_as_string(hide_password=False)
        monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", url)

        told = CliRunner().invoke(app, ["migrate"])
        as_json = CliRunner().invoke(app, ["migrate", "--json"])

        gap = "plain_owner owns tables and is no member of promptfleet_migrator"
        assert told.exit_code == 0
        assert gap in told.stderr
        assert PAGE.name in told.stderr
        assert json.loads(as_json.stdout)["tenants_walled"] is False
        assert_goes_on_without(engine)

    def test_makes_the_roles_and_lets_their_maker_through(
        self, empty_for: Any, admin: sa.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A login that may make roles, as the master users of hosted databases can."""
        names = {name: f"{name}_of_test" for name in row_security.ROLES}
        monkeypatch.setattr(row_security, "ROLES", tuple(names.values()))
        for constant in ("API_ROLE", "WORKER_ROLE", "MIGRATOR_ROLE"):
            monkeypatch.setattr(row_security, constant, names[getattr(row_security, constant)])
        grants = {names[role]: tables for role, tables in row_security._GRANTS.items()}
        monkeypatch.setattr(row_security, "_GRANTS", grants)
        engine = empty_for("role_maker", "CREATEROLE")
        try:
            assert migrating.migrate(engine).gap is None

            ids = insert(engine, spec(tenant=OURS), spec(tenant=THEIRS))
            claimed = claim_one(engine, ids[0])
            with engine.begin() as connection:
                assert finish(connection, [outcome(claimed)]) == {ids[0]}
            with engine.begin() as connection:
                connection.execute(sa.text("SET LOCAL ROLE promptfleet_api_of_test"))
                assert tenants_in(connection, "jobs") == []
                set_tenant(connection, THEIRS)
                assert tenants_in(connection, "jobs") == [THEIRS]
        finally:
            with engine.begin() as connection:
                for role in names.values():
                    connection.execute(sa.text(f"DROP OWNED BY {role}"))
            with admin.connect() as connection:
                for role in names.values():
                    connection.execute(sa.text(f"DROP ROLE {role}"))

    def test_comes_down_and_up_again_with_rows_behind_it(self, empty_for: Any) -> None:
        engine = empty_for("superuser_of_test", "SUPERUSER")
        migrating.migrate(engine)
        (id_,) = insert(engine, spec(tenant=OURS))
        claimed = claim_one(engine, id_)
        with engine.begin() as connection:
            finish(connection, [outcome(claimed, text="kept")])

        with engine.begin() as connection:
            config = migrating._config()
            config.attributes["connection"] = connection
            command.downgrade(config, "0002")
        with engine.begin() as connection:
            connection.execute(sa.text("SET LOCAL ROLE promptfleet_api"))
            assert tenants_in(connection, "jobs") == [OURS]  # no wall
            text = "SELECT text FROM results"
            assert connection.execute(sa.text(text)).scalar_one() == "kept"

        assert migrating.migrate(engine).gap is None
        with engine.begin() as connection:
            assert read_results(connection, [id_], tenant=OURS)[id_].text == "kept"
            connection.execute(sa.text("SET LOCAL ROLE promptfleet_api"))
            assert tenants_in(connection, "jobs") == []

    @pytest.fixture
    def empty_for(self, postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Any:
        """Makes a login, and an empty database that belongs to it."""
        closing = contextlib.ExitStack()
        name = f"owned_{uuid.uuid4().hex[:8]}"

        def make(login: str, attributes: str) -> sa.Engine:
            with admin.connect() as connection:
                connection.execute(
                    sa.text(f"CREATE ROLE {login} LOGIN {attributes} PASSWORD '{PASSWORD}'")
                )
                connection.execute(sa.text(f"CREATE DATABASE {name} OWNER {login}"))
            url = sa.make_url(postgres.url).set(database=name, username=login, password=PASSWORD)
            engine = make_engine(url.render_as_string(hide_password=False), application_name="t")
            closing.callback(drop, login)
            closing.callback(engine.dispose)
            return engine

        def drop(login: str) -> None:
            with admin.connect() as connection:
                connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
                connection.execute(sa.text(f"DROP ROLE {login}"))

        with closing:
            yield make


def assert_goes_on_without(engine: sa.Engine) -> None:
    """All works as before, and nothing is half done."""
    (id_,) = insert(engine, spec())
    assert job_row(engine, id_)["state"] == "queued"
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_class WHERE relrowsecurity OR relforcerowsecurity"
        assert connection.execute(sa.text(query)).scalar_one() == 0
        assert connection.execute(sa.text("SELECT count(*) FROM pg_policy")).scalar_one() == 0
        assert not raise_wall(connection).stands
    assert Wall().gap is None


class TestStores:
    """What the API does, as its own login and as a superuser that steps down."""

    @pytest.fixture(params=["fleet_api", "superuser"])
    async def stores(self, request: pytest.FixtureRequest, site: Site) -> Any:
        url = (
            site.url.render_as_string(hide_password=False)
            if request.param == "superuser"
            else site.url_of(request.param)
        )
        self.bells = Bells()
        made = Stores(Settings(database_url=SecretStr(url)), bell=self.bells, pool_size=1)
        yield made
        await made.close()

    async def test_submit_read_and_cancel(self, stores: Stores) -> None:
        spec_ = spec(tenant=OURS, idempotency_key=uuid.uuid4().hex)
        (id_,) = await stores.submit(OURS, [spec_])
        again = spec(tenant=OURS, idempotency_key=spec_.idempotency_key)
        assert await stores.submit(OURS, [again]) == [id_]
        assert [bell.job_id for bell in self.bells.rung] == [id_]

        def state(tenant: str) -> Any:
            return lambda connection: states(connection, [id_], tenant=tenant)

        assert await stores.run(OURS, state(OURS)) == {id_: JobState.QUEUED}
        assert await stores.run(THEIRS, state(OURS)) == {}  # a statement that went astray
        cancel = lambda connection: request_cancel(connection, [id_], tenant=OURS)  # noqa: E731
        assert await stores.run(THEIRS, cancel) == set()
        assert await stores.run(OURS, cancel) == {id_}
        read = lambda connection: read_results(connection, [id_], tenant=OURS)  # noqa: E731
        assert (await stores.run_whole(OURS, read))[id_].state is JobState.CANCELLED
        assert await stores.run_whole(THEIRS, read) == {}

    async def test_many_jobs_are_all_or_none(self, stores: Stores) -> None:
        key = uuid.uuid4().hex
        await stores.submit(OURS, [spec(tenant=OURS, idempotency_key=key)])
        others = [spec(tenant=OURS) for _ in range(3)]
        conflicting = spec(tenant=OURS, idempotency_key=key, request=chat("another"))

        with pytest.raises(IdempotencyConflictError):
            await stores.submit(OURS, [*others, conflicting])

        ids = [other.id for other in others]
        assert await stores.run(OURS, lambda c: states(c, ids, tenant=OURS)) == {}
        assert await stores.submit(OURS, others) == ids
        assert await stores.submit(OURS, others) == ids  # as after a lost reply
        assert await stores.submit(OURS, []) == []

    async def test_take_no_jobs_of_others(self, stores: Stores) -> None:
        with pytest.raises(ValueError, match="another tenant"):
            await stores.submit(OURS, [spec(tenant=OURS), spec(tenant=THEIRS)])

    async def test_a_connection_serves_one_tenant_after_another(self, stores: Stores) -> None:
        """The pool has one connection, and the statement names no tenant."""

        def seen(connection: sa.Connection) -> set[str]:
            return set(tenants_in(connection, "callbacks"))

        def fails(connection: sa.Connection) -> None:
            connection.execute(sa.text("SELECT 1 / 0"))

        choose = random.Random(4).choice
        for _ in range(300):
            run, tenant = choose([stores.run, stores.run_whole]), choose([OURS, THEIRS])
            match choose(["seen", "seen", "fails", "admin"]):
                case "seen":
                    assert await run(tenant, seen) == {tenant}
                case "fails":
                    with pytest.raises(StoreRefusedError):
                        await run(tenant, fails)
                case _:
                    assert await stores.admin(seen) == set()

    async def test_a_tenant_that_could_not_be_set_is_set_again(self, stores: Stores) -> None:
        def seen(connection: sa.Connection) -> set[str]:
            return set(tenants_in(connection, "callbacks"))

        def fail(*arguments: Any) -> None:
            raise RuntimeError

        assert await stores.run(OURS, seen) == {OURS}
        engine = stores._engine.sync_engine
        event.listen(engine, "before_cursor_execute", fail)
        with pytest.raises(RuntimeError):
            await stores.run(THEIRS, seen)
        event.remove(engine, "before_cursor_execute", fail)
        assert await stores.run(THEIRS, seen) == {THEIRS}

    async def test_one_who_leaves_midway_leaves_no_tenant_behind(self, stores: Stores) -> None:
        def seen(connection: sa.Connection) -> set[str]:
            return set(tenants_in(connection, "callbacks"))

        for run in (stores.run, stores.run_whole):
            assert await stores.run(OURS, seen) == {OURS}
            # Cancelled at each of its turns of the loop in turn.
            for turns in range(12):
                task = asyncio.create_task(run(THEIRS, seen))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert await stores.run(OURS, seen) == {OURS}

    async def test_the_same_tenant_again_costs_no_round_trip(self, stores: Stores) -> None:
        sent: list[str] = []

        def note(*arguments: Any) -> None:
            sent.append(arguments[2])

        engine = stores._engine.sync_engine
        one = lambda connection: connection.execute(sa.text("SELECT 1")).scalar_one()  # noqa: E731
        await stores.run(OURS, one)
        event.listen(engine, "before_cursor_execute", note)
        for _ in range(3):
            await stores.run(OURS, one)
        assert sent == ["SELECT 1"] * 3
        await stores.run(THEIRS, one)
        assert len(sent) == 5


def test_claims_stay_in_place(database: sa.Engine) -> None:
    """No index knows a column that a claim changes: Postgres writes the row's new version beside
    the old one, and no index."""
    ids = insert(database, *(spec(batch_id=uuid7(), stream=True) for _ in range(20)))
    updates = """
    SELECT pg_stat_get_xact_tuples_updated('jobs'::regclass) AS updated,
           pg_stat_get_xact_tuples_hot_updated('jobs'::regclass) AS in_place
    """
    from promptfleet_shared.store.claims import claim

    with database.begin() as connection:
        claimed = claim(connection, ids, worker="w", lease_s=45)
        counts = connection.execute(sa.text(updates)).one()

    assert all(job.stream for job in claimed)
    assert tuple(counts) == (20, 20)
