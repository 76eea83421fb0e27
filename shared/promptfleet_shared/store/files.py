"""Files: uploaded and read a chunk at a time, so that neither side ever holds the whole.

A file is nobody's business before it is finished: one that was not is swept away with its chunks.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from typing import Any

import sqlalchemy as sa

from promptfleet_shared.store.deletions import Deletion

CHUNK_BYTES = 256 * 1024
UNFINISHED_S = 3600.0
"""Seconds after its last chunk for which a file that is not finished is kept."""
_FIRST, _LAST = uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)

_COLUMNS = "id, purpose, filename, bytes, created_at, expires_at"

_BEGIN = sa.text("""
INSERT INTO files (id, tenant, purpose, filename, status, expires_at)
VALUES (:id, :tenant, '', '', 'uploading', clock_timestamp() + :ttl_s * interval '1 second')
""").bindparams(ttl_s=UNFINISHED_S)

_ADD = sa.text("""
WITH grown AS (
    UPDATE files SET bytes = bytes + :size,
           expires_at = clock_timestamp() + :ttl_s * interval '1 second'
     WHERE id = :id AND tenant = :tenant AND status = 'uploading' RETURNING id)
INSERT INTO file_chunks (file_id, n, tenant, data)
SELECT id, :n, :tenant, :data FROM grown RETURNING n
""").bindparams(sa.bindparam("data", type_=sa.LargeBinary), ttl_s=UNFINISHED_S)

_FINISH = sa.text(f"""
UPDATE files SET status = 'processed', purpose = :purpose, filename = :filename,
       created_at = clock_timestamp(),
       expires_at = clock_timestamp() + CAST(:ttl_s AS float8) * interval '1 second'
 WHERE id = :id AND tenant = :tenant AND status = 'uploading'
RETURNING {_COLUMNS}
""")  # noqa: S608 - nothing of a caller's, here and below

_READ = sa.text(f"""
SELECT {_COLUMNS} FROM files
 WHERE id = :id AND tenant = :tenant AND status = 'processed'
   AND coalesce(expires_at > clock_timestamp(), true)
""")  # noqa: S608

_LIST = """
SELECT {columns} FROM files
 WHERE tenant = :tenant AND id {direction} CAST(:after AS uuid) AND status = 'processed'
   AND coalesce(expires_at > clock_timestamp(), true)
   AND (CAST(:purpose AS text) IS NULL OR purpose = :purpose)
 ORDER BY id {order} LIMIT :limit
"""
_NEWEST = sa.text(_LIST.format(columns=_COLUMNS, direction="<", order="DESC"))
_OLDEST = sa.text(_LIST.format(columns=_COLUMNS, direction=">", order="ASC"))

_CHUNK = sa.text("""
SELECT data FROM file_chunks WHERE file_id = :id AND n = :n AND tenant = :tenant
""").columns(data=sa.LargeBinary)

# Postgres knows the length of what it keeps out of line without reading it.
_LOCATE = sa.text("""
SELECT n, before FROM (
    SELECT n, sum(octet_length(data)) OVER (ORDER BY n) - octet_length(data) AS before
      FROM file_chunks WHERE file_id = :id AND tenant = :tenant) AS placed
 WHERE before <= :offset ORDER BY n DESC LIMIT 1
""")

# A batch that has not read all of its lines goes on reading them.
_IN_USE = """
EXISTS (SELECT FROM batches b
         WHERE b.input_file_id = files.id AND b.tenant = files.tenant
           AND b.status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
           AND (b.status = 'validating' OR b.next_line < b.total))
"""

_DELETE = sa.text(f"""
WITH found AS MATERIALIZED (
    SELECT id AS file_id, {_IN_USE} AS used FROM files
     WHERE id = :id AND tenant = :tenant AND status = 'processed'
       AND coalesce(expires_at > clock_timestamp(), true)
), gone AS (
    DELETE FROM files USING found WHERE id = file_id AND NOT used
)
SELECT used FROM found
""")  # noqa: S608

_ABANDON = sa.text("""
DELETE FROM files WHERE id = :id AND tenant = :tenant AND status = 'uploading'
""")

_STORED = sa.text("SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = :tenant")

_SWEEP = sa.text(f"""
WITH old AS MATERIALIZED (
    SELECT id AS file_id FROM files
     WHERE expires_at < clock_timestamp() AND NOT {_IN_USE}
     ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED)
DELETE FROM files USING old WHERE id = file_id RETURNING id
""")  # noqa: S608


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file without its content.

    Attributes:
        bytes: Of its content.
        expires_at: When it is deleted; None for one that stays until somebody deletes it.
    """

    id: uuid.UUID
    purpose: str
    filename: str
    bytes: int
    created_at: dt.datetime
    expires_at: dt.datetime | None


