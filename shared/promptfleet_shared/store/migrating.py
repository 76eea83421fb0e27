"""Bring a database to the newest schema; safe to run from many processes at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from promptfleet_shared.store.row_security import raise_wall

# Any number that is ours: two migrators at once would both try to create the same tables.
_LOCK = sa.text("SELECT pg_advisory_xact_lock(7046811921)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchemaVersion:
    """The database's revision (None: no tables) and the newest that this release knows.

    Attributes:
        gap: After a migration: why tenants are not walled off from each other by Postgres, too.
    """

    current: str | None
    newest: str
    gap: str | None = None

    @property
    def is_current(self) -> bool:
        """True if nothing is left to migrate."""
        return self.current == self.newest


def migrate(engine: sa.Engine) -> SchemaVersion:
    """Run every outstanding migration in one transaction, or none of them.

    Then raise the walls between tenants, where this login may; see `row_security`.
    """
    with engine.begin() as connection:
        connection.execute(_LOCK)
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        wall = raise_wall(connection)
        return dataclasses.replace(_version(connection), gap=wall.gap)


def schema_version(connection: sa.Connection) -> SchemaVersion:
    """Where the database stands."""
    return _version(connection)


def _version(connection: sa.Connection) -> SchemaVersion:
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    if newest is None:  # pragma: no cover - the package ships migrations
        msg = "no migrations were installed"
        raise RuntimeError(msg)
    current = MigrationContext.configure(connection).get_current_revision()
    return SchemaVersion(current=current, newest=newest)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config
