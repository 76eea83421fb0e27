"""API keys: who may do what for which tenant. The table knows a key's SHA-256, and no key.

A key is 256 random bits, so a plain digest is as good as the slow ones that passwords need: there
is nothing to guess.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import hashlib
import re
import secrets
import uuid
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from uuid_utils.compat import uuid7

from promptfleet_shared.errors import InvalidRequestError

MARK = "pf_"
"""What every key begins with, so that scanners of leaked secrets know one."""
PREFIX_LENGTH = 8
"""Characters after `pf_` that are shown, and by which people name a key."""
MAX_NAME_LENGTH = 200
MAX_LIFETIME_S = 100 * 366 * 86_400.0
_KEY = re.compile(r"pf_[A-Za-z0-9_-]{43}")


class Scope(enum.StrEnum):
    """What a key may be used for."""

    SUBMIT = "submit"  # jobs, files, batches; cancel them
    READ = "read"  # what became of them
    ADMIN = "admin"  # keys


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key as people see it.

    Attributes:
        prefix: The first characters after `pf_`.
        expires_at: None for one that lasts until it is revoked.
        last_used_at: To a minute or two.
        usable: Whether it opened anything at the time of the query.
    """

    id: uuid.UUID
    tenant: str
    name: str
    prefix: str
    scopes: frozenset[Scope]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None
    usable: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewKey:
    """A key that was just made, and the only time that it is seen."""

    key: Key
    secret: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KnownKey:
    """What a presented key opens.

    Attributes:
        remaining_s: Seconds until it expires; None if never.
    """

    id: uuid.UUID
    tenant: str
    scopes: frozenset[Scope]
    digest: bytes = dataclasses.field(repr=False)
    remaining_s: float | None


_COLUMNS = """id, tenant, name, prefix, scopes, created_at, expires_at, revoked_at, last_used_at,
       revoked_at IS NULL AND coalesce(expires_at > clock_timestamp(), true) AS usable"""

_CREATE = sa.text(f"""
INSERT INTO api_keys (id, tenant, name, prefix, digest, scopes, expires_at)
VALUES (:id, :tenant, :name, :prefix, :digest, CAST(:scopes AS text[]),
        clock_timestamp() + CAST(:expires_in_s AS float8) * interval '1 second')
RETURNING {_COLUMNS}
""")  # noqa: S608 - nothing of a caller's

_LIST = sa.text(f"""
SELECT {_COLUMNS} FROM api_keys WHERE tenant = :tenant ORDER BY id DESC
""")  # noqa: S608 - nothing of a caller's

_REVOKE = sa.text(f"""
UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp())
 WHERE tenant = :tenant AND id = :id RETURNING {_COLUMNS}
""")  # noqa: S608 - nothing of a caller's

# The new key lives as long as the old one was meant to. Who rotates twice does not make the old
# one last longer.
_ROTATE = sa.text(f"""
WITH old AS (
    UPDATE api_keys SET expires_at = least(expires_at,
               clock_timestamp() + :overlap_s * interval '1 second')
      FROM (SELECT id AS old_id, expires_at - created_at AS lifetime FROM api_keys
             WHERE tenant = :tenant AND id = :id AND revoked_at IS NULL
               AND coalesce(expires_at > clock_timestamp(), true) FOR UPDATE) AS before
     WHERE id = old_id
    RETURNING tenant, name, scopes, lifetime
)
INSERT INTO api_keys (id, tenant, name, prefix, digest, scopes, expires_at)
SELECT :new_id, tenant, name, :prefix, :digest, scopes, clock_timestamp() + lifetime FROM old
RETURNING {_COLUMNS}
""")  # noqa: S608 - nothing of a caller's

# Its tenant is what we are about to learn: the digest itself is what opens the wall. See
# `row_security`.
_PRESENT = sa.text("SELECT set_config('promptfleet.key', :digest, true)")
_FIND = sa.text("""
SELECT id, tenant, scopes, digest,
       extract(epoch FROM expires_at - clock_timestamp())::float8 AS remaining_s
  FROM api_keys
 WHERE digest = :digest AND revoked_at IS NULL
   AND coalesce(expires_at > clock_timestamp(), true)
""")

_USED = sa.text("""
UPDATE api_keys SET last_used_at = clock_timestamp()
 WHERE tenant = :tenant AND id = ANY(:ids)
   AND coalesce(last_used_at < clock_timestamp() - interval '30 seconds', true)
""")


def key_digest(secret: str) -> bytes | None:
    """The SHA-256 of a key; None for what can't be one."""
    if _KEY.fullmatch(secret) is None:
        return None
    return hashlib.sha256(secret.encode("ascii")).digest()


