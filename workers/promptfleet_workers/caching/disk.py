"""A cache in a file, for the workers of one machine: SQLite, in a thread of its own.

diskcache would be the library for it, but is no longer kept, and unpickles what it finds. SQLite
with a write-ahead log lets several processes read while one writes, and comes with Python.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from promptfleet_workers.caching.protocol import Item

log = logging.getLogger(__name__)

MAX_BYTES = 1024 * 1024 * 1024
TIMEOUT_S = 0.5
"""What one look-up or one filling may take before the batch goes on without it."""
COOL_DOWN_S = 2.0
"""After a failure the cache is left alone for so long."""
_KEYS_A_QUERY = 500  # SQLite takes 999 parameters at least
_USED_STEP_S = 60.0  # when a value was used is written down so often at most: a write costs
_ITEM_BYTES = 200
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, size INTEGER NOT NULL, until REAL NOT NULL,
    used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used, size);
CREATE INDEX IF NOT EXISTS answers_until ON answers (until);
"""

T = TypeVar("T")


class DiskCache:
    """A cache in a file; the least recently used values go first."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = MAX_BYTES,
        timeout_s: float = TIMEOUT_S,
        cool_down_s: float = COOL_DOWN_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file at the first use.

        Args:
            path: The file; made with its folder, readable by this user only.
            max_bytes: What the values may take; the file itself may be a little larger.
            timeout_s: Seconds that a call may take.
            cool_down_s: Seconds without another try after a failure.
            clock: Seconds since 1970, the same in all processes.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._cold_until = float("-inf")
        self._connection: sqlite3.Connection | None = None
        self._unchecked = max_bytes  # so that the first filling looks how full it is
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="promptfleet-disk-cache")

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key; None for a miss, or for all if the cache is out of order."""
        if not keys:
            return []
        found = await self._run(lambda database: self._read(database, keys))
        return [None] * len(keys) if found is None else [found.get(key) for key in keys]

    async def set_many(self, items: Sequence[Item]) -> None:
        """Keep values, if the cache is in order."""
        if items:
            await self._run(lambda database: self._write(database, items))

    async def aclose(self) -> None:
        """Close the file."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        if time.monotonic() < self._cold_until:
            return None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._thread, lambda: work(self._open()))
        except (sqlite3.Error, OSError, TimeoutError) as error:
            self._cold_until = time.monotonic() + self._cool_down_s
            facts = {"error": type(error).__name__, "cool_down_s": self._cool_down_s}
            log.warning("cache_unavailable", extra=facts)
            return None

    # -- in the thread -------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Answers are nobody else's business; SQLite gives its other files the same mode.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(
                self._path,
                timeout=self._timeout_s * 0.8,  # so that the thread is free before the next call
                isolation_level=None,
                check_same_thread=False,  # an executor has one thread, but not always the same
            )
            connection.execute("PRAGMA journal_mode = WAL")
            # What a power failure takes was only a cache.
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA)
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, database: sqlite3.Connection, keys: Sequence[str]) -> dict[str, bytes]:
        now = self._clock()
        found: dict[str, bytes] = {}
        used: list[str] = []
        for at in range(0, len(keys), _KEYS_A_QUERY):
            some = keys[at : at + _KEYS_A_QUERY]
            marks = ",".join("?" * len(some))
            rows = database.execute(
                f"SELECT key, value, used FROM answers WHERE key IN ({marks}) AND until > ?",  # noqa: S608 - marks only
                (*some, now),
            )
            for key, value, used_at in rows:
                found[key] = value
                if now - used_at > _USED_STEP_S:
                    used.append(key)
        if used:
            database.executemany(
                "UPDATE answers SET used = ? WHERE key = ?", [(now, key) for key in used]
            )
        return found

    def _write(self, database: sqlite3.Connection, items: Sequence[Item]) -> None:
        now = self._clock()
        rows = [
            (key, value, len(value) + _ITEM_BYTES, now + ttl_s, now) for key, value, ttl_s in items
        ]
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany(
                "INSERT OR REPLACE INTO answers (key, value, size, until, used)"
                " VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            self._unchecked += sum(row[2] for row in rows)
            if self._unchecked >= self._max_bytes // 64:
                self._make_room(database, now)
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")

    def _make_room(self, database: sqlite3.Connection, now: float) -> None:
        """Delete what has expired, and of the rest what was not used for longest."""
        self._unchecked = 0
        database.execute("DELETE FROM answers WHERE until <= ?", (now,))
        (size,) = database.execute("SELECT coalesce(sum(size), 0) FROM answers").fetchone()
        if size <= self._max_bytes:
            return
        database.execute(
            """
            DELETE FROM answers WHERE rowid IN (
                SELECT rowid FROM (SELECT rowid, sum(size) OVER (
                    ORDER BY used DESC, rowid DESC) AS so_far FROM answers)
                 WHERE so_far > ?)
            """,
            (self._max_bytes,),
        )
