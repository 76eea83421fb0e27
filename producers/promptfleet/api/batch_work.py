"""One batch, moved on by whoever holds it: validate, take on, count, cut off, write the files.

Each step is repeated from where the batch stands, by the same runner or the next one:

| Status       | What is done                                                   | What is kept     |
|--------------|----------------------------------------------------------------|------------------|
| validating   | read every line, once                                          | nothing          |
| in_progress  | make jobs of the lines, a chunk a transaction; count the ends  | `next_line`      |
| cancelling   | the same, where lines without a job get none and jobs are told | `next_line`      |
| finalizing   | write the files, then let them be seen with the batch's end    | nothing          |
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa

from promptfleet.api.file_writer import FileWriter
from promptfleet.api.openai.batch_input import (
    MAX_LINES,
    InputLine,
    LineError,
    LineRequest,
    SpecOf,
    input_lines,
    read_line,
)
from promptfleet.api.openai.batch_requests import (
    RESPONSES,
    LineEnd,
    cut_error,
    line_job,
    output_line,
    spec_maker,
)
from promptfleet.api.openai.files import read_bytes
from promptfleet.api.services import Services
from promptfleet.api.stores import Stores
from promptfleet.backends import doorbells
from promptfleet_shared.jobs import Usage
from promptfleet_shared.store.batches import (
    Batch,
    EndedLine,
    Ending,
    Held,
    NewLine,
    add_lines,
    begin_batch,
    end_batch,
    hold_batch,
    note_progress,
    read_lines,
    unfinished_jobs,
)
from promptfleet_shared.store.database import Statement
from promptfleet_shared.store.files import read_file
from promptfleet_shared.store.requests import read_requests
from promptfleet_shared.store.results import request_cancel

T = TypeVar("T")

LOOK_EVERY_S = 1.0
"""Seconds between two counts of a batch in progress, at least; in its first seconds fewer."""
MAX_ERRORS = 100
"""Wrong lines after which nobody reads on."""
CHUNK_LINES = 500
CHUNK_BYTES = 2 * 1024 * 1024
"""How many lines become jobs in one transaction."""
CUT_LINES = 2_000
_COSTS_AT_MOST = 20
"""A count is made only once in so many times its own duration."""
_SOONEST_S, _SOONER = 0.1, 0.2
_RENEW_AFTER = 1 / 3
_PAGE_BYTES = 1024 * 1024
_FIRST_PAGE, _LARGEST_PAGE = 32, 1_000
_SLICE_S = 0.005
"""Seconds of work after which others on the loop get their turn."""


class BatchWork:
    """Moves one batch on, as far as it goes."""

    def __init__(
        self, services: Services, held: Held, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Do nothing yet.

        Args:
            services: Of the process.
            held: The batch.
            clock: Monotonic seconds.
        """
        self._services = services
        self._stores = services.stores
        self._held = held
        self._tenant = held.tenant
        self._clock = clock
        self._looked_at = clock()
        self._turn_at = clock()
        self._most_bytes = services.settings.api_max_line_bytes

    async def run(self) -> float | None:
        """Go on until the batch has to wait.

        Returns:
            Seconds until somebody should look at it again; None if it has ended, or is somebody
            else's.

        Raises:
            ApiError: There is no room for its jobs now.
            StoreUnavailableError: The database is away.
        """
        while (batch := await self._look()) is not None:
            match batch.status:
                case "validating":
                    await self._validate(batch)
                case "in_progress" | "cancelling":
                    pause_s = await self._progress(batch)
                    if pause_s is not None:
                        return pause_s
                case "finalizing":
                    await self._write_files(batch)
                case _:
                    return None
        return None

    # -- validating --------------------------------------------------------------------------

    async def _validate(self, batch: Batch) -> None:
        seen = _Seen()
        spec_of = spec_maker(self._services, self._tenant)
        async for lines in self._lines(batch):
            for line in lines:
                if seen.total == MAX_LINES:
                    await self._fail([_too_many()])
                    return
                seen.take(line, functools.partial(self._request, batch, line, spec_of))
                await self._give_way()
            if len(seen.errors) >= MAX_ERRORS:
                break
            if not await self._still("validating"):
                return
        if not seen.total:
            seen.errors.append(await self._nothing_there(batch))
        if seen.errors:
            await self._fail(seen.errors)
            return
        model = next(iter(seen.models)) if len(seen.models) == 1 else None
        await self._run(lambda c: begin_batch(c, self._held, total=seen.total, model=model))

    def _request(self, batch: Batch, line: InputLine, spec_of: SpecOf) -> LineRequest:
        return read_line(line, endpoint=batch.endpoint, spec_of=spec_of, max_bytes=self._most_bytes)

    async def _nothing_there(self, batch: Batch) -> dict[str, Any]:
        file = await self._run(lambda c: read_file(c, batch.input_file_id, tenant=self._tenant))
        if file is None:
            return _error("input_file_not_found", "The input file is gone.", param="input_file_id")
        return _error("empty_file", "The input file has no requests.")

    async def _fail(self, errors: list[dict[str, Any]]) -> None:
        ending = Ending(status="failed", errors=errors)
        await self._run_whole(lambda c: end_batch(c, self._held, ending))

    # -- in progress -------------------------------------------------------------------------

    async def _progress(self, batch: Batch) -> float | None:
        """Seconds to wait, or None to look again at once."""
        over = batch.cancelling_at is not None or batch.remaining_s <= 0
        if batch.next_line < batch.total:
            if not await self._take_on(batch, over=over):
                await self._lose_input()
            return None
        if over:
            await self._cancel_jobs()
        began = self._clock()
        found = await self._run(lambda c: note_progress(c, self._held))
        took_s = self._clock() - began
        if found is None:
            return None
        counted, ended = found
        if not ended:
            age_s = counted.completion_window_s - counted.remaining_s
            # Small batches end soon after they began.
            pause_s = min(LOOK_EVERY_S, max(_SOONEST_S, age_s * _SOONER))
            return max(pause_s, took_s * _COSTS_AT_MOST)
        if counted.status == "cancelling":
            await self._write_files(counted)
        return None

    async def _take_on(self, batch: Batch, *, over: bool) -> bool:
        """Take lines on, as long as that goes; False if there are none left in the file."""
        spec_of = spec_maker(self._services, self._tenant)
        until = self._looked_at + batch.remaining_s
        chunk: list[NewLine] = []
        size = 0
        found = False
        async for lines in self._lines(batch, first=batch.next_line):
            for line in lines:
                found = True
                chunk.append(self._new_line(batch, line, spec_of, until=until, over=over))
                size += len(line.text or b"")
                if len(chunk) >= (CUT_LINES if over else CHUNK_LINES) or size >= CHUNK_BYTES:
                    if not await self._add(chunk):
                        return True
                    chunk, size = [], 0
                await self._give_way()
        if chunk:
            await self._add(chunk)
        return found

    def _new_line(
        self, batch: Batch, line: InputLine, spec_of: SpecOf, *, until: float, over: bool
    ) -> NewLine:
        try:
            request = self._request(batch, line, spec_of)
        except LineError as error:  # fleet.toml has changed since
            record = {"code": error.code, "message": error.message}
            return NewLine(n=line.n, custom_id=_custom_id(line), error=record)
        remaining_s = until - self._clock()
        if over or remaining_s <= 0:
            return NewLine(n=line.n, custom_id=request.custom_id, error=cut_error(batch))
        spec = line_job(request.spec, batch, request.custom_id, remaining_s=remaining_s)
        return NewLine(n=line.n, custom_id=request.custom_id, spec=spec)

    async def _add(self, chunk: list[NewLine]) -> bool:
        specs = [line.spec for line in chunk if line.spec is not None]
        if specs:
            await self._services.limits.check_backlog(self._tenant, len(specs))
        added = await self._run_whole(lambda c: add_lines(c, self._held, chunk))
        if added and specs:
            self._services.limits.accepted(self._tenant, len(specs))
            self._services.ringer.ring(doorbells(specs, [spec.id for spec in specs]))
        return added

    async def _lose_input(self) -> None:
        """The file was deleted by other ways than the API's."""
        await self._cancel_jobs()
        await self._fail([_error("input_file_not_found", "The input file is gone.")])

    async def _cancel_jobs(self) -> None:
        """Let no job of the batch go on."""
        while True:
            ids = await self._run(lambda c: unfinished_jobs(c, self._held, limit=CHUNK_LINES))
            if not ids:
                return
            await self._run(functools.partial(request_cancel, ids=ids, tenant=self._tenant))

    # -- finalizing --------------------------------------------------------------------------

    async def _write_files(self, batch: Batch) -> None:
        files = _Files(batch, self._stores, self._tenant)
        try:
            async for lines in self._ended_lines():
                requests = await self._requests(batch, lines)
                for line in lines:
                    await files.add(line, requests.get(line.job_id) if line.job_id else None)
                    await self._give_way()
                if not await self._still("finalizing", "cancelling"):
                    break
            else:
                await files.flush()
                if await self._run_whole(lambda c: files.end(c, self._held)) is not None:
                    return
        except BaseException:
            await files.abandon()
            raise
        await files.abandon()

    async def _ended_lines(self) -> AsyncIterator[list[EndedLine]]:
        """All lines, as many at a time as make a page of some size."""
        start, limit = 0, _FIRST_PAGE
        while True:
            lines = await self._run(
                lambda c: read_lines(c, self._held, start=start, limit=limit)  # noqa: B023
            )
            if not lines:
                return
            yield lines
            start = lines[-1].n + 1
            size = sum(_size(line) for line in lines)
            limit = max(1, min(_LARGEST_PAGE, limit * 2, limit * _PAGE_BYTES // max(1, size)))

    async def _requests(
        self, batch: Batch, lines: list[EndedLine]
    ) -> Mapping[uuid.UUID, Mapping[str, Any]]:
        """What the lines' jobs ask for, where their answers tell of it."""
        if batch.endpoint != RESPONSES:
            return {}
        ids = [line.job_id for line in lines if line.job_id is not None]
        return await self._run(functools.partial(read_requests, ids=ids, tenant=self._tenant))

    # -- in common ---------------------------------------------------------------------------

    def _lines(self, batch: Batch, *, first: int = 0) -> AsyncIterator[list[InputLine]]:
        chunks = read_bytes(self._services, self._tenant, batch.input_file_id)
        return input_lines(chunks, max_bytes=self._most_bytes, first=first)

    async def _look(self) -> Batch | None:
        self._looked_at = self._clock()
        return await self._run(lambda c: hold_batch(c, self._held))

    async def _still(self, *statuses: str) -> bool:
        """Keep the lease; False if the batch is somebody else's by now, or is in another status."""
        patience_s = min(LOOK_EVERY_S, self._held.lease_s * _RENEW_AFTER)
        if self._clock() - self._looked_at < patience_s:
            return True
        batch = await self._look()
        return batch is not None and batch.status in statuses

    async def _give_way(self) -> None:
        if self._clock() - self._turn_at > _SLICE_S:
            await asyncio.sleep(0)
            self._turn_at = self._clock()

    async def _run(self, statement: Statement[T]) -> T:
        return await self._stores.run(self._tenant, statement)

    async def _run_whole(self, statements: Statement[T]) -> T:
        return await self._stores.run_whole(self._tenant, statements)


class _Seen:
    """What validation has seen of a file."""

    def __init__(self) -> None:
        self.total = 0
        self.errors: list[dict[str, Any]] = []
        self.models: set[str | None] = set()
        self._ids: set[bytes] = set()

    def take(self, line: InputLine, read: Callable[[], LineRequest]) -> None:
        """Judge one more line."""
        self.total += 1
        try:
            request = read()
            self._check_unique(request.custom_id)
        except LineError as error:
            found = _error(error.code, error.message, param=error.param, line=line.number)
            self.errors.append(found)
        else:
            self.models.add(request.model)

    def _check_unique(self, custom_id: str) -> None:
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()  # smaller than it
        if digest in self._ids:
            msg = "custom_id: another line of the file has the same; it must be unique."
            raise LineError("duplicate_custom_id", msg, "custom_id")
        self._ids.add(digest)


class _Files:
    """The files that a batch ends with, and what they add up to."""

    def __init__(self, batch: Batch, stores: Stores, tenant: str) -> None:
        self._batch = batch
        self._output = FileWriter(stores, tenant)
        self._errors = FileWriter(stores, tenant)
        self._ends = dict.fromkeys(LineEnd, 0)
        self._expired = False
        self._usage = Usage()

    async def add(self, line: EndedLine, request: Mapping[str, Any] | None) -> None:
        """Write what became of a line."""
        written = output_line(self._batch, line, request)
        self._ends[written.end] += 1
        if line.result is not None:
            self._usage += line.result.usage
        file = self._output if written.end is LineEnd.COMPLETED else self._errors
        await file.write(written.data)

    async def flush(self) -> None:
        """Write what is left."""
        await self._output.flush()
        await self._errors.flush()

    def end(self, connection: sa.Connection, held: Held) -> Batch | None:
        """End the batch, and let its files be seen; nothing of both if it is not ours any more."""
        ended = end_batch(connection, held, self._ending())
        if ended is None:
            return None
        for name, file in (("output", self._output), ("error", self._errors)):
            if file.id is not None:
                filename = f"batch_{ended.id.hex}_{name}.jsonl"
                ttl_s = ended.output_ttl_s
                file.finish(connection, purpose="batch_output", filename=filename, ttl_s=ttl_s)
        return ended

    async def abandon(self) -> None:
        """Leave nothing behind."""
        await self._output.abandon()
        await self._errors.abandon()

    def _ending(self) -> Ending:
        if self._batch.cancelling_at is not None:
            status = "cancelled"
        else:
            status = "expired" if self._ends[LineEnd.CUT] else "completed"
        return Ending(
            status=status,
            completed=self._ends[LineEnd.COMPLETED],
            failed=self._ends[LineEnd.FAILED],
            output=self._output.id,
            error=self._errors.id,
            usage=_usage_json(self._usage),
        )


def _usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's BatchUsage."""
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.input + usage.output,
    }


def _error(
    code: str, message: str, *, param: str | None = None, line: int | None = None
) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}


def _too_many() -> dict[str, Any]:
    msg = f"The input file has more than {MAX_LINES} requests, the limit of a batch."
    return _error("too_many_tasks", msg)


def _custom_id(line: InputLine) -> str:
    """Of a line that could be read once, and can't any more."""
    return f"line-{line.number}"


def _size(line: EndedLine) -> int:
    """About what a line's result takes; a guess is enough."""
    if line.result is None:
        return 200
    return 1_000 + len(line.result.text or "") + _weigh(line.result.response)


def _weigh(value: Any) -> int:
    """Bytes of JSON, roughly, by what takes most of it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return len(value) * _weigh(value[0]) if value else 2
    if isinstance(value, dict):
        return sum(_weigh(item) for item in value.values())
    return 20
