"""Alembic's entry: runs the migrations on the connection that `migrating` hands over."""

from __future__ import annotations

from alembic import context

from promptfleet_shared.store.tables import metadata


def run() -> None:
    """Migrate within the caller's transaction."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()


run()
