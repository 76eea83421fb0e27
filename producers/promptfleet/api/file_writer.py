"""Files that the API itself writes: a chunk in memory at a time, and seen once they are whole."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from uuid_utils.compat import uuid7

from promptfleet.api.stores import Stores
from promptfleet_shared.errors import PromptFleetError, StoreRefusedError
from promptfleet_shared.store.files import (
    CHUNK_BYTES,
    StoredFile,
    abandon_file,
    add_chunk,
    begin_file,
    finish_file,
)


class FileWriter:
    """A file that grows; without a byte it never is one.

    Attributes:
        id: The file's; None as long as nothing was written.
    """

    def __init__(self, stores: Stores, tenant: str) -> None:
        """Nothing is there yet."""
        self.id: uuid.UUID | None = None
        self._stores = stores
        self._tenant = tenant
        self._buffer = bytearray()
        self._chunks = 0

    async def write(self, data: bytes) -> None:
        """Add to it.

        Raises:
            StoreUnavailableError: The database is away.
            StoreRefusedError: The file was swept away meanwhile.
        """
        if self.id is None:
            self.id = await self._begin(uuid7())
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._write(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    async def flush(self) -> None:
        """Write what is left; then nothing may be added."""
        if self._buffer:
            await self._write(bytes(self._buffer))
            self._buffer.clear()

    def finish(
        self, connection: sa.Connection, *, purpose: str, filename: str, ttl_s: float | None
    ) -> StoredFile:
        """Let the file be seen, in a transaction of the caller's; after `flush`.

        Raises:
            StoreRefusedError: It was swept away meanwhile, or never begun.
        """
        if self.id is None:
            raise _swept()
        made = finish_file(
            connection,
            self.id,
            tenant=self._tenant,
            purpose=purpose,
            filename=filename,
            ttl_s=ttl_s,
        )
        if made is None:
            raise _swept()
        return made

    async def abandon(self) -> None:
        """Leave nothing behind; where that can't be done now, a sweeper does it later."""
        if self.id is None:
            return
        file_id, tenant = self.id, self._tenant
        try:
            await self._stores.run(tenant, lambda c: abandon_file(c, file_id, tenant=tenant))
        except PromptFleetError:
            return

    async def _begin(self, file_id: uuid.UUID) -> uuid.UUID:
        tenant = self._tenant
        await self._stores.run(tenant, lambda c: begin_file(c, file_id, tenant=tenant))
        return file_id

    async def _write(self, chunk: bytes) -> None:
        file_id, tenant, n = self.id, self._tenant, self._chunks
        assert file_id is not None  # noqa: S101  # for the type checker
        kept = await self._stores.run(
            tenant, lambda c: add_chunk(c, file_id, n, chunk, tenant=tenant)
        )
        if not kept:
            raise _swept()
        self._chunks += 1


def _swept() -> StoreRefusedError:
    return StoreRefusedError("a file that was being written is gone")