def begin_file(connection: sa.Connection, file_id: uuid.UUID, *, tenant: str) -> None:
    """Begin a file that nobody sees before it is finished; the caller commits, here and below."""
    connection.execute(_BEGIN, {"id": file_id, "tenant": tenant})


def add_chunk(
    connection: sa.Connection, file_id: uuid.UUID, n: int, data: bytes, *, tenant: str
) -> bool:
    """Add the `n`th chunk, from 0; false if the file is gone, since it took too long."""
    parameters = {"id": file_id, "tenant": tenant, "n": n, "data": data, "size": len(data)}
    return connection.execute(_ADD, parameters).first() is not None


def finish_file(
    connection: sa.Connection,
    file_id: uuid.UUID,
    *,
    tenant: str,
    purpose: str,
    filename: str,
    ttl_s: float | None,
) -> StoredFile | None:
    """Let the file be seen, now that it is whole.

    Args:
        connection: To the database.
        file_id: Of a file that was begun.
        tenant: Whose it is.
        purpose: OpenAI's word for what it is for.
        filename: For people.
        ttl_s: Seconds from now until it expires; None for never.

    Returns:
        None if the file is gone, since it took too long.
    """
    parameters = {"id": file_id, "tenant": tenant, "ttl_s": ttl_s}
    row = connection.execute(_FINISH, {**parameters, "purpose": purpose, "filename": filename})
    return _file(row.first())


def abandon_file(connection: sa.Connection, file_id: uuid.UUID, *, tenant: str) -> None:
    """Delete a file that will not be finished."""
    connection.execute(_ABANDON, {"id": file_id, "tenant": tenant})


def read_file(connection: sa.Connection, file_id: uuid.UUID, *, tenant: str) -> StoredFile | None:
    """A tenant's file, if there is such a one."""
    return _file(connection.execute(_READ, {"id": file_id, "tenant": tenant}).first())


def list_files(
    connection: sa.Connection,
    *,
    tenant: str,
    purpose: str | None = None,
    after: uuid.UUID | None = None,
    limit: int = 100,
    oldest_first: bool = False,
) -> tuple[list[StoredFile], bool]:
    """A tenant's files, and whether there are more.

    Args:
        connection: Read only.
        tenant: Whose.
        purpose: Only those of this purpose.
        after: The last one of the page before.
        limit: Files at most.
        oldest_first: Else the newest come first.
    """
    start = after or (_FIRST if oldest_first else _LAST)
    parameters = {"tenant": tenant, "purpose": purpose, "after": start, "limit": limit + 1}
    rows = connection.execute(_OLDEST if oldest_first else _NEWEST, parameters).all()
    return [_some(row) for row in rows[:limit]], len(rows) > limit


def read_chunk(
    connection: sa.Connection, file_id: uuid.UUID, n: int, *, tenant: str
) -> bytes | None:
    """The `n`th chunk, from 0; None after the last one."""
    row = connection.execute(_CHUNK, {"id": file_id, "n": n, "tenant": tenant}).first()
    return None if row is None else bytes(row.data)


def locate(
    connection: sa.Connection, file_id: uuid.UUID, offset: int, *, tenant: str
) -> tuple[int, int]:
    """The chunk that holds the byte at `offset`, and where that chunk begins."""
    parameters = {"id": file_id, "tenant": tenant, "offset": offset}
    row = connection.execute(_LOCATE, parameters).first()
    return (0, 0) if row is None else (row.n, int(row.before))


def delete_file(connection: sa.Connection, file_id: uuid.UUID, *, tenant: str) -> Deletion:
    """Delete a file with its content, unless a batch is still reading it."""
    row = connection.execute(_DELETE, {"id": file_id, "tenant": tenant}).first()
    if row is None:
        return Deletion.MISSING
    return Deletion.IN_USE if row.used else Deletion.DONE


def stored_bytes(connection: sa.Connection, *, tenant: str) -> int:
    """Bytes of all of a tenant's files, unfinished ones among them."""
    return int(connection.execute(_STORED, {"tenant": tenant}).scalar_one())


def sweep_files(connection: sa.Connection, *, limit: int = 20) -> int:
    """Delete up to `limit` files that have expired or were never finished, of all tenants.

    For workers, who see them; a file that a batch still reads waits for it.
    """
    return len(connection.execute(_SWEEP, {"limit": limit}).all())


def _file(row: Any) -> StoredFile | None:
    return None if row is None else _some(row)


def _some(row: Any) -> StoredFile:
    return StoredFile(
        id=row.id,
        purpose=row.purpose,
        filename=row.filename,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
