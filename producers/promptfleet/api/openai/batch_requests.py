"""The requests of a batch's lines as jobs, and the jobs' ends as lines of its files."""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Mapping
from typing import Any, Final

import orjson

from promptfleet.api.openai.answers import openai_answer
from promptfleet.api.openai.batch_input import SpecOf
from promptfleet.api.openai.failures import failure
from promptfleet.api.openai.options import fleet_options
from promptfleet.api.openai.responses_input import chat_body
from promptfleet.api.openai.responses_output import Draft, response_json
from promptfleet.api.openai.translating import KINDS, PROMPT_FIELDS, count_prompts, make_job
from promptfleet.api.services import Services
from promptfleet.options import MAX_DEADLINE_S
from promptfleet_shared.jobs import JobKind, JobSpec, JobState, Result
from promptfleet_shared.store.batches import Batch, EndedLine

RESPONSES: Final = "/v1/responses"
ENDPOINTS: Final = (*KINDS, RESPONSES)
BATCH_PRIORITY: Final = 2
"""Of a line that names none: interactive jobs go first."""
CUSTOM_ID: Final = "custom_id"
"""Where a job's metadata has the name of its line."""

_CUT = {
    "batch_cancelled": "The batch was cancelled before this request was executed.",
    "batch_expired": ("This request could not be executed before the completion window expired."),
}
_GONE = {"code": "result_gone", "message": "The result of this request was deleted."}


class LineEnd(enum.Enum):
    """How a line counts."""

    COMPLETED = enum.auto()
    FAILED = enum.auto()
    CUT = enum.auto()  # the batch's end came before its own


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OutputLine:
    """A line of a batch's output or error file.

    Attributes:
        end: Only completed lines are in the output file.
        data: JSON and a line feed.
    """

    end: LineEnd
    data: bytes


def spec_maker(services: Services, tenant: str) -> SpecOf:
    """What makes jobs of a tenant's lines, as the endpoints themselves would."""
    defaults = dataclasses.replace(services.defaults_of(tenant), deadline_s=MAX_DEADLINE_S)

    def spec_of(endpoint: str, body: Mapping[str, Any]) -> JobSpec:
        options = fleet_options(body)
        options.pop("idempotency_key", None)  # a line is one job of its batch, whatever it says
        options.setdefault("priority", BATCH_PRIORITY)
        if endpoint == RESPONSES:
            body = chat_body(body)
        kind = KINDS.get(endpoint, JobKind.CHAT)
        spec = make_job(kind, body, fleet=services.fleet, defaults=defaults, options=options)
        field = PROMPT_FIELDS[kind]
        if kind is not JobKind.CHAT:
            services.limits.check_prompts(count_prompts(body[field]), param=field)
        services.limits.check_tokens(spec, param=field)
        return spec

    return spec_of


def line_job(spec: JobSpec, batch: Batch, custom_id: str, *, remaining_s: float) -> JobSpec:
    """The job as the batch's."""
    return dataclasses.replace(
        spec,
        batch_id=batch.id,
        deadline_s=min(spec.deadline_s, remaining_s),
        metadata={**(spec.metadata or {}), CUSTOM_ID: custom_id},
    )


def cut_error(batch: Batch) -> dict[str, str]:
    """Why a line was not executed whose batch has come to its end."""
    code = "batch_expired" if batch.cancelling_at is None else "batch_cancelled"
    return {"code": code, "message": _CUT[code]}


def output_line(
    batch: Batch, line: EndedLine, request: Mapping[str, Any] | None = None
) -> OutputLine:
    """What the files of the batch tell of a line.

    Args:
        batch: Whose line it is.
        line: With its result.
        request: That of its job; only answers of `RESPONSES` tell of it.
    """
    result = line.result
    if line.error is not None or result is None:
        error = line.error or _GONE
        return _line(batch, line, _end_of(error), error=error)
    if result.state is JobState.SUCCEEDED:
        answer = _answer(batch, result, request or {})
        return _line(batch, line, LineEnd.COMPLETED, response=_response(result, 200, answer))
    if _was_cut(batch, result):
        return _line(batch, line, LineEnd.CUT, error=cut_error(batch))
    refused = failure(result)
    response = _response(result, refused.status, {"error": refused.body})
    return _line(batch, line, LineEnd.FAILED, response=response)


def _answer(batch: Batch, result: Result, request: Mapping[str, Any]) -> dict[str, Any]:
    if batch.endpoint != RESPONSES:
        return openai_answer(result, KINDS[batch.endpoint], batch.model or "")
    draft = Draft(
        id=result.job_id,
        model=batch.model or "",
        request=request,
        created_at=round(result.created_at.timestamp(), 3),
        metadata={name: value for name, value in result.metadata.items() if name != CUSTOM_ID},
    )
    return response_json(draft, status="completed", result=result)


def _was_cut(batch: Batch, result: Result) -> bool:
    """True if the job ended since its batch did."""
    over = batch.cancelling_at is not None or batch.remaining_s <= 0
    return over and result.state in {JobState.CANCELLED, JobState.EXPIRED}


def _end_of(error: Mapping[str, Any]) -> LineEnd:
    return LineEnd.CUT if error.get("code") in _CUT else LineEnd.FAILED


def _response(result: Result, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{result.job_id.hex}", "body": body}


def _line(
    batch: Batch,
    line: EndedLine,
    end: LineEnd,
    *,
    response: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> OutputLine:
    record = {
        "id": f"batch_req_{uuid.uuid5(batch.id, str(line.n)).hex}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return OutputLine(end=end, data=orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
