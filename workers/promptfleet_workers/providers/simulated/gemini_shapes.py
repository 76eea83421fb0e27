"""Gemini's shapes: generateContent, streamGenerateContent, batchEmbedContents, and their errors.

The model and the method are parts of the path, so an endpoint is made for each request.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any
from urllib.parse import unquote

import orjson

from .answers import (
    Body,
    Call,
    Rejected,
    answers_to,
    embedding_of,
    read_count,
    read_prompt,
    token_events,
)
from .options import Options

_PATH = re.compile(r"/v1(?:beta|alpha)?/models/([^/:]+):(\w+)")
_FINISH_REASONS = {"stop": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}
_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_RPC = "type.googleapis.com/google.rpc"
_API = "generativelanguage.googleapis.com"
_OVER_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more"
    " information on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits."
)
_USED_UP = "insufficient_quota"
_DEFAULT_DIMENSIONS = 64
_MAX_DIMENSIONS = 3072
_MAX_BATCH = 100


def find(path: str, query: str) -> GenerateContent | EmbedContents | None:
    """The endpoint of a path of Gemini's; None for any other."""
    found = _PATH.fullmatch(unquote(path))
    if found is None:
        return None
    model, method = found[1], found[2]
    if method == "generateContent":
        return GenerateContent(model, stream=False)
    if method == "streamGenerateContent" and "alt=sse" in query.split("&"):
        return GenerateContent(model, stream=True)
    return EmbedContents(model) if method == "batchEmbedContents" else None


def error_payload(rejected: Rejected) -> bytes:
    """Google's error body; how long to wait, and for which quota, stands in it and in no header."""
    error: dict[str, Any] = {
        "code": rejected.status,
        "message": rejected.message,
        "status": _STATUSES.get(rejected.status, "UNKNOWN"),
    }
    if rejected.code == "invalid_api_key":
        error["message"] = "API key not valid. Please pass a valid API key."
    details = _quota_details(rejected)
    if details:
        error["message"] = _OVER_QUOTA
    delay_ms = 22_000 if rejected.code == _USED_UP else rejected.retry_after_ms
    if delay_ms is not None:
        delay = f"{delay_ms / 1000:.3f}s"
        details.append({"@type": f"{_RPC}.RetryInfo", "retryDelay": delay})
    if details:
        error["details"] = details
    return orjson.dumps({"error": error})


def _quota_details(rejected: Rejected) -> list[dict[str, Any]]:
    """The quotas that were exceeded, as Google names them; of a day's, the wait is a short one."""
    violation = {"quotaMetric": f"{_API}/generate_content_requests"}
    if rejected.code == _USED_UP:
        violation |= {"quotaId": "GenerateRequestsPerDayPerProjectPerModel", "quotaValue": "250"}
    elif rejected.limit is None:
        return []
    elif rejected.kind == "requests":
        violation["quotaId"] = "GenerateRequestsPerMinutePerProjectPerModel"
        violation["quotaValue"] = str(rejected.limit)
    else:
        violation["quotaMetric"] = f"{_API}/generate_content_input_token_count"
        violation["quotaId"] = "GenerateContentInputTokensPerModelPerMinute"
        violation["quotaValue"] = str(rejected.limit)
    help_url = "https://ai.google.dev/gemini-api/docs/rate-limits"
    links = [{"description": "Learn more about Gemini API quotas", "url": help_url}]
    return [
        {"@type": f"{_RPC}.Help", "links": links},
        {"@type": f"{_RPC}.QuotaFailure", "violations": [violation]},
    ]


