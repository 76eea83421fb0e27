"""The provider itself: routes, limits, faults and the timing of its answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol
from urllib.parse import parse_qs

import orjson

from .answers import Body, Call, Prompt, Rejected
from .anthropic_shapes import Messages
from .http import Ending, Reply, Request, response
from .limits import RateLimits
from .markers import Directive, Fault, FaultKind
from .openai_shapes import ChatCompletions, Completions, Embeddings, error_payload
from .options import Options
from .stats import Stats

_CLOSE = b"connection: close\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\n%b\r\n"
)
_GATEWAY_PAGE = (
    b"<html><head><title>Bad Gateway</title></head>"
    b"<body><center><h1>Bad Gateway</h1></center><hr>simulated</body></html>"
)
_SLOW_PIECES = 10
_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 429: "requests"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class Endpoint(Protocol):
    """One inference endpoint in one API's shape."""

    path: str

    def read(self, body: Body, options: Options, number: int) -> Call:
        """The request with its answers; Rejected when it is not valid."""
        ...

    def payload(self, call: Call) -> bytes:
        """The body of the whole answer."""
        ...

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """What is sent before the first token, for each token, and after the last one."""
        ...

    def error_payload(self, rejected: Rejected) -> bytes:
        """The body of an error reply."""
        ...


