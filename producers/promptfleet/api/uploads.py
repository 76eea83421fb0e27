"""Many jobs in one request of any length: read, committed and answered a chunk at a time.

Three things run at once: the body is read and checked, the chunk before is committed, and the lines
of what is committed are sent. At most two chunks are in memory. Who reads no answers before all is
sent finds room for `MAX_UNREAD_BYTES` of them; beyond that the upload waits until they are read.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from promptfleet.api.bodies import BodyReader, parse_json
from promptfleet.api.errors import ApiError, api_error, error_response
from promptfleet.api.services import Services
from promptfleet.api.splitting import Item, Splitter
from promptfleet.api.submitting import job_of
from promptfleet.options import MAX_KEY_CHARS
from promptfleet_shared.errors import IdempotencyConflictError, PromptFleetError
from promptfleet_shared.jobs import JobSpec

MAX_JOBS = 1_000
"""Jobs of a chunk: what one transaction commits."""
MAX_CHUNK_BYTES = 8 * 1024 * 1024
"""Bytes after which a chunk ends, however few jobs it has."""
COMMIT_WITHIN_S = 0.05
"""Seconds that a job waits for others while the client pauses."""
MAX_UNREAD_BYTES = 16 * 1024 * 1024
"""Bytes of answers that are kept for a client which reads none: some 250,000 jobs."""
STALLED_S = 60.0
"""Seconds that a client may leave its answers unread once they are too many."""
LINES_TYPE = "application/x-ndjson"
_ACCEPTED = 202


@dataclasses.dataclass(kw_only=True, slots=True)
class Chunk:
    """Some neighbouring items.

    Attributes:
        specs: The valid ones, with their places.
        errors: Why the others are not.
        size: Bytes of all.
    """

    specs: list[tuple[int, JobSpec]] = dataclasses.field(default_factory=list)
    errors: list[tuple[int, ApiError]] = dataclasses.field(default_factory=list)
    size: int = 0

    @property
    def count(self) -> int:
        """Items in it."""
        return len(self.specs) + len(self.errors)

    @property
    def is_full(self) -> bool:
        """True if no more should come into it."""
        return self.count >= MAX_JOBS or self.size >= MAX_CHUNK_BYTES


class Outbox:
    """Bytes that wait to be sent; at most about `MAX_UNREAD_BYTES` of them."""

    def __init__(self) -> None:
        """Empty and open."""
        self._parts: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._closed = False
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def put(self, part: bytes) -> None:
        """Add bytes; whoever makes them waits for `room` first."""
        self._parts.append(part)
        self._size += len(part)
        if self._size > MAX_UNREAD_BYTES:
            self._has_room.clear()
        self._changed.set()

    async def room(self) -> None:
        """Wait until there is room.

        Raises:
            ClientStalledError: Nobody read anything for `STALLED_S`.
        """
        try:
            async with asyncio.timeout(STALLED_S):
                await self._has_room.wait()
        except TimeoutError:
            raise ClientStalledError from None

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._changed.set()

    async def take(self) -> bytes:
        """The next part, as soon as there is one; b"" at the end."""
        while not self._parts and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        if not self._parts:
            return b""
        part = self._parts.popleft()
        self._size -= len(part)
        if self._size <= MAX_UNREAD_BYTES:
            self._has_room.set()
        return part


class Upload:
    """Reads one body, commits its jobs, and writes what became of each into an outbox."""

    def __init__(
        self, *, services: Services, tenant: str, splitter: Splitter, key: str | None = None
    ) -> None:
        """Nothing is read.

        Args:
            services: Of the app.
            tenant: Whose jobs they will be.
            splitter: Cuts the body into items.
            key: Idempotency key of the whole: its item n has the key `<key>:<n>`.

        Raises:
            ApiError: The key is too long for that.
        """
        self._services = services
        self._tenant = tenant
        self._defaults = services.defaults_of(tenant)
        self._splitter = splitter
        self._key = key
        self.outbox = Outbox()
        self.told = 0
        if key is not None and len(key) > MAX_KEY_CHARS - len(":9999999999"):
            msg = "idempotency-key: is too long for a request of many jobs"
            raise ApiError(422, msg, code="invalid_request", param="idempotency-key")

    async def run(self, reader: BodyReader) -> None:
        """Read and commit all.

        Raises:
            ApiError: The rest can't be read, or nothing more is accepted now.
            ClientDisconnect: The client left; what it has been told is committed.
            ClientStalledError: It does not read what it is told.
        """
        committing: asyncio.Task[None] | None = None
        try:
            async for chunk in self._chunks(reader):
                if committing is not None:
                    await committing
                await self.outbox.room()
                committing = asyncio.create_task(self._commit(chunk))
        finally:
            try:
                if committing is not None:
                    await committing
            finally:
                self.outbox.close()

    async def _chunks(self, reader: BodyReader) -> AsyncIterator[Chunk]:
        chunk = Chunk()
        while True:
            piece = await reader.read(COMMIT_WITHIN_S if chunk.count else None)
            if piece is None:
                yield chunk
                chunk = Chunk()
                continue
            failed: ApiError | None = None
            items = self._splitter.feed(piece) if piece else self._splitter.end()
            try:
                for item in items:
                    self._add(chunk, item)
                    if chunk.is_full:
                        yield chunk
                        chunk = Chunk()
            except ApiError as error:
                failed = error
            if (failed is not None or not piece) and chunk.count:
                yield chunk
            if failed is not None:
                raise failed
            if not piece:
                return

    def _add(self, chunk: Chunk, item: Item) -> None:
        chunk.size += len(item.text)
        if item.error is not None:
            chunk.errors.append((item.index, item.error))
            return
        key = None if self._key is None else f"{self._key}:{item.index}"
        limits = self._services.limits
        try:
            body = parse_json(item.text, what="The item")
            chunk.specs.append((item.index, job_of(body, self._defaults, limits, key=key)))
        except PromptFleetError as error:
            chunk.errors.append((item.index, api_error(error)))

    async def _commit(self, chunk: Chunk) -> None:
        """Commit the chunk's jobs and tell of each item, in their order."""
        stop: ApiError | None = None
        told = list(chunk.errors)
        accepted: list[tuple[int, str]] = []
        if chunk.specs:
            try:
                await self._services.limits.check_backlog(self._tenant, len(chunk.specs))
                accepted, conflicts = await self._submit(chunk.specs)
                told += conflicts
            except PromptFleetError as error:
                stop = api_error(error)
                if not self.told:  # the whole request can be refused as one
                    raise stop from None
                told += [(index, stop) for index, _ in chunk.specs]
        self.outbox.put(_lines(accepted, told))
        self.told += chunk.count
        if stop is not None:
            raise stop

    async def _submit(
        self, specs: Sequence[tuple[int, JobSpec]]
    ) -> tuple[list[tuple[int, str]], list[tuple[int, ApiError]]]:
        """Commit in one transaction; halve it to find whose key was used with another request."""
        try:
            ids = await self._services.stores.submit(self._tenant, [spec for _, spec in specs])
        except IdempotencyConflictError as error:
            if len(specs) == 1:
                return [], [(specs[0][0], api_error(error))]
            middle = len(specs) // 2
            first, second = await self._submit(specs[:middle]), await self._submit(specs[middle:])
            return first[0] + second[0], first[1] + second[1]
        pairs = list(zip(specs, ids, strict=True))
        fresh = sum(spec.id == accepted for (_, spec), accepted in pairs)
        self._services.limits.accepted(self._tenant, fresh)
        return [(index, str(accepted)) for (index, _), accepted in pairs], []


