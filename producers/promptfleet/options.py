"""The options of a prompt: what each may be, checked one by one with errors that name the field."""

from __future__ import annotations

import datetime as dt
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypedDict, TypeGuard

import orjson

from promptfleet import context_options, tier_options
from promptfleet.context_options import ContextOption, ContextPolicyName, MemoryOption
from promptfleet.tier_options import EscalateOption
from promptfleet_shared.egress import check_url
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import (
    MAX_PRIORITY,
    CacheMode,
    CacheOptions,
    JobKind,
    OnUnknown,
    Service,
)
from promptfleet_shared.tiers import TIER_NAME

MAX_METADATA_BYTES = 16 * 1024
MAX_KEY_CHARS = 255
MAX_NAME_CHARS = 255
MAX_STOP = 4
MAX_TOOLS = 128
MAX_TTL_S = 365 * 86_400
MAX_DEADLINE_S = 365 * 86_400.0
_INT64 = 2**63


class PromptOptions(TypedDict, total=False):
    """How a prompt is to be answered; None means the same as leaving the option out.

    Attributes:
        tier: Which models answer, e.g. "basic", or "auto" to have it chosen by what the prompt
            needs; the fleet's default tier without it.
        model: One model of the fleet instead of the tier's own choice.
        system: The system message, put before the others.
        max_tokens: Tokens that the answer may have at most.
        temperature: From 0 to 2.
        top_p: From 0 to 1.
        stop: One string, or up to four, that end the answer.
        seed: A 64-bit integer, for providers that can repeat an answer.
        response_format: E.g. `{"type": "json_object"}`; the order of its keys is kept.
        tools: The functions that the model may call, as the provider takes them.
        tool_choice: "auto", "none", "required" or the provider's object that names one.
        metadata: JSON of yours, up to 16 KiB, given back with the result.
        priority: From 0 to 9, the most urgent; 5 without it. It counts among the tenant's own jobs.
        concurrency_key: Up to 255 characters; of the tenant's jobs with the same key only so many
            are in flight as fleet.toml's [fairness] says, and the others wait.
        limit_key: Up to 255 characters; of the tenant's jobs with the same key only so many are
            called as the rules `per = "limit_key"` of fleet.toml's [limits] say.
        deadline: Until when an answer is of use: an aware datetime, or seconds from now.
        idempotency_key: Up to 255 characters; the same key with the same request is one job.
        callback_url: Where the result is posted, signed.
        cache: True or "use", False or "off", "refresh", "only" (fail where no answer is known,
            with the code `cache_miss`), or `CacheOptions`.
        kind: "chat", "completion" or "embedding".
        on_unknown: What becomes of a job when nobody knows whether its call was answered, and
            billed: "retry", or "fail" where nothing may be done twice. "retry" without it.
        stream: True to read the answer as it comes, by `tokens()` or `stream()` of the job.
        service: "batch" to have it answered by its provider's batch API, at half price and within
            a day; "auto" for that if its deadline is far enough; "standard" without it.
        session_id: Up to 255 characters; prompts of one session go to the same deployment, whose
            prefix cache knows them, while it is well and not overloaded.
        attributes: What you know of the prompt, for `tier="auto"`: e.g. `needs_reasoning`,
            `critical_task`, or whatever the conditions of fleet.toml ask for.
        complexity: How hard it is, for `tier="auto"`: "low", "medium", "high", or 1 to 10.
        escalate_on: What is wrong with an answer, so that the job goes on to the next tier; False
            for nothing. The tier's own checks without it.
        context: What becomes of a chat that is too long for every model that may answer it: the
            name of a policy, or `ContextOption`. What fleet.toml says without it.
        memory_id: Up to 255 characters; chats with the same one are one conversation: each is told
            what was said before, and its turn is remembered. They are answered one by one.
        memory: How much of its conversation the job is told; see `MemoryOption`.
        compact: True to leave out of its texts what changes nothing, such as white space around
            JSON; False for its texts as they are. What fleet.toml says without it.
    """

    tier: str | None
    model: str | None
    system: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    response_format: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    priority: int | None
    concurrency_key: str | None
    limit_key: str | None
    deadline: dt.datetime | dt.timedelta | float | None
    idempotency_key: str | None
    callback_url: str | None
    cache: bool | Literal["use", "refresh", "only", "off"] | CacheOptions | None
    kind: Literal["chat", "completion", "embedding"] | JobKind | None
    on_unknown: Literal["retry", "fail"] | OnUnknown | None
    stream: bool | None
    service: Literal["standard", "batch", "auto"] | Service | None
    attributes: Mapping[str, Any] | None
    complexity: tier_options.Complexity | None
    escalate_on: EscalateOption | None
    session_id: str | None
    context: ContextPolicyName | ContextOption | None
    memory_id: str | None
    memory: MemoryOption | None
    compact: bool | None