class GenerateContent:
    """POST /v1beta/models/MODEL:generateContent, and :streamGenerateContent?alt=sse.

    Where the request insists on a function, it is called with no arguments.
    """

    def __init__(self, model: str, *, stream: bool) -> None:
        self._model = model
        self._stream = stream
        self._function: str | None = None
        self.path = f"/v1beta/models/{{model}}:{'streamG' if stream else 'g'}enerateContent"

    def read(self, body: Body, options: Options, number: int) -> Call:
        """The request with its answers."""
        contents = body.get("contents")
        if not isinstance(contents, list) or not contents:
            raise Rejected(400, "* GenerateContentRequest.contents: contents is not specified")
        for content in contents:
            if not isinstance(content, dict) or content.get("role") not in {None, "user", "model"}:
                raise Rejected(400, "Please use a valid role: user, model.")
            if not content.get("parts"):
                raise Rejected(400, "* GenerateContentRequest.contents: contents.parts is empty")
        system = body.get("systemInstruction")
        texts = [_text_of(content) for content in ([system] if system else []) + contents]
        prompts = [read_prompt(contents, "\n".join(texts), "contents")]
        config = body.get("generationConfig")
        config = config if isinstance(config, dict) else {}
        self._function = _forced(body)
        asked: dict[str, Any] = {"n": config.get("candidateCount")}
        if config.get("responseMimeType") == "application/json":
            asked["response_format"] = {"type": "json_object"}
        return Call(
            number=number,
            model=self._model,
            prompts=prompts,
            answers=answers_to(prompts, asked, read_count(config, "maxOutputTokens"), options),
            stream=self._stream,
        )

    def payload(self, call: Call) -> bytes:
        """The whole answer."""
        candidates = [
            self._candidate(index, answer.text, answer.finish)
            for index, answer in enumerate(call.answers)
        ]
        return orjson.dumps(self._response(call, candidates, call.output_tokens))

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        tokens, after = [], []
        for index, answer in enumerate(call.answers):
            if self._function is None:
                tokens += token_events(answer.text, partial(self._event, call, index))
            last = self._candidate(index, "", answer.finish)
            after.append(_sse(self._response(call, [last], call.output_tokens)))
        return [], tokens, after

    def error_payload(self, rejected: Rejected) -> bytes:
        """Google's error body."""
        return error_payload(rejected)

    def error_event(self, rejected: Rejected) -> bytes:
        """An error in the middle of a stream."""
        return b"data: %b\n\n" % error_payload(rejected)

    def _event(self, call: Call, index: int, text: str) -> bytes:
        return _sse(self._response(call, [self._candidate(index, text, None)], 0))

    def _candidate(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        part: dict[str, Any] = {"text": text}
        if self._function is not None:
            part = {"functionCall": {"name": self._function, "args": {}}}
        candidate: dict[str, Any] = {
            "content": {"parts": [part], "role": "model"},
            "index": index,
        }
        if finish is not None:
            candidate["finishReason"] = _FINISH_REASONS.get(finish, finish.upper())
        return candidate

    def _response(
        self, call: Call, candidates: list[dict[str, Any]], output_tokens: int
    ) -> dict[str, Any]:
        return {
            "candidates": candidates,
            "usageMetadata": {
                "promptTokenCount": call.input_tokens,
                "candidatesTokenCount": output_tokens,
                "totalTokenCount": call.input_tokens + output_tokens,
            },
            "modelVersion": call.model,
            "responseId": f"sim-{call.number:08d}",
        }


class EmbedContents:
    """POST /v1beta/models/MODEL:batchEmbedContents."""

    path = "/v1beta/models/{model}:batchEmbedContents"

    def __init__(self, model: str) -> None:
        self._model = model

    def read(self, body: Body, options: Options, number: int) -> Call:  # noqa: ARG002 - as the others
        """The request; an embedding has no answer, only its vector."""
        requests = body.get("requests")
        if not isinstance(requests, list) or not 0 < len(requests) <= _MAX_BATCH:
            raise Rejected(400, "* BatchEmbedContentsRequest.requests: 1 to 100 are required")
        texts = []
        for request in requests:
            if not isinstance(request, dict) or request.get("model") != f"models/{self._model}":
                raise Rejected(400, "* EmbedContentRequest.model: unexpected model name format")
            texts.append(_text_of(request.get("content")))
        dimensions = read_count(requests[0], "outputDimensionality", most=_MAX_DIMENSIONS)
        return Call(
            number=number,
            model=self._model,
            prompts=[read_prompt(text, text, "content") for text in texts],
            dimensions=dimensions or _DEFAULT_DIMENSIONS,
        )

    def payload(self, call: Call) -> bytes:
        """A unit vector for each text."""
        vectors = [embedding_of(prompt.text, call.dimensions).tolist() for prompt in call.prompts]
        return orjson.dumps({"embeddings": [{"values": vector} for vector in vectors]})

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Embeddings are never streamed; `read` does not set `stream`."""
        raise NotImplementedError(call)

    def error_payload(self, rejected: Rejected) -> bytes:
        """Google's error body."""
        return error_payload(rejected)

    def error_event(self, rejected: Rejected) -> bytes:
        """Never asked for."""
        return error_payload(rejected)


def _text_of(content: object) -> str:
    """The texts of a content's parts."""
    parts = content.get("parts") if isinstance(content, dict) else None
    texts = [part.get("text") for part in parts or [] if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _forced(body: Body) -> str | None:
    """The function that has to be called, if one has."""
    match body:
        case {
            "tools": [{"functionDeclarations": [{"name": str() as first}, *_]}, *_],
            "toolConfig": {"functionCallingConfig": {"mode": "ANY", **config}},
        }:
            allowed = config.get("allowedFunctionNames")
            return str(allowed[0]) if isinstance(allowed, list) and allowed else first
    return None


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)
