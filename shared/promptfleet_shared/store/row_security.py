"""The second wall between tenants: Postgres itself hides the rows of all others.

Every statement names its tenant; that is the first wall. The second one holds where a statement
forgets to: row-level security, forced on every table that has a tenant.

| Role                 | Sees                                                            |
|----------------------|-----------------------------------------------------------------|
| promptfleet_api      | the rows of the tenant in `promptfleet.tenant`; none where unset |
| promptfleet_worker   | all rows, except API keys                                       |
| promptfleet_migrator | all rows                                                        |

They are groups: login roles are members of them. A superuser is beyond any wall, which is why the
API steps down to `promptfleet_api` where it may; see `tenancy`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sqlalchemy as sa

API_ROLE = "promptfleet_api"
WORKER_ROLE = "promptfleet_worker"
MIGRATOR_ROLE = "promptfleet_migrator"
ROLES = (API_ROLE, WORKER_ROLE, MIGRATOR_ROLE)

TENANT_POLICY = "promptfleet_tenant"
FLEET_POLICY = "promptfleet_fleet"
KEY_POLICY = "promptfleet_key"

_ALL = ("SELECT", "INSERT", "UPDATE", "DELETE")
_GRANTS: dict[str, dict[str, tuple[str, ...]]] = {
    API_ROLE: {
        "jobs": _ALL,
        "results": ("SELECT", "INSERT", "DELETE"),  # who cancels a queued job writes its result
        "ledger": ("SELECT",),
        "callbacks": _ALL,
        "callback_endpoints": ("SELECT", "UPDATE", "DELETE"),
        "api_keys": ("SELECT", "INSERT", "UPDATE"),
        "files": _ALL,
        "file_chunks": _ALL,
        "batches": _ALL,
        "batch_lines": _ALL,
        "provider_batches": ("SELECT",),
        "provider_batch_lines": ("SELECT",),
        "conversations": ("SELECT", "DELETE"),
        "conversation_turns": ("SELECT", "DELETE"),
        "limit_windows": ("SELECT",),
        "alembic_version": ("SELECT",),
    },
    WORKER_ROLE: {
        "jobs": _ALL,
        "results": _ALL,
        "ledger": _ALL,
        "callbacks": _ALL,
        "callback_endpoints": _ALL,
        "files": _ALL,
        "file_chunks": _ALL,
        "batches": _ALL,
        "batch_lines": _ALL,
        "provider_batches": _ALL,
        "provider_batch_lines": _ALL,
        "conversations": _ALL,
        "conversation_turns": _ALL,
        "limit_windows": _ALL,
        "alembic_version": ("SELECT",),
    },
}

# They act as the tables' owner, who is let through the wall: nobody else may call them.
_FUNCTIONS = (
    "promptfleet_backlog(bigint)",
    "promptfleet_claim_batches(text, double precision, integer)",
)

WALLED_TABLES = tuple(name for name in _GRANTS[API_ROLE] if name != "alembic_version")
"""Every table with a tenant."""

_OF_TENANT = "tenant = current_setting('promptfleet.tenant', true)"
# Who presents a key is not known before it is found: whoever has its digest may see its row.
_OF_KEY = "digest = decode(current_setting('promptfleet.key', true), 'hex')"

# In a race with another database's migrator, the loser waits and then finds the role there. A
# login that makes the roles itself is given them: it goes on seeing all that it saw before.
_MAKE_ROLE = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
        CREATE ROLE {role} NOLOGIN;
        IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            GRANT {role} TO CURRENT_USER;
        END IF;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
END $$
"""

_MISSING_ROLES = sa.text("""
SELECT role FROM unnest(CAST(:roles AS text[])) WITH ORDINALITY AS r (role, number)
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) ORDER BY number
""")

# Owners are behind a wall that is forced: whoever owns a table must be let through it first.
_SHUT_OUT = sa.text("""
SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class
 WHERE oid = ANY(CAST(:tables AS regclass[])) AND NOT pg_has_role(relowner, :migrator, 'USAGE')
   AND NOT pg_has_role(relowner, :worker, 'USAGE') ORDER BY 1
""")

_STATE = sa.text("""
SELECT relname, relrowsecurity AND relforcerowsecurity AS forced,
       (SELECT array_agg(polname::text) FROM pg_policy WHERE polrelid = pg_class.oid) AS policies
  FROM pg_class WHERE oid = ANY(CAST(:tables AS regclass[]))
""")

_NOT_GRANTED = sa.text("""
SELECT role, name, privilege
  FROM unnest(CAST(:roles AS text[]), CAST(:names AS text[]), CAST(:privileges AS text[]))
       AS g (role, name, privilege)
 WHERE NOT has_table_privilege(role, name, privilege)
""")

_FUNCTION_RIGHTS = sa.text("""
SELECT name, has_function_privilege('public', name, 'EXECUTE') AS open,
       has_function_privilege(:role, name, 'EXECUTE') AS granted
  FROM unnest(CAST(:names AS text[])) AS f (name)
""")

