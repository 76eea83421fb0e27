"""OpenAI's Files and Batches, as far as a batch needs them.

Source: https://platform.openai.com/docs/api-reference/batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from .answers import Rejected
from .batch_runs import Done, Endpoint, Line, Run, Runs, Unanswered, page
from .options import Options
from .stats import Stats

MAX_LINES = 50_000
MAX_FILE_BYTES = 200_000_000
_LISTED_MAX = 100
_MAX_METADATA = 16
_OK = 200
_Json = dict[str, Any]


class OpenAIBatches:
    """Keeps files and batches in memory; `answer` gives an object, or the bytes of a file."""

    def __init__(
        self, endpoints: Mapping[str, Endpoint], stats: Stats, clock: Callable[[], float]
    ) -> None:
        self._endpoints = endpoints
        self._runs = Runs(stats, clock)
        self._files: dict[str, tuple[_Json, bytes]] = {}

    def answer(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, options: Options
    ) -> _Json | bytes:
        """The answer to a request below /v1; Rejected or Unanswered otherwise."""
        kind, _, rest = path.partition("/")
        if kind == "files":
            return self._of_files(method, rest, body, options)
        return self._of_batches(method, rest, query, body, options)

    def _of_files(self, method: str, path: str, body: bytes, options: Options) -> _Json | bytes:
        match method, *path.split("/"):
            case "POST", "":
                return self._upload(body, options)
            case "GET", name:
                return self._file(name)[0]
            case "GET", name, "content":
                return self._file(name)[1]
            case "DELETE", name:
                self._file(name)
                del self._files[name]
                return {"id": name, "object": "file", "deleted": True}
            case _:
                raise Rejected(404, f"Unknown request URL: {method} /v1/files/{path}")

    def _of_batches(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, options: Options
    ) -> _Json:
        match method, *path.split("/"):
            case "POST", "":
                return self._create(_object(body), options)
            case "GET", "":
                return self._list(query, options)
            case "GET", name:
                if "look-hang" in options.batch_faults:
                    raise Unanswered
                return self._shown(self._runs.find(name), options)
            case "POST", name, "cancel":
                run = self._runs.find(name)
                self._runs.cancel(run)
                return self._shown(run, options)
            case _:
                raise Rejected(404, f"Unknown request URL: {method} /v1/batches/{path}")

    # -- files

    def _upload(self, body: bytes, options: Options) -> _Json:
        fields = _form(body)
        purpose, content = fields.get("purpose"), fields.get("file")
        if purpose != b"batch":
            raise Rejected(400, "'purpose' must be batch here.", param="purpose")
        if not content:
            raise Rejected(400, "'file' is missing.", param="file")
        if len(content) > MAX_FILE_BYTES:
            raise Rejected(413, "The file is too large.", param="file")
        shown = self._keep(content, "batch")
        if "upload-hang" in options.batch_faults:
            raise Unanswered
        return shown

    def _keep(self, content: bytes, purpose: str) -> _Json:
        name = f"file-sim{len(self._files) + 1:08d}"
        shown: _Json = {
            "id": name,
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": f"{name}.jsonl",
            "purpose": purpose,
            "status": "processed",
        }
        self._files[name] = (shown, content)
        return shown

    def _file(self, name: str) -> tuple[_Json, bytes]:
        found = self._files.get(name)
        if found is None:
            raise Rejected(404, f"No such File object: {name}", param="id")
        return found

    # -- batches

    def _create(self, wish: _Json, options: Options) -> _Json:
        endpoint = self._endpoints.get(str(wish.get("endpoint")))
        if endpoint is None or "messages" in str(wish.get("endpoint")):
            raise Rejected(400, "Invalid value for 'endpoint'.", param="endpoint")
        if wish.get("completion_window") != "24h":
            raise Rejected(400, "'completion_window' must be 24h.", param="completion_window")
        metadata = wish.get("metadata")
        if metadata is not None and not _is_metadata(metadata):
            raise Rejected(400, "'metadata' must be up to 16 texts.", param="metadata")
        content = self._file(str(wish.get("input_file_id")))[1]
        if "create-deaf" in options.batch_faults:
            raise Unanswered
        lines, errors = _validated(content, str(wish["endpoint"]), options)
        run = self._runs.begin("batch_sim", lines if not errors else [], endpoint, options)
        run.facts = {
            "endpoint": wish["endpoint"],
            "input_file_id": wish["input_file_id"],
            "metadata": metadata,
            "errors": {"object": "list", "data": errors} if errors else None,
            "total": len(lines),
        }
        if "create-hang" in options.batch_faults:
            raise Unanswered
        if "create-502" in options.batch_faults:
            raise Rejected(502, "Bad gateway", kind="server_error")
        return self._shown(run, options)

    def _list(self, query: Mapping[str, str], options: Options) -> _Json:
        runs, has_more = page(
            self._runs.newest(), query.get("limit"), query.get("after"), most=_LISTED_MAX
        )
        data = [self._shown(run, options) for run in runs]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": has_more,
        }

    def _shown(self, run: Run, options: Options) -> _Json:
        failed = run.facts["errors"] is not None
        state = "failed" if failed else self._runs.state(run)
        is_over = state in {"completed", "cancelled", "expired"}
        if is_over and "output_file_id" not in run.facts:
            run.facts.update(self._written(self._runs.results(run, options), state))
        counts = self._runs.counts(run, options)
        at = int(run.created_at)
        ended = {f"{state}_at": int(time.time())} if is_over or failed else {}
        return {
            "id": run.id,
            "object": "batch",
            "endpoint": run.facts["endpoint"],
            "errors": run.facts["errors"],
            "input_file_id": run.facts["input_file_id"],
            "completion_window": "24h",
            "status": state,
            "output_file_id": run.facts.get("output_file_id"),
            "error_file_id": run.facts.get("error_file_id"),
            "created_at": at,
            "in_progress_at": None if failed else at,
            "expires_at": at + 86_400,
            **ended,
            "request_counts": {
                "total": run.facts["total"],
                "completed": counts[_OK],
                "failed": counts.total() - counts[_OK] - counts[0],
            },
            "metadata": run.facts["metadata"],
        }

    def _written(self, results: Sequence[Done], state: str) -> _Json:
        """The files of answers and of errors, where there are any."""
        good = [_written_line(done, state) for done in results if done.status == _OK]
        bad = [_written_line(done, state) for done in results if done.status != _OK]
        return {
            "output_file_id": self._keep(b"".join(good), "batch_output")["id"] if good else None,
            "error_file_id": self._keep(b"".join(bad), "batch_output")["id"] if bad else None,
        }


def _written_line(done: Done, state: str) -> bytes:
    response, error = None, None
    if done.status:
        response = {"status_code": done.status, "request_id": "req-sim", "body": done.body}
    else:
        message = f"This request could not be executed: the batch was {state}."
        error = {"code": f"batch_{state}", "message": message}
    line = {
        "id": f"batch_req_{done.line.custom_id[:40]}",
        "custom_id": done.line.custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(line) + b"\n"


def _validated(content: bytes, endpoint: str, options: Options) -> tuple[list[Line], list[_Json]]:
    """The lines, and what is wrong with them: then there is no batch."""
    if "full" in options.batch_faults:
        return [], [_error("token_limit_exceeded", "Enqueued token limit reached.", None)]
    if "fail" in options.batch_faults:
        return [], [_error("invalid_request", "The batch is refused.", 1)]
    lines: list[Line] = []
    errors: list[_Json] = []
    known: set[str] = set()
    models: set[str] = set()
    for number, raw in enumerate(content.splitlines(), 1):
        if not raw.strip():
            continue
        fault = _line_fault(raw, endpoint, known, models)
        if isinstance(fault, Line):
            lines.append(fault)
        else:
            errors.append(_error(*fault, number))
    if len(lines) > MAX_LINES:
        errors.append(_error("too_many_tasks", f"More than {MAX_LINES} requests.", None))
    if len(models) > 1:
        errors.append(_error("mismatched_model", "All requests must name one model.", None))
    if not lines and not errors:
        errors.append(_error("empty_file", "The file has no requests.", None))
    return lines, errors


def _line_fault(
    raw: bytes, endpoint: str, known: set[str], models: set[str]
) -> Line | tuple[str, str]:
    try:
        item = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return "invalid_json_line", "This line is not parseable as valid JSON."
    custom_id = item.get("custom_id") if isinstance(item, dict) else None
    if not isinstance(custom_id, str) or not custom_id:
        return "missing_required_parameter", "Missing required parameter: 'custom_id'."
    if custom_id in known:
        return "duplicate_custom_id", "The custom_id for this request is a duplicate."
    known.add(custom_id)
    if item.get("method") != "POST" or item.get("url") != endpoint:
        return "invalid_url", "The method and URL must be the batch's."
    body = item.get("body")
    models.add(str(body.get("model")) if isinstance(body, dict) else "")
    return Line(custom_id=custom_id, body=body)


def _error(code: str, message: str, line: int | None) -> _Json:
    return {"code": code, "message": message, "param": None, "line": line}


def _is_metadata(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > _MAX_METADATA:
        return False
    return all(isinstance(text, str) for text in value.values())


def _form(body: bytes) -> dict[str, bytes]:
    """The fields of a multipart form; its first line is the boundary."""
    boundary, _, _ = body.partition(b"\r\n")
    if not boundary.startswith(b"--"):
        raise Rejected(400, "The body is not a form.")
    fields: dict[str, bytes] = {}
    for part in (b"\r\n" + body).split(b"\r\n" + boundary)[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        _, _, rest = head.partition(b'name="')
        fields[rest.partition(b'"')[0].decode("latin-1")] = content
    return fields


def _object(body: bytes) -> _Json:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise Rejected(400, "The body of your request is not a JSON object.")
    return value
