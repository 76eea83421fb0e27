"""Whose rows a connection may see: the tenant and the role that row-level security goes by.

Both are settings of the session, so they hold on connections to Postgres itself or to a pooler that
pools sessions. A pooler that pools transactions would give a tenant's session to the next client.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from promptfleet_shared.store.row_security import API_ROLE

NO_TENANT = ""
"""Sees no rows: what an unset tenant is."""
_KNOWN = "promptfleet_tenant"

_SET = sa.text("SELECT set_config('promptfleet.tenant', :tenant, :local)")
# Where the role is missing or the login is no member, the first wall stands alone.
_STEP_DOWN = f"""
SELECT set_config('role', rolname, false) FROM pg_roles
 WHERE rolname = '{API_ROLE}' AND pg_has_role(session_user, oid, 'MEMBER')
"""  # noqa: S608 - nothing of a caller's


def set_tenant(connection: sa.Connection, tenant: str) -> None:
    """Let the connection see this tenant's rows, and those of no other.

    Within a transaction this holds until its end. Outside of one it holds until the next call, and
    costs a round trip only where a pooled connection served another tenant before.

    Args:
        connection: Of `promptfleet_api`; for others it changes nothing.
        tenant: `NO_TENANT` hides every row.
    """
    if not _is_autocommit(connection):
        connection.execute(_SET, {"tenant": tenant, "local": True})
        return
    if connection.info.get(_KNOWN) == tenant:
        return
    # Unknown until the answer is there: whoever asks then sets it anew.
    connection.info[_KNOWN] = None
    connection.execute(_SET, {"tenant": tenant, "local": False})
    connection.info[_KNOWN] = tenant


def _is_autocommit(connection: sa.Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    return bool(driver.autocommit)


def step_down(engine: sa.Engine) -> None:
    """Let the engine's new connections act as `promptfleet_api`, where their login may.

    A superuser, an owner or a worker's login would be let through the wall.
    """

    def connected(
        connection: DBAPIConnection,
        record: ConnectionPoolEntry,  # noqa: ARG001  # the event's signature
    ) -> None:
        cursor = connection.cursor()
        try:
            cursor.execute(_STEP_DOWN)
        finally:
            cursor.close()
        connection.commit()

    event.listen(engine, "connect", connected)