class UploadResponse(Response):
    """The answer to an upload: its lines while it is still being read.

    Not Starlette's own streaming response, which listens for the client's leaving and would take
    the rest of the body for that.
    """

    def __init__(
        self, upload: Upload, reader: BodyReader, room: AbstractContextManager[None]
    ) -> None:
        """Nothing is read or sent.

        Args:
            upload: What to run.
            reader: Of the request's body.
            room: Entered while it runs.
        """
        super().__init__(status_code=_ACCEPTED, media_type=LINES_TYPE)
        del self.headers["content-length"]
        self._upload = upload
        self._reader = reader
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and answer it."""
        with self._room:
            running = asyncio.create_task(self._upload.run(self._reader))
            try:
                await self._answer(scope, receive, send, running)
            except ClientDisconnect:
                return
            finally:
                running.cancel()
                await asyncio.wait({running})
                await self._reader.close()

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, running: asyncio.Task[None]
    ) -> None:
        lines = await self._upload.outbox.take()
        if not lines and (failed := await _failure(running)) is not None:
            await error_response(failed)(scope, receive, send)  # nothing was accepted: as one
            return
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": _ACCEPTED, "headers": headers})
        sending = asyncio.create_task(self._send_all(lines, send))
        try:
            # Who reads nothing for too long ends `running` first, with an error.
            await asyncio.wait({sending, running}, return_when=asyncio.FIRST_EXCEPTION)
            if running.done() and isinstance(error := running.exception(), ClientStalledError):
                raise error
            await sending
        finally:
            sending.cancel()
            await asyncio.wait({sending})
        failed = await _failure(running)
        last = b"" if failed is None else _line(self._upload.told, failed)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_all(self, lines: bytes, send: Send) -> None:
        while lines:
            await send({"type": "http.response.body", "body": lines, "more_body": True})
            lines = await self._upload.outbox.take()


class ClientStalledError(Exception):
    """A client left its answers unread for too long; its connection is cut."""


async def _failure(running: asyncio.Task[None]) -> ApiError | None:
    """Why the upload ended early, if it did; other exceptions are raised."""
    try:
        await running
    except ApiError as error:
        return error
    return None


def _lines(accepted: Sequence[tuple[int, str]], told: Sequence[tuple[int, ApiError]]) -> bytes:
    lines = [
        (index, b'{"index":%d,"id":"%s"}\n' % (index, id_.encode())) for index, id_ in accepted
    ]
    lines += [(index, _line(index, error)) for index, error in told]
    lines.sort(key=lambda line: line[0])
    return b"".join(line for _, line in lines)


def _line(index: int, error: ApiError) -> bytes:
    return orjson.dumps({"index": index, "error": error.body}) + b"\n"