class SimulatedProvider:
    """Answers requests by its options, and counts them; `clock` gives steady seconds."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self.stats = Stats()
        self._clock = clock
        self._limits = RateLimits()
        self._number = 0
        endpoints: Sequence[Endpoint] = (ChatCompletions(), Completions(), Embeddings(), Messages())
        self._inference = {endpoint.path: endpoint for endpoint in endpoints}
        self._others: dict[str, dict[str, Callable[[Request], Reply]]] = {
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._health},
            "/stats": {"GET": self._stats},
            "/control": {"GET": self._control, "POST": self._control},
        }

    def answer(self, request: Request, /) -> Reply:
        """The reply to any request."""
        endpoint = self._inference.get(request.path)
        if request.method == "HEAD":
            request.keep_alive = False  # its reply has a body here, which would confuse the next
        try:
            if endpoint is not None:
                return self._infer(endpoint, request)
            return self._other(request)
        except Rejected as rejected:
            shape = error_payload if endpoint is None else endpoint.error_payload
            return self._rejection(request, rejected, shape)

    # -- inference

    def _infer(self, endpoint: Endpoint, request: Request) -> Reply:
        if request.method != "POST":
            raise Rejected(405, f"Not allowed: {request.method} {request.path}")
        self._number += 1
        self.stats.requests[endpoint.path] += 1
        self._check_key(request)
        call = endpoint.read(_json_object(request.body), self.options, self._number)
        self._check_model(call.model)
        if self.options.limited:
            self._check_limits(call)
        return self._admitted(endpoint, request, call)

    def _admitted(self, endpoint: Endpoint, request: Request, call: Call) -> Reply:
        directive, decisive, nth = self._count(call.prompts)
        fault = self._fault(directive, decisive.digest, nth)
        self.stats.begin()
        delay_s = self._latency_s(directive, decisive.digest, nth)
        if fault is None:
            reply = self._good_reply(endpoint, request, call, delay_s)
        else:
            reply = self._faulty_reply(endpoint, request, call, delay_s, fault)
        answered = fault is None or fault.kind is FaultKind.SLOW
        if answered:
            self.stats.input_tokens += call.input_tokens
            self.stats.output_tokens += call.output_tokens
        reply.on_end = partial(self._ended, call.prompts, answered)
        return reply

    def _count(self, prompts: list[Prompt]) -> tuple[Directive | None, Prompt, int]:
        """Count the prompts; the one whose markers decide (or the first), and its call number."""
        self.stats.prompts += len(prompts)
        decisive = prompts[0]
        nth = self.stats.call_of(decisive.digest)
        for prompt in prompts[1:]:
            number = self.stats.call_of(prompt.digest)
            if decisive.directive is None and prompt.directive is not None:
                decisive, nth = prompt, number
        return decisive.directive, decisive, nth

    def _fault(self, directive: Directive | None, digest: bytes, nth: int) -> Fault | None:
        if directive is not None and directive.fault is not None:
            return directive.fault_of_call(nth)
        if not self.options.errors:
            return None
        draw = self._draw(b"errors", digest, nth)
        return next((fault for total, fault in self.options.errors if draw < total), None)

    def _latency_s(self, directive: Directive | None, digest: bytes, nth: int) -> float:
        if directive is not None and directive.latency_ms is not None:
            return directive.latency_ms / 1000
        low, high = self.options.latency_ms
        if low == high:
            return low / 1000
        return (low + (high - low) * self._draw(b"latency", digest, nth)) / 1000

    def _draw(self, purpose: bytes, digest: bytes, nth: int) -> float:
        """Evenly from [0, 1), decided by the seed, the prompt and which call of it this is."""
        seed = b"%b:%d:%d:" % (purpose, self.options.seed, nth)
        return int.from_bytes(hashlib.sha256(seed + digest).digest()[:6]) / 2**48

    def _ended(self, prompts: list[Prompt], answered: bool, completed: bool) -> None:  # noqa: FBT001
        self.stats.in_flight -= 1
        if not completed:
            self.stats.client_disconnects += 1
        if not (answered and completed):
            for prompt in prompts:
                self.stats.failed(prompt.digest)

    # -- replies

    def _good_reply(
        self, endpoint: Endpoint, request: Request, call: Call, delay_s: float
    ) -> Reply:
        if call.stream:
            return self._stream_reply(endpoint, request, call, delay_s)
        options = self.options
        if call.answers:
            delay_s += options.first_token_ms / 1000
            if options.tokens_per_s:
                delay_s += max([answer.tokens for answer in call.answers]) / options.tokens_per_s
        payload = response(200, endpoint.payload(call), headers=self._headers(request))
        return Reply([(delay_s, payload)], _ending(request))

    def _stream_reply(
        self, endpoint: Endpoint, request: Request, call: Call, delay_s: float
    ) -> Reply:
        headers = self._headers(request)
        if request.chunked:
            headers += b"transfer-encoding: chunked\r\n"
        head = _STREAM_HEAD % headers
        before, tokens, after = endpoint.events(call)
        frame = _chunk if request.chunked else bytes
        steps = [(delay_s, head + b"".join(map(frame, before)))]
        wait_s = self.options.first_token_ms / 1000
        for token in tokens:
            steps.append((wait_s, frame(token)))
            wait_s = 1 / self.options.tokens_per_s if self.options.tokens_per_s else 0.0
        end = b"0\r\n\r\n" if request.chunked else b""
        steps.append((0.0, b"".join(map(frame, after)) + end))
        steps = _joined(steps)
        return Reply(steps, _ending(request) if request.chunked else Ending.CLOSE)

    def _faulty_reply(
        self, endpoint: Endpoint, request: Request, call: Call, delay_s: float, fault: Fault
    ) -> Reply:
        self.stats.faults[fault.kind.value] += 1
        match fault.kind:
            case FaultKind.STATUS:
                reply = self._rejection(request, _scripted(fault), endpoint.error_payload)
                reply.steps = [(delay_s, reply.steps[0][1])]
                return reply
            case FaultKind.HTML:
                headers = self._headers(request)
                page = response(
                    fault.status, _GATEWAY_PAGE, headers=headers, content_type=b"text/html"
                )
                self.stats.rejected[fault.status] += 1
                return Reply([(delay_s, page)], _ending(request))
            case FaultKind.TIMEOUT:
                return Reply([], Ending.HANG)
            case FaultKind.DISCONNECT:
                return Reply([(delay_s, b"")], Ending.ABORT)
            case FaultKind.TRUNCATE | FaultKind.SLOW:
                good = self._good_reply(endpoint, request, call, delay_s)
                return _cut(good) if fault.kind is FaultKind.TRUNCATE else self._trickle(good)

    def _trickle(self, reply: Reply) -> Reply:
        whole = b"".join(data for _, data in reply.steps)
        size = -(-len(whole) // _SLOW_PIECES)
        wait_s = self.options.slow_ms / 1000 / (_SLOW_PIECES - 1)
        steps = [(wait_s, whole[at : at + size]) for at in range(size, len(whole), size)]
        return Reply([(reply.steps[0][0], whole[:size]), *steps], reply.ending)

    def _rejection(
        self, request: Request, rejected: Rejected, shape: Callable[[Rejected], bytes]
    ) -> Reply:
        self.stats.rejected[rejected.status] += 1
        headers = self._headers(request)
        if rejected.retry_after_ms is not None:
            headers += b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (
                -(-rejected.retry_after_ms // 1000),
                rejected.retry_after_ms,
            )
        payload = response(rejected.status, shape(rejected), headers=headers)
        return Reply([(0.0, payload)], _ending(request))

    def _headers(self, request: Request) -> bytes:
        lines = b"x-request-id: req-sim-%08d\r\n" % self._number
        if self.options.rpm or self.options.tpm:
            lines += self._limits.headers(self.options, self._clock())
        return lines if request.keep_alive else lines + _CLOSE

    # -- checks

    def _check_key(self, request: Request) -> None:
        key = self.options.api_key
        if key is None:
            return
        given = request.headers.get(b"x-api-key")
        if (
            given != key.encode()
            and request.headers.get(b"authorization") != b"Bearer " + key.encode()
        ):
            raise Rejected(401, "Incorrect API key provided.", code="invalid_api_key")

    def _check_model(self, model: str) -> None:
        if self.options.models and model not in self.options.models:
            message = f"The model `{model}` does not exist or you do not have access to it."
            raise Rejected(404, message, param="model", code="model_not_found")

    def _check_limits(self, call: Call) -> None:
        refusal = self._limits.admit(
            self.options,
            tokens=call.input_tokens + call.output_tokens,
            in_flight=self.stats.in_flight,
            now=self._clock(),
        )
        if refusal is not None:
            raise Rejected(
                429,
                refusal.message,
                kind=refusal.limit,
                code="rate_limit_exceeded",
                retry_after_ms=refusal.retry_after_ms,
            )

    # -- the rest

    def _other(self, request: Request) -> Reply:
        methods = self._others.get(request.path)
        if methods is None:
            raise Rejected(404, f"Unknown request URL: {request.method} {request.path}")
        if request.method not in methods:
            raise Rejected(405, f"Not allowed: {request.method} {request.path}")
        return methods[request.method](request)

    def _models(self, request: Request) -> Reply:
        self._check_key(request)
        names = self.options.models or ("simulated",)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "promptfleet"}
            for name in names
        ]
        return self._json(request, {"object": "list", "data": data})

    def _health(self, request: Request) -> Reply:
        return self._json(request, {"status": "ok"})

    def _stats(self, request: Request) -> Reply:
        by_prompt = parse_qs(request.query).get("prompts") == ["1"]
        return self._json(request, self.stats.as_dict(by_prompt=by_prompt))

    def _control(self, request: Request) -> Reply:
        if request.method == "POST":
            changes = dict(_json_object(request.body))
            reset = changes.pop("reset", False)
            try:
                self.options = self.options.changed(changes)
            except ValueError as error:
                raise Rejected(400, str(error)) from None
            if reset is True:
                self.stats.clear()
                self._limits.clear()
        return self._json(request, self.options.as_dict())

    def _json(self, request: Request, value: object) -> Reply:
        headers = b"" if request.keep_alive else _CLOSE
        payload = response(200, orjson.dumps(value), headers=headers)
        return Reply([(0.0, payload)], _ending(request))


def _ending(request: Request) -> Ending:
    return Ending.KEEP if request.keep_alive else Ending.CLOSE


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _joined(steps: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """What is due at the same time is one write."""
    joined: list[tuple[float, list[bytes]]] = []
    for delay_s, data in steps:
        if joined and not delay_s:
            joined[-1][1].append(data)
        else:
            joined.append((delay_s, [data]))
    return [(delay_s, b"".join(parts)) for delay_s, parts in joined]


def _cut(reply: Reply) -> Reply:
    whole = b"".join(data for _, data in reply.steps)
    return Reply([(reply.steps[0][0], whole[: len(whole) // 2])], Ending.CLOSE)


def _scripted(fault: Fault) -> Rejected:
    default = "server_error" if fault.status >= 500 else "invalid_request_error"  # noqa: PLR2004
    return Rejected(
        fault.status,
        f"Simulated failure with status {fault.status}.",
        kind=_TYPES.get(fault.status, default),
        code=fault.code or _CODES.get(fault.status),
        retry_after_ms=fault.retry_after_ms,
    )


def _json_object(raw: bytes | bytearray) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Rejected(400, f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(body, dict):
        raise Rejected(400, "The body of your request is not a JSON object.")
    return body