def refuse(field: str, accepted: str, value: object) -> NoReturn:
    """Refuse a value; only its type is told, since it could be a prompt or a secret.

    Raises:
        InvalidRequestError: Always.
    """
    msg = f"{field}: must be {accepted}; the {_kind_of(value)} that was given is not"
    raise InvalidRequestError(msg, field=field)


def check_option(name: str, value: object) -> Any:
    """The value as a job keeps it.

    Raises:
        InvalidRequestError: There is no such option, or it can't have this value.
    """
    check = _CHECKS.get(name)
    if check is None:
        near = difflib.get_close_matches(name, _CHECKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidRequestError(f"{name}: there is no such option{hint}", field=name)
    return check(value, name)


def deadline_seconds(value: object, now: Callable[[], dt.datetime]) -> float:
    """Seconds from now until the deadline."""
    accepted = "an aware datetime in the future, or a timedelta or seconds up to a year"
    seconds: object = value
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise InvalidRequestError(
                "deadline: must be an aware datetime; a naive one has no time zone",
                field="deadline",
            )
        seconds = (value - now()).total_seconds()
    elif isinstance(value, dt.timedelta):
        seconds = value.total_seconds()
    if not _is_number(seconds) or not 0 < seconds <= MAX_DEADLINE_S:
        refuse("deadline", accepted, value)
    return float(seconds)


def callback_url(value: object, *, allow_loopback: bool) -> str:
    """Where a callback may be posted; the URL in its one normal form.

    Raises:
        InvalidRequestError: It is no URL that strangers may have requests sent to.
        BlockedAddressError: Its host is an address that is not public.
    """
    if not isinstance(value, str):
        refuse("callback_url", "an https:// URL", value)
    return check_url(value, field="callback_url", allow_loopback=allow_loopback).url


def to_json(value: object, field: str) -> bytes:
    """JSON bytes with the keys in the caller's order.

    Raises:
        InvalidRequestError: It holds a lone surrogate, or something that JSON has no form for.
    """
    try:
        return orjson.dumps(value, default=plain)
    except TypeError as error:  # orjson tells types, never values
        raise InvalidRequestError(f"{field}: {_explain(error)}", field=field) from None


def plain(value: object) -> object:
    """What orjson can't write by itself: other mappings and sequences."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")


def _explain(error: TypeError) -> str:
    text = str(error)
    if "surrogates" in text:
        return "holds a lone surrogate, which is no character; UTF-8 and JSON have no form for it"
    return text[:1].lower() + text[1:]


def _kind_of(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object, longest: int) -> bool:
    """True for what a text column can hold."""
    if not isinstance(value, str) or not 0 < len(value) <= longest or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)


def _name(value: object, field: str, longest: int = MAX_NAME_CHARS) -> str:
    if not isinstance(value, str) or not _is_text(value, longest):
        refuse(field, f"a str of 1 to {longest} characters without NUL or lone surrogates", value)
    return str(value)


def _tier(value: object, field: str) -> str:
    if not isinstance(value, str) or not TIER_NAME.fullmatch(value):
        refuse(field, "a tier's name: lower-case letters, digits, - and _", value)
    return str(value)


def _system(value: object, field: str) -> str:
    if not isinstance(value, str) or not value:
        refuse(field, "a str that is not empty", value)
    return value


def _max_tokens(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        refuse(field, "an int from 1", value)
    return value


def _temperature(value: object, field: str) -> float:
    return _number(value, field, 2)


def _top_p(value: object, field: str) -> float:
    return _number(value, field, 1)


def _number(value: object, field: str, most: int) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 <= value <= most  # NaN is not
    ):
        refuse(field, f"a number from 0 to {most}", value)
    return value


def _stop(value: object, field: str) -> str | list[str]:
    if isinstance(value, str) and value:
        return value
    accepted = f"a str or 1 to {MAX_STOP} of them, none of them empty"
    if isinstance(value, str) or not isinstance(value, Sequence):
        refuse(field, accepted, value)
    if not 1 <= len(value) <= MAX_STOP:
        refuse(field, accepted, value)
    for n, item in enumerate(value):
        if not isinstance(item, str) or not item:
            refuse(f"{field}[{n}]", "a str that is not empty", item)
    return list(value)


def _seed(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -_INT64 <= value < _INT64:
        refuse(field, "a 64-bit int", value)
    return value


# As a fragment, since a schema's order of keys is the order in which the model answers.
def _response_format(value: object, field: str) -> orjson.Fragment:
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        refuse(field, 'a mapping with a "type", e.g. {"type": "json_object"}', value)
    return orjson.Fragment(to_json(value, field))


def _tools(value: object, field: str) -> orjson.Fragment:
    accepted = f"a sequence of 1 to {MAX_TOOLS} mappings"
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse(field, accepted, value)
    if not 1 <= len(value) <= MAX_TOOLS:
        refuse(field, accepted, value)
    for n, item in enumerate(value):
        if not isinstance(item, Mapping):
            refuse(f"{field}[{n}]", "a mapping", item)
    return orjson.Fragment(to_json(value, field))


def _tool_choice(value: object, field: str) -> str | orjson.Fragment:
    if isinstance(value, Mapping):
        return orjson.Fragment(to_json(value, field))
    if not isinstance(value, str) or not value:
        refuse(field, 'a str such as "auto", or a mapping', value)
    return value


def _metadata(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        refuse(field, "a mapping with str keys", value)
    dumped = to_json(value, field)
    if len(dumped) > MAX_METADATA_BYTES:
        msg = f"{field}: must be at most {MAX_METADATA_BYTES} bytes of JSON, not {len(dumped)}"
        raise InvalidRequestError(msg, field=field)
    if b"\\u0000" in dumped.replace(b"\\\\", b""):
        msg = f"{field}: holds a NUL character, which the database's jsonb has no form for"
        raise InvalidRequestError(msg, field=field)
    snapshot: dict[str, Any] = orjson.loads(dumped)  # the caller may change theirs
    return snapshot


def _priority(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_PRIORITY:
        refuse(field, f"an int from 0 to {MAX_PRIORITY}, the most urgent", value)
    return value


def _as_given(value: object, field: str) -> object:  # noqa: ARG001  # needs more than itself: see above
    return value


def _idempotency_key(value: object, field: str) -> str:
    return _name(value, field, MAX_KEY_CHARS)


def _cache(value: object, field: str) -> CacheOptions:
    if isinstance(value, CacheOptions):
        return _cache_options(value, field)
    if isinstance(value, bool):
        return CacheOptions(mode=CacheMode.USE if value else CacheMode.OFF)
    return CacheOptions(mode=_cache_mode(value, field))


def _cache_mode(value: object, field: str) -> CacheMode:
    if isinstance(value, str):
        for mode in CacheMode:
            if mode == value:
                return mode
    refuse(field, 'True, False, "use", "refresh", "only", "off" or CacheOptions', value)


def _cache_options(value: CacheOptions, field: str) -> CacheOptions:
    ttl_s, namespace = value.ttl_s, value.namespace
    if ttl_s is not None and (
        not isinstance(ttl_s, int) or isinstance(ttl_s, bool) or not 1 <= ttl_s <= MAX_TTL_S
    ):
        refuse(f"{field}.ttl_s", f"an int from 1 to {MAX_TTL_S} seconds", ttl_s)
    if namespace is not None:
        _name(namespace, f"{field}.namespace")
    return CacheOptions(
        mode=_cache_mode(value.mode, f"{field}.mode"), ttl_s=ttl_s, namespace=namespace
    )


def _kind(value: object, field: str) -> JobKind:
    if isinstance(value, str):
        for kind in JobKind:
            if kind == value:
                return kind
    refuse(field, "one of " + ", ".join(JobKind), value)


def _on_unknown(value: object, field: str) -> OnUnknown:
    if isinstance(value, str):
        for policy in OnUnknown:
            if policy == value:
                return policy
    refuse(field, "one of " + ", ".join(OnUnknown), value)


def _compact(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        refuse(field, "True or False", value)
    return value


def _stream(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        refuse(field, "True or False", value)
    return value


def _attributes(value: object, field: str) -> dict[str, Any]:
    return tier_options.attributes(value, field, refuse)


def _complexity(value: object, field: str) -> str | float:
    return tier_options.complexity(value, field, refuse)


def _escalate_on(value: object, field: str) -> dict[str, Any]:
    return tier_options.escalate_on(value, field, refuse)


def _service(value: object, field: str) -> str:
    if isinstance(value, str):
        for service in Service:
            if service == value:
                return service.value
    refuse(field, "one of " + ", ".join(Service), value)


def _context(value: object, field: str) -> dict[str, Any]:
    return context_options.context(value, field, refuse)


def _memory(value: object, field: str) -> dict[str, Any]:
    return context_options.memory(value, field, refuse)


POLICY_OPTIONS: frozenset[str] = frozenset(
    {
        "attributes",
        "compact",
        "complexity",
        "context",
        "escalate_on",
        "limit_key",
        "memory",
        "memory_id",
        "service",
        "session_id",
    }
)
"""The options that steer how a job is answered: it carries them as its policy, by their names."""

_CHECKS: dict[str, Callable[[object, str], object]] = {
    "tier": _tier,
    "model": _name,
    "system": _system,
    "max_tokens": _max_tokens,
    "temperature": _temperature,
    "top_p": _top_p,
    "stop": _stop,
    "seed": _seed,
    "response_format": _response_format,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "metadata": _metadata,
    "priority": _priority,
    "concurrency_key": _name,
    "limit_key": _name,
    "deadline": _as_given,
    "idempotency_key": _idempotency_key,
    "callback_url": _as_given,
    "cache": _cache,
    "kind": _kind,
    "on_unknown": _on_unknown,
    "compact": _compact,
    "stream": _stream,
    "attributes": _attributes,
    "complexity": _complexity,
    "escalate_on": _escalate_on,
    "service": _service,
    "session_id": _name,
    "context": _context,
    "memory_id": _name,
    "memory": _memory,
}
