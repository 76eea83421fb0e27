"""The provider itself: routes, limits, faults and the timing of its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol
from urllib.parse import parse_qs

import orjson

from . import gemini_shapes
from .answers import Body, Call, Prompt, Rejected
from .anthropic_batches import AnthropicBatches
from .anthropic_shapes import Messages
from .batch_runs import Unanswered
from .faults import FILLER, GATEWAY_PAGE, Blemished, Shape, bomb, refusal
from .http import Ending, Reply, Request, response
from .limits import RateLimits
from .markers import Directive, Fault, FaultKind
from .openai_batches import OpenAIBatches
from .openai_shapes import DONE, ChatCompletions, Completions, Embeddings, error_payload
from .options import Options
from .stats import Stats

_CLOSE = b"connection: close\r\n"
_MESSAGE_BATCHES = "/v1/messages/batches"
_BATCH_PATHS = ("/v1/files", "/v1/batches", _MESSAGE_BATCHES)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\n%b\r\n"
)
_SLOW_PIECES = 10
# What still is the whole answer, however long it takes.
_WHOLE = frozenset({FaultKind.SLOW, FaultKind.DRIP, FaultKind.NUL, FaultKind.SURROGATE})


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

    def error_event(self, rejected: Rejected) -> bytes:
        """An error in the middle of a stream."""
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
        self._openai_batches = OpenAIBatches(self._inference, self.stats, clock)
        messages = self._inference[Messages.path]
        self._anthropic_batches = AnthropicBatches(messages, self.stats, clock)
        self._others: dict[str, dict[str, Callable[[Request], Reply]]] = {
            "/v1/models": {"GET": self._models},
            "/health": {"GET": self._health},
            "/stats": {"GET": self._stats},
            "/control": {"GET": self._control, "POST": self._control},
        }

    def answer(self, request: Request, /) -> Reply:
        """The reply to any request."""
        endpoint = self._inference.get(request.path)
        if endpoint is None:
            endpoint = gemini_shapes.find(request.path, request.query)
        if request.method == "HEAD":
            request.keep_alive = False  # its reply has a body here, which would confuse the next
        try:
            if endpoint is not None:
                return self._infer(endpoint, request)
            if request.path.startswith(_BATCH_PATHS):
                return self._batch(request)
            return self._other(request)
        except Rejected as rejected:
            if endpoint is None and request.path.startswith(_MESSAGE_BATCHES):
                endpoint = self._inference[Messages.path]
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
        answered = fault is None or fault.kind in _WHOLE
        if answered:
            self.stats.input_tokens += call.input_tokens
            self.stats.output_tokens += call.output_tokens
        reply.on_end = partial(self._ended, call, answered)
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

    def _ended(self, call: Call, answered: bool, completed: bool) -> None:  # noqa: FBT001
        self.stats.in_flight -= 1
        if not completed:
            self.stats.client_disconnects += 1
            self.stats.stream_disconnects += call.stream
        if not (answered and completed):
            for prompt in call.prompts:
                self.stats.failed(prompt.digest)

    # -- replies

    def _good_reply(self, endpoint: Shape, request: Request, call: Call, delay_s: float) -> Reply:
        if call.stream:
            return self._stream_reply(endpoint, request, call, delay_s)
        options = self.options
        if call.answers:
            delay_s += options.first_token_ms / 1000
            if options.tokens_per_s:
                delay_s += max([answer.tokens for answer in call.answers]) / options.tokens_per_s
        payload = response(200, endpoint.payload(call), headers=self._headers(request))
        return Reply([(delay_s, payload)], _ending(request))

    def _stream_reply(self, endpoint: Shape, request: Request, call: Call, delay_s: float) -> Reply:
        before, tokens, after = endpoint.events(call)
        frame, end, ending = self._framing(request)
        head = self._stream_head(request)
        steps = [(delay_s, head + b"".join(map(frame, before)))]
        wait_s = self.options.first_token_ms / 1000
        for token in tokens:
            steps.append((wait_s, frame(token)))
            wait_s = 1 / self.options.tokens_per_s if self.options.tokens_per_s else 0.0
        steps.append((0.0, b"".join(map(frame, after)) + end))
        return Reply(_joined(steps), ending)

    def _stream_head(self, request: Request) -> bytes:
        headers = self._headers(request)
        return _STREAM_HEAD % (
            headers + b"transfer-encoding: chunked\r\n" if request.chunked else headers
        )

    def _framing(self, request: Request) -> tuple[Callable[[bytes], bytes], bytes, Ending]:
        """How an event is written, what ends the body, and what becomes of the connection."""
        if request.chunked:
            return _chunk, b"0\r\n\r\n", _ending(request)
        return bytes, b"", Ending.CLOSE

    def _faulty_reply(
        self, endpoint: Endpoint, request: Request, call: Call, delay_s: float, fault: Fault
    ) -> Reply:
        kind = fault.kind
        self.stats.faults[kind.value] += 1
        match kind:
            case FaultKind.STATUS | FaultKind.QUOTA | FaultKind.OVERLOAD | FaultKind.HTML:
                reply = self._refused(endpoint, request, delay_s, fault)
            case FaultKind.TIMEOUT:
                reply = Reply([], Ending.HANG)
            case FaultKind.DISCONNECT:
                reply = Reply([(delay_s, b"")], Ending.ABORT)
            case FaultKind.ERROR_BODY | FaultKind.ERROR_EVENT:
                reply = self._error_reply(endpoint, request, call, delay_s, fault)
            case FaultKind.ENDLESS:
                reply = self._odd_body(request, call, delay_s, FILLER, Ending.REPEAT)
            case FaultKind.BOMB:
                reply = self._odd_body(request, call, delay_s, bomb(), _ending(request))
            case FaultKind.BAD_UTF8 | FaultKind.NUL | FaultKind.SURROGATE:
                reply = self._good_reply(Blemished(endpoint, kind), request, call, delay_s)
            case FaultKind.CUT:
                reply = self._good_reply(endpoint, request, _without_finish(call), delay_s)
                reply = _without_done(reply)
            case _:
                reply = self._spoiled(kind, self._good_reply(endpoint, request, call, delay_s))
        return reply

    def _refused(self, endpoint: Endpoint, request: Request, delay_s: float, fault: Fault) -> Reply:
        if fault.kind is FaultKind.HTML:
            self.stats.rejected[fault.status] += 1
            page = self._whole(
                request, GATEWAY_PAGE, status=fault.status, content_type=b"text/html"
            )
        else:
            rejected = refusal(fault, is_anthropic=isinstance(endpoint, Messages))
            [(_, page)] = self._rejection(request, rejected, endpoint.error_payload).steps
        return Reply([(delay_s, page)], _ending(request))

    def _spoiled(self, kind: FaultKind, good: Reply) -> Reply:
        """A good reply that goes wrong on its way."""
        match kind:
            case FaultKind.SLOW:
                return self._trickle(good)
            case FaultKind.DRIP:
                whole = b"".join(data for _, data in good.steps)
                pause_s = self.options.drip_ms / 1000
                return Reply([(pause_s, whole[n : n + 1]) for n in range(len(whole))], good.ending)
            case FaultKind.STALL:
                return _cut(good, Ending.HANG)
            case FaultKind.RESET:
                return _cut(good, Ending.ABORT)
            case _:
                return _cut(good, Ending.CLOSE)

    def _error_reply(
        self, endpoint: Endpoint, request: Request, call: Call, delay_s: float, fault: Fault
    ) -> Reply:
        """A success that tells of an error: at once, or in the middle of a stream."""
        rejected = refusal(fault, is_anthropic=isinstance(endpoint, Messages))
        if fault.kind is FaultKind.ERROR_BODY or not call.stream:
            payload = self._whole(request, endpoint.error_payload(rejected))
            return Reply([(delay_s, payload)], _ending(request))
        before, tokens, _ = endpoint.events(call)
        half = [*before, *tokens[: len(tokens) // 2], endpoint.error_event(rejected)]
        frame, end, ending = self._framing(request)
        body = b"".join(map(frame, half)) + end
        return Reply([(delay_s, self._stream_head(request) + body)], ending)

    def _odd_body(
        self, request: Request, call: Call, delay_s: float, body: bytes, ending: Ending
    ) -> Reply:
        """A body of unusual size; one of gzip if it is the bomb."""
        kind = b"text/event-stream" if call.stream else b"application/json"
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % kind + self._headers(request)
        if body is not FILLER:
            head += b"content-encoding: gzip\r\n"
        if not request.chunked:
            ending = Ending.CLOSE if ending is Ending.KEEP else ending
            return Reply([(delay_s, head + b"\r\n"), (0.0, body)], ending)
        head += b"transfer-encoding: chunked\r\n\r\n"
        end = b"" if ending is Ending.REPEAT else b"0\r\n\r\n"
        return Reply([(delay_s, head), (0.0, _chunk(body) + end)], ending)

    def _whole(
        self,
        request: Request,
        payload: bytes,
        headers: bytes = b"",
        *,
        status: int = 200,
        content_type: bytes = b"application/json",
    ) -> bytes:
        headers += self._headers(request)
        return response(status, payload, headers=headers, content_type=content_type)

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
        if rejected.retry_after_ms is not None and not _is_gemini(shape):
            headers += b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (
                -(-rejected.retry_after_ms // 1000),
                rejected.retry_after_ms,
            )
        payload = response(rejected.status, shape(rejected), headers=headers)
        return Reply([(0.0, payload)], _ending(request))

    def _headers(self, request: Request) -> bytes:
        lines = b"x-request-id: req-sim-%08d\r\n" % self._number
        limited = self.options.rpm or self.options.tpm
        if limited and gemini_shapes.find(request.path, request.query) is None:
            lines += self._limits.headers(self.options, self._clock())
        return lines if request.keep_alive else lines + _CLOSE

    # -- checks

    def _check_key(self, request: Request) -> None:
        key = self.options.api_key
        if key is None:
            return
        given = {request.headers.get(b"x-api-key"), request.headers.get(b"x-goog-api-key")}
        if (
            key.encode() not in given
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
                limit=refusal.value,
            )

    # -- batches

    def _batch(self, request: Request) -> Reply:
        self._check_key(request)
        query = {name: values[0] for name, values in parse_qs(request.query).items()}
        path = request.path.removeprefix("/v1/").strip("/")
        body = bytes(request.body)
        answer = self._openai_batches.answer
        if request.path.startswith(_MESSAGE_BATCHES):
            answer = self._anthropic_batches.answer
            path = request.path.removeprefix(_MESSAGE_BATCHES).strip("/")
            self._anthropic_batches.host = request.headers.get(b"host", b"").decode("latin-1")
        self.stats.requests[f"{request.method} batches"] += 1
        try:
            value = answer(request.method, path, query, body, self.options)
        except Unanswered:
            return Reply([], Ending.HANG)
        if isinstance(value, dict):
            return self._json(request, value)
        whole = self._whole(request, value, content_type=b"application/x-jsonl")
        reply = Reply([(0.0, whole)], _ending(request))
        if "results-cut" in self.options.batch_faults:
            return _cut(reply, Ending.ABORT)
        return _cut(reply, Ending.HANG) if "results-hang" in self.options.batch_faults else reply

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


def _is_gemini(shape: Callable[[Rejected], bytes]) -> bool:
    """True for an API whose bodies say how long to wait, and whose headers don't."""
    owner = getattr(shape, "__self__", None)
    return isinstance(owner, gemini_shapes.GenerateContent | gemini_shapes.EmbedContents)


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


def _cut(reply: Reply, ending: Ending) -> Reply:
    """The first half, and then that end."""
    whole = b"".join(data for _, data in reply.steps)
    return Reply([(reply.steps[0][0], whole[: len(whole) // 2])], ending)


def _without_finish(call: Call) -> Call:
    answers = [dataclasses.replace(answer, finish=None) for answer in call.answers]
    return dataclasses.replace(call, answers=answers)


def _without_done(reply: Reply) -> Reply:
    """A stream without the word of its end, well-formed as HTTP."""
    steps = [
        (delay_s, data.replace(_chunk(DONE), b"").replace(DONE, b""))
        for delay_s, data in reply.steps
    ]
    return Reply(steps, reply.ending)


def _json_object(raw: bytes | bytearray) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Rejected(400, f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(body, dict):
        raise Rejected(400, "The body of your request is not a JSON object.")
    return body
