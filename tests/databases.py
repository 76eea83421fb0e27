"""One database for all tests of a module, emptied after each: cheaper than one for each."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from promptfleet.dev_stack import EmbeddedPostgres
from promptfleet_shared.store.engines import make_engine


@contextmanager
def one_database(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[str]:
    """The URL of a copy of the template."""
    name = f"module_{uuid.uuid4().hex[:8]}"
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    url = sa.make_url(postgres.url).set(database=name)
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def emptied(url: str, *tables: str) -> Iterator[str]:
    """The URL; afterwards, these tables are empty again."""
    yield url
    engine = make_engine(url, application_name="tests", pool_size=1)
    with engine.begin() as connection:
        for table in tables:
            connection.execute(sa.text(f"DELETE FROM {table}"))
    engine.dispose()