_HIDDEN_SCHEMA = sa.text("""
SELECT quote_ident(current_schema()) AS name, role FROM unnest(CAST(:roles AS text[])) AS r (role)
 WHERE NOT has_schema_privilege(role, current_schema(), 'USAGE')
""")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wall:
    """Whether the second wall stands.

    Attributes:
        missing_roles: Those of the three roles that are not there, and could not be made.
        shut_out: Owners of tables who would see nothing behind the wall.
        open_tables: Tables with a tenant whose row-level security is not forced.
    """

    missing_roles: tuple[str, ...] = ()
    shut_out: tuple[str, ...] = ()
    open_tables: tuple[str, ...] = ()

    @property
    def stands(self) -> bool:
        """True if every table with a tenant is behind it."""
        return not self.missing_roles and not self.shut_out and not self.open_tables

    @property
    def gap(self) -> str | None:
        """Why it does not stand, and what to do; None if it does."""
        if self.missing_roles:
            return f"this login may not make the roles {', '.join(self.missing_roles)}"
        if self.shut_out:
            return f"{', '.join(self.shut_out)} owns tables and is no member of {MIGRATOR_ROLE}"
        if self.open_tables:
            return f"row-level security is not forced on {', '.join(self.open_tables)}"
        return None


def raise_wall(connection: sa.Connection) -> Wall:
    """Make the roles where this login may, then force row-level security on every table.

    May be repeated: what is there already is not touched, and no table is locked for it. Where a
    role is missing or an owner would be shut out, nothing is changed: see the answer. The caller
    commits.
    """
    for role in ROLES:
        connection.execute(sa.text(_MAKE_ROLE.format(role=role)))
    wall = inspect_wall(connection)
    if wall.missing_roles or wall.shut_out:
        return wall
    for statement in (
        *_missing_walls(connection),
        *_missing_grants(connection),
        *_missing_function_rights(connection),
    ):
        connection.execute(sa.text(statement))
    return Wall()


def inspect_wall(connection: sa.Connection) -> Wall:
    """Whether the wall stands; changes nothing."""
    missing = tuple(connection.execute(_MISSING_ROLES, {"roles": list(ROLES)}).scalars())
    if missing:
        return Wall(missing_roles=missing)
    tables = {"tables": list(WALLED_TABLES)}
    owners = {**tables, "migrator": MIGRATOR_ROLE, "worker": WORKER_ROLE}
    shut_out = tuple(connection.execute(_SHUT_OUT, owners).scalars())
    states = connection.execute(_STATE, tables)
    return Wall(shut_out=shut_out, open_tables=tuple(row[0] for row in states if not row.forced))


def _missing_walls(connection: sa.Connection) -> Iterator[str]:
    for table, forced, policies in connection.execute(_STATE, {"tables": list(WALLED_TABLES)}):
        for policy, definition in _policies(table).items():
            if policy not in (policies or ()):
                yield f"CREATE POLICY {policy} ON {table} {definition}"
        if not forced:
            yield f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"


def _policies(table: str) -> dict[str, str]:
    everything = "USING (true) WITH CHECK (true)"
    fleet = MIGRATOR_ROLE if table == "api_keys" else f"{WORKER_ROLE}, {MIGRATOR_ROLE}"
    found = {
        TENANT_POLICY: f"TO {API_ROLE} USING ({_OF_TENANT}) WITH CHECK ({_OF_TENANT})",
        FLEET_POLICY: f"TO {fleet} {everything}",
    }
    if table == "api_keys":
        found[KEY_POLICY] = f"FOR SELECT TO {API_ROLE} USING ({_OF_KEY})"
    return found


def _missing_grants(connection: sa.Connection) -> Iterator[str]:
    wanted = [
        (role, table, privilege)
        for role, tables in _GRANTS.items()
        for table, privileges in tables.items()
        for privilege in privileges
    ]
    roles, names, privileges = (list(column) for column in zip(*wanted, strict=True))
    parameters = {"roles": roles, "names": names, "privileges": privileges}
    for role, table, privilege in connection.execute(_NOT_GRANTED, parameters):
        yield f"GRANT {privilege} ON {table} TO {role}"
    for schema, role in connection.execute(_HIDDEN_SCHEMA, {"roles": [API_ROLE, WORKER_ROLE]}):
        yield f"GRANT USAGE ON SCHEMA {schema} TO {role}"


def _missing_function_rights(connection: sa.Connection) -> Iterator[str]:
    parameters = {"names": list(_FUNCTIONS), "role": API_ROLE}
    for name, is_open, granted in connection.execute(_FUNCTION_RIGHTS, parameters):
        if is_open:
            yield f"REVOKE EXECUTE ON FUNCTION {name} FROM PUBLIC"
        if is_open or not granted:
            yield f"GRANT EXECUTE ON FUNCTION {name} TO {API_ROLE}, {MIGRATOR_ROLE}"
