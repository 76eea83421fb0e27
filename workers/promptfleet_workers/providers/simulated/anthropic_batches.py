"""Anthropic's Message Batches.

Source: https://docs.anthropic.com/en/api/creating-message-batches.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from .answers import Rejected
from .batch_runs import Done, Endpoint, Line, Run, Runs, Unanswered, page
from .options import Options
from .stats import Stats

MAX_LINES = 100_000
_LISTED_MAX = 1000
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_Json = dict[str, Any]


class AnthropicBatches:
    """Keeps batches in memory; `answer` gives an object, or the bytes of the results."""

    def __init__(self, messages: Endpoint, stats: Stats, clock: Callable[[], float]) -> None:
        self.host = ""  # where its results are
        self._messages = messages
        self._runs = Runs(stats, clock)

    def answer(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, options: Options
    ) -> _Json | bytes:
        """The answer to a request below /v1/messages/batches; Rejected or Unanswered otherwise."""
        match method, *path.split("/"):
            case "POST", "":
                return self._create(body, options)
            case "GET", "":
                return self._list(query, options)
            case "GET", name:
                if "look-hang" in options.batch_faults:
                    raise Unanswered
                return self._shown(self._runs.find(name), options)
            case "GET", name, "results":
                return self._results(self._runs.find(name), options)
            case "POST", name, "cancel":
                run = self._runs.find(name)
                self._runs.cancel(run)
                return self._shown(run, options)
            case _:
                raise Rejected(404, f"Not found: {method} /v1/messages/batches/{path}")

    def _create(self, body: bytes, options: Options) -> _Json:
        lines = _read(body)
        if "fail" in options.batch_faults:
            raise Rejected(400, "requests: the batch is refused")
        if "full" in options.batch_faults:
            raise Rejected(429, "too many batches are in progress")
        if "create-deaf" in options.batch_faults:
            raise Unanswered
        run = self._runs.begin("msgbatch_sim", lines, self._messages, options)
        if "create-hang" in options.batch_faults:
            raise Unanswered
        if "create-502" in options.batch_faults:
            raise Rejected(502, "Bad gateway")
        return self._shown(run, options)

    def _list(self, query: Mapping[str, str], options: Options) -> _Json:
        runs, has_more = page(
            self._runs.newest(), query.get("limit"), query.get("after_id"), most=_LISTED_MAX
        )
        data = [self._shown(run, options) for run in runs]
        return {
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": has_more,
        }

    def _results(self, run: Run, options: Options) -> bytes:
        state = self._runs.state(run)
        if state in {"in_progress", "cancelling"}:
            raise Rejected(404, "results are available once the batch has ended")
        results = self._runs.results(run, options)
        return b"".join(_written(done, is_expired=state == "expired") for done in results)

    def _shown(self, run: Run, options: Options) -> _Json:
        state = self._runs.state(run)
        is_over = state not in {"in_progress", "cancelling"}
        counts = self._runs.counts(run, options)
        undone = "expired" if state == "expired" else "canceled"
        status = {"in_progress": "in_progress", "cancelling": "canceling"}.get(state, "ended")
        shown = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        shown["succeeded"] = counts[200]
        shown["errored"] = counts.total() - counts[200] - counts[0]
        shown[undone if is_over else "processing"] += counts[0]
        if not is_over:  # nothing but `processing` tells before the end
            shown = {**shown, "processing": len(run.lines), "succeeded": 0, "errored": 0}
        results = f"http://{self.host}/v1/messages/batches/{run.id}/results"
        return {
            "id": run.id,
            "type": "message_batch",
            "processing_status": status,
            "request_counts": shown,
            "ended_at": _instant(dt.datetime.now(tz=dt.UTC).timestamp()) if is_over else None,
            "created_at": _instant(run.created_at),
            "expires_at": _instant(run.created_at + 86_400),
            "archived_at": None,
            "cancel_initiated_at": None if run.cancelled is None else _instant(run.created_at),
            "results_url": results if is_over else None,
        }


def _read(body: bytes) -> list[Line]:
    try:
        wish = orjson.loads(body)
    except orjson.JSONDecodeError:
        wish = None
    requests = wish.get("requests") if isinstance(wish, dict) else None
    if not isinstance(requests, list) or not 1 <= len(requests) <= MAX_LINES:
        raise Rejected(400, f"requests: a list of 1 to {MAX_LINES} is required")
    lines: list[Line] = []
    known: set[str] = set()
    for n, item in enumerate(requests):
        custom_id = item.get("custom_id") if isinstance(item, dict) else None
        if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
            raise Rejected(400, f"requests.{n}.custom_id: 1 to 64 of a-z, A-Z, 0-9, _ and -")
        if custom_id in known:
            raise Rejected(400, f"requests.{n}.custom_id: is not unique")
        known.add(custom_id)
        if not isinstance(item.get("params"), dict):
            raise Rejected(400, f"requests.{n}.params: Field required")
        lines.append(Line(custom_id=custom_id, body=item["params"]))
    return lines


def _written(done: Done, *, is_expired: bool) -> bytes:
    result: _Json
    if done.status == 200:  # noqa: PLR2004 - HTTP's number
        result = {"type": "succeeded", "message": done.body}
    elif done.status:
        result = {"type": "errored", "error": done.body}
    else:
        result = {"type": "expired" if is_expired else "canceled"}
    return orjson.dumps({"custom_id": done.line.custom_id, "result": result}) + b"\n"


def _instant(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC).isoformat().replace("+00:00", "Z")
