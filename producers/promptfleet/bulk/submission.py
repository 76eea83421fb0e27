"""Submit the lines of a file and write their results, with bounded memory and a way back in.

Every line has an idempotency key made of the run and its number, so a run that is started again,
whenever and wherever, finds the jobs of its first start instead of asking (and paying) twice.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from promptfleet.bulk.files import LineNumbers, RowFile
from promptfleet.bulk.lines import PromptLine, RawLine, parse_line
from promptfleet_shared.errors import (
    ConfigurationError,
    IdempotencyConflictError,
    InvalidRequestError,
    StoreUnavailableError,
)
from promptfleet_shared.jobs import JobState, Result

T = TypeVar("T")

CHUNK = 500
PATIENCE_S = 120.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5
_STORE_PAUSE_S = 1.0
_PLACE = re.compile(r"prompts\[(\d+)\]\.?")


class Handle(Protocol):
    """What a client gives back for a prompt."""

    @property
    def id(self) -> uuid.UUID:
        """The job's id."""
        ...


class Prompts(Protocol):
    """The part of `promptfleet.Client` that is needed here."""

    def enqueue_prompts(self, prompts: Iterable[Any]) -> Sequence[Handle]:
        """Accept prompts, all or none."""
        ...

    def get_results(self, ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Result]:
        """The results of those that are final."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is submitted, and how.

    Attributes:
        id: The same for every start of the same run.
        options: Of all prompts; a line's own win.
        max_in_flight: Jobs that are not final at once, at most.
        keep_model: Whether OpenAI batch lines keep their model.
        with_response: Whether rows carry the provider's whole response.
        retry_failed: Whether to ask again what an earlier start saw fail.
    """

    id: str
    options: dict[str, Any] = field(default_factory=dict)
    max_in_flight: int = 5000
    keep_model: bool = True
    with_response: bool = False
    retry_failed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How far a run is, in lines.

    Attributes:
        earlier: Rows that an earlier start of the run had written.
        invalid: Lines that could not be submitted.
        submitted: By this start; `in_flight` of them are not final.
    """

    earlier: int = 0
    succeeded: int = 0
    failed: int = 0
    invalid: int = 0
    submitted: int = 0
    in_flight: int = 0

    @property
    def settled(self) -> int:
        """Lines about which everything is known."""
        return self.earlier + self.succeeded + self.failed + self.invalid


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    """A line whose job is not final; the prompt itself is not kept."""

    number: int
    custom_id: str | int | None
    openai: bool
    attempt: int


class Submission:
    """One start of a run."""

    def __init__(
        self,
        client: Prompts,
        run: Run,
        *,
        results: RowFile,
        errors: RowFile,
        on_progress: Callable[[Counts], None] = lambda _counts: None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read what an earlier start left in the two files.

        Raises:
            ConfigurationError: They hold rows of another run.
        """
        self._client = client
        self._run = run
        self._results = results
        self._errors = errors
        self._on_progress = on_progress
        self._sleep = sleep
        self._clock = clock
        self._written = LineNumbers()
        self._reported = LineNumbers()
        self._attempts: dict[int, int] = {}
        self._in_flight: dict[uuid.UUID, list[_Waiting]] = {}
        self._counts = Counts()
        self._met_store = False
        self._read_results()
        self._read_errors()

    @property
    def counts(self) -> Counts:
        """How far it is."""
        waiting = sum(len(lines) for lines in self._in_flight.values())
        return replace(self._counts, in_flight=waiting)

    def go(self, lines: Iterator[RawLine]) -> Counts:
        """Submit the lines and wait for all of their results.

        Raises:
            StoreUnavailableError: The database was away for two minutes.
        """
        self._on_progress(self.counts)
        pause = _FIRST_PAUSE_S
        more = True
        while more or self._in_flight:
            room = self._run.max_in_flight - len(self._in_flight)
            fed = more and room > 0
            if fed:
                more = self._feed(lines, min(room, CHUNK))
            looked = self._clock()
            ended = self._collect()
            self._on_progress(self.counts)
            if fed or ended:
                pause = _FIRST_PAUSE_S
            elif self._in_flight:
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            if self._in_flight and not (fed and more):
                # At least as long as a look takes: half of the time is the database's own.
                self._sleep(max(pause, self._clock() - looked))
        return self.counts

    def _read_results(self) -> None:
        for row in self._results.rows():
            self._check_run(row, self._results)
            self._written.add(row["line"])
        self._counts = replace(self._counts, earlier=len(self._written))

    def _read_errors(self) -> None:
        rows = list(self._errors.rows()) if self._run.retry_failed else self._errors.rows()
        failed = invalid = 0
        for row in rows:
            self._check_run(row, self._errors)
            is_job = row.get("id") is not None
            if self._run.retry_failed:
                if is_job:
                    self._attempts[row["line"]] = row.get("attempt", 0) + 1
                continue
            self._reported.add(row["line"])
            failed += is_job
            invalid += not is_job
        if self._run.retry_failed:
            self._errors.clear()
        self._counts = replace(self._counts, failed=failed, invalid=invalid)

    def _check_run(self, row: dict[str, Any], file: RowFile) -> None:
        if row.get("run") != self._run.id:
            raise ConfigurationError(
                f"{file.path} has rows of another file, other options or another run;"
                " choose another file or remove it"
            )

    def _feed(self, lines: Iterator[RawLine], most: int) -> bool:
        """Submit up to `most` lines; False once there are no more."""
        chunk: list[PromptLine] = []
        for raw in lines:
            if raw.number in self._written or raw.number in self._reported:
                continue
            try:
                parsed = parse_line(raw, keep_model=self._run.keep_model)
            except InvalidRequestError as error:
                self._refuse(raw.number, error.message)
                continue
            chunk.append(parsed)
            if len(chunk) == most:
                break
        self._enqueue(chunk)
        return len(chunk) == most

    def _enqueue(self, chunk: list[PromptLine]) -> None:
        """Submit what is valid of the chunk; the rest goes to the errors."""
        while chunk:
            items = [self._item(line) for line in chunk]
            try:
                handles = self._accept(items)
            except IdempotencyConflictError as error:
                if len(chunk) == 1:
                    self._refuse(chunk[0].number, error.message, code=error.code)
                    return
                for line in chunk:
                    self._enqueue([line])
                return
            except InvalidRequestError as error:
                at = _PLACE.match(error.field)
                if at is None:  # not about a line: the run's own options
                    raise
                bad = chunk.pop(int(at[1]))
                self._refuse(bad.number, _PLACE.sub("", error.message, count=1))
                continue
            for line, handle in zip(chunk, handles, strict=True):
                self._in_flight.setdefault(handle.id, []).append(self._waiting(line))
            self._counts = replace(self._counts, submitted=self._counts.submitted + len(chunk))
            return

    def _accept(self, items: list[dict[str, Any]]) -> Sequence[Handle]:
        return self._patiently(lambda: self._client.enqueue_prompts(items))

    def _item(self, line: PromptLine) -> dict[str, Any]:
        attempt = self._attempts.get(line.number, 0)
        key = f"submit:{self._run.id}:{line.number}:{attempt}"
        item = {**self._run.options, "idempotency_key": key, **line.item}
        metadata = line.item.get("metadata")
        if metadata is None or isinstance(metadata, dict):
            item["metadata"] = {"run": self._run.id, **(metadata or {})}
        return item

    def _waiting(self, line: PromptLine) -> _Waiting:
        return _Waiting(
            number=line.number,
            custom_id=line.custom_id,
            openai=line.openai,
            attempt=self._attempts.get(line.number, 0),
        )

    def _collect(self) -> int:
        """Write what has ended; how many lines that were."""
        found = self._patiently(lambda: self._client.get_results(list(self._in_flight)))
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for id_, result in found.items():
            for line in self._in_flight[id_]:
                row = self._row(line, result)
                (good if result.state is JobState.SUCCEEDED else bad).append(row)
        self._results.append(good)
        self._errors.append(bad)
        for id_ in found:
            del self._in_flight[id_]
        counts = self._counts
        self._counts = replace(
            counts, succeeded=counts.succeeded + len(good), failed=counts.failed + len(bad)
        )
        return len(good) + len(bad)

    def _row(self, line: _Waiting, result: Result) -> dict[str, Any]:
        row: dict[str, Any] = {
            "line": line.number,
            "custom_id": line.custom_id,
            "id": str(result.job_id),
            "run": self._run.id,
            "state": result.state,
            "tier": result.tier,
        }
        if result.state is not JobState.SUCCEEDED:
            error = result.error
            row["attempt"] = line.attempt
            row["error"] = None if error is None else {"code": error.code, "message": error.message}
            return row
        usage = result.usage
        row |= {
            "model": result.model,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "usage": {"input": usage.input, "cached": usage.cached, "output": usage.output},
            "cost_usd": None if result.cost_usd is None else float(result.cost_usd),
            "cache": result.cache,
        }
        metadata = {name: value for name, value in result.metadata.items() if name != "run"}
        if metadata:
            row["metadata"] = metadata
        if line.openai:  # as OpenAI's own batch output has it, beside ours
            row["response"] = {"status_code": 200, "body": result.response}
            row["error"] = None
        elif self._run.with_response:
            row["response"] = result.response
        return row

    def _refuse(self, number: int, reason: str, *, code: str = "invalid_line") -> None:
        self._counts = replace(self._counts, invalid=self._counts.invalid + 1)
        error = {"code": code, "message": reason}
        self._errors.append([{"line": number, "run": self._run.id, "error": error}])

    def _patiently(self, call: Callable[[], T]) -> T:
        """Outlast a restart of the database: whatever was accepted has its key."""
        end = self._clock() + PATIENCE_S
        while True:
            try:
                answer = call()
            except StoreUnavailableError:
                # One that never answered is rather a wrong address.
                if not self._met_store or self._clock() >= end:
                    raise
                self._sleep(_STORE_PAUSE_S)
            else:
                self._met_store = True
                return answer