def create_key(
    connection: sa.Connection,
    *,
    tenant: str,
    scopes: Collection[str],
    name: str = "",
    expires_in_s: float | None = None,
) -> NewKey:
    """Make a key; the caller commits, here and below.

    Args:
        connection: In a transaction.
        tenant: Whose jobs it opens.
        scopes: What it may do.
        name: For people.
        expires_in_s: Seconds that it lasts; None for one that lasts until it is revoked.

    Raises:
        InvalidRequestError: A scope or the lifetime can't be.
    """
    parameters = {
        "tenant": check_tenant(tenant),
        "scopes": _checked_scopes(scopes),
        "name": _checked_name(name),
        "expires_in_s": None if expires_in_s is None else _checked_lifetime(expires_in_s),
    }
    secret, fresh = _fresh()
    row = connection.execute(_CREATE, {"id": uuid7(), **fresh, **parameters}).mappings().one()
    return NewKey(key=_key(row), secret=secret)


def list_keys(connection: sa.Connection, *, tenant: str) -> list[Key]:
    """A tenant's keys, the newest first, those that open nothing any more among them."""
    return [_key(row) for row in connection.execute(_LIST, {"tenant": tenant}).mappings()]


def revoke_key(connection: sa.Connection, key_id: uuid.UUID, *, tenant: str) -> Key | None:
    """Let a key open nothing any more; None if the tenant has no such key."""
    parameters = {"tenant": tenant, "id": key_id}
    row = connection.execute(_REVOKE, parameters).mappings().one_or_none()
    return None if row is None else _key(row)


def rotate_key(
    connection: sa.Connection, key_id: uuid.UUID, *, tenant: str, overlap_s: float
) -> NewKey | None:
    """Make a key like another one, which then lasts for `overlap_s` seconds more, or less.

    Returns:
        The new one; None if the tenant has no such key, or it is revoked or expired.

    Raises:
        InvalidRequestError: The overlap can't be.
    """
    if not 0 <= overlap_s <= MAX_LIFETIME_S:
        msg = f"overlap: must be from 0 to {MAX_LIFETIME_S:.0f} seconds"
        raise InvalidRequestError(msg, field="overlap")
    secret, fresh = _fresh()
    parameters = {"id": key_id, "new_id": uuid7(), "tenant": tenant, "overlap_s": overlap_s}
    row = connection.execute(_ROTATE, {**fresh, **parameters}).mappings().one_or_none()
    return None if row is None else NewKey(key=_key(row), secret=secret)


def find_key(connection: sa.Connection, digest: bytes) -> KnownKey | None:
    """What the key with this digest opens now; None if it opens nothing.

    Two statements, so the connection must be in a transaction.
    """
    connection.execute(_PRESENT, {"digest": digest.hex()})
    row = connection.execute(_FIND, {"digest": digest}).one_or_none()
    if row is None or not secrets.compare_digest(bytes(row.digest), digest):
        return None
    return KnownKey(
        id=row.id,
        tenant=row.tenant,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        digest=digest,
        remaining_s=row.remaining_s,
    )


def note_used(connection: sa.Connection, key_ids: Collection[uuid.UUID], *, tenant: str) -> None:
    """Write down that these keys were used just now."""
    connection.execute(_USED, {"tenant": tenant, "ids": sorted(key_ids)})


def check_tenant(tenant: str) -> str:
    """The tenant's name, if it can be one.

    Raises:
        InvalidRequestError: It is empty or long, or has a NUL in it.
    """
    if not 0 < len(tenant) <= MAX_NAME_LENGTH or "\0" in tenant:
        msg = f"tenant: must have from 1 to {MAX_NAME_LENGTH} characters, and no NUL"
        raise InvalidRequestError(msg, field="tenant")
    return tenant


def _fresh() -> tuple[str, dict[str, Any]]:
    random = secrets.token_urlsafe(32)
    secret = MARK + random
    return secret, {"prefix": random[:PREFIX_LENGTH], "digest": key_digest(secret)}


def _checked_scopes(scopes: Collection[str]) -> list[str]:
    unknown = sorted(set(scopes) - {*Scope})
    if unknown or not scopes:
        named = ", ".join(repr(scope) for scope in unknown) or "nothing"
        msg = f"scopes: must be some of {', '.join(Scope)}, not {named[:100]}"
        raise InvalidRequestError(msg, field="scopes")
    return [scope for scope in Scope if scope in scopes]


def _checked_name(name: str) -> str:
    if len(name) > MAX_NAME_LENGTH or "\0" in name:
        msg = f"name: must have {MAX_NAME_LENGTH} characters at most, and no NUL"
        raise InvalidRequestError(msg, field="name")
    return name


def _checked_lifetime(seconds: float) -> float:
    if not 0 < seconds <= MAX_LIFETIME_S:
        msg = f"expires_in_s: must be more than 0 and at most {MAX_LIFETIME_S:.0f}"
        raise InvalidRequestError(msg, field="expires_in_s")
    return seconds


def _key(row: sa.RowMapping) -> Key:
    return Key(**{**row, "scopes": frozenset(Scope(scope) for scope in row["scopes"])})
