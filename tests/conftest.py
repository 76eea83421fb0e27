"""Real servers for the whole run, started when the first test asks; a fresh database for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import redis
import sqlalchemy as sa
from pydantic import SecretStr
from tests.databases import one_database

from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate

TEMPLATE = "promptfleet_template"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """Postgres, not durable; the URL is that of its own database, without tables."""
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """Valkey, shared by all tests."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def admin(postgres: EmbeddedPostgres) -> Iterator[sa.Engine]:
    """Makes and drops databases."""
    engine = make_engine(postgres.url, application_name="tests", pool_size=1)
    yield engine.execution_options(isolation_level="AUTOCOMMIT")
    engine.dispose()


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres, admin: sa.Engine) -> str:
    """The name of a migrated database that others are copied from."""
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {TEMPLATE}"))
    engine = make_engine(_database(postgres, TEMPLATE), application_name="tests", pool_size=1)
    migrate(engine)
    engine.dispose()
    return TEMPLATE


@pytest.fixture(scope="module")
def engine(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[sa.Engine]:
    """An engine on one database for the module; its tests are apart by their tenants."""
    with one_database(postgres, admin, template) as url:
        made = make_engine(url, application_name="tests")
        yield made
        made.dispose()


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[str]:
    """A database of this test's own, with the newest tables."""
    name = f"test_{next(_numbers)}"
    with admin.connect() as connection:
        connection.execute(
            sa.text(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        )
    yield _database(postgres, name)
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def database(database_url: str) -> Iterator[sa.Engine]:
    """An engine on this test's database."""
    engine = make_engine(database_url, application_name="tests", pool_size=5)
    yield engine
    engine.dispose()


@pytest.fixture
def broker_url(valkey: EmbeddedValkey) -> str:
    """Valkey with nothing in it."""
    with redis.Redis.from_url(valkey.url) as connection:
        connection.flushall()
    return valkey.url


@pytest.fixture
def settings(database_url: str, broker_url: str) -> Settings:
    """This test's database and broker."""
    return Settings(database_url=SecretStr(database_url), broker_url=SecretStr(broker_url))


def _database(postgres: EmbeddedPostgres, name: str) -> str:
    url = sa.make_url(postgres.url).set(database=name)
    return url.render_as_string(hide_password=False)
