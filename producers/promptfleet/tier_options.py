"""The options that `tier="auto"` and escalation go by, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, TypedDict

import orjson

MAX_ATTRIBUTES = 32
MAX_NAME_CHARS = 64
MAX_VALUE_CHARS = 255
MAX_SCHEMA_BYTES = 64 * 1024
LEVELS = ("low", "medium", "high")
FLAGS = frozenset({"needs_reasoning", "needs_creativity", "is_simple_query", "critical_task"})
_CHECKS = ("json_schema", "refusal", "cut_off", "min_chars", "function")
_SWITCHES = ("json_schema", "refusal", "cut_off")

Complexity: TypeAlias = Literal["low", "medium", "high"] | float


class Escalation(TypedDict, total=False):
    """What is wrong with a whole answer, so that the job goes on to the next tier.

    Attributes:
        json_schema: True: it must follow the JSON schema of `response_format`; or a schema.
        refusal: True: it must not be a refusal.
        cut_off: True: it must not have ended for lack of tokens.
        min_chars: Characters that it must have.
        function: The name of one of fleet.toml's `[routing.checks]`.
    """

    json_schema: bool | Mapping[str, Any]
    refusal: bool
    cut_off: bool
    min_chars: int
    function: str


EscalateOption: TypeAlias = bool | str | Sequence[str] | Escalation
"""Escalation, the names of checks, or False for none of the tier's."""


class Refuse(Protocol):
    """Refuses a value by the name of its field, as `promptfleet.options.refuse` does."""

    def __call__(self, field: str, accepted: str, value: object) -> NoReturn:
        """Raise."""
        ...


def attributes(value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    """What the caller says of the prompt: names, and texts, numbers or truths."""
    if not isinstance(value, Mapping) or len(value) > MAX_ATTRIBUTES:
        refuse(field, f"a mapping of up to {MAX_ATTRIBUTES} attributes", value)
    found: dict[str, Any] = {}
    for name, item in value.items():
        if not isinstance(name, str) or not _is_text(name, MAX_NAME_CHARS):
            refuse(field, f"a mapping with str keys of 1 to {MAX_NAME_CHARS} characters", name)
        found[name] = _attribute(item, name, f"{field}.{name}", refuse)
    return found


def _attribute(item: object, name: str, field: str, refuse: Refuse) -> object:
    if name == "complexity":
        return complexity(item, field, refuse)
    if name in FLAGS:
        if not isinstance(item, bool):
            refuse(field, "True or False", item)
        return item
    if isinstance(item, str) and (not item or _is_text(item, MAX_VALUE_CHARS)):
        return item
    if isinstance(item, int | float) and math.isfinite(item) and abs(item) < 2**53:
        return item
    return refuse(
        field, f"a str of up to {MAX_VALUE_CHARS} characters, a number, True or False", item
    )


def complexity(value: object, field: str, refuse: Refuse) -> str | float:
    """How hard the prompt is."""
    if isinstance(value, str) and value in LEVELS:
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 10:  # noqa: PLR2004 - the scale
        return value
    return refuse(field, '"low", "medium", "high" or a number from 1 to 10', value)


def escalate_on(value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    """The checks of the job's answer, by their names; none for False."""
    if value is False:
        return {}
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        value = dict.fromkeys((_switch(name, field, refuse) for name in value), True)
    if not isinstance(value, Mapping):
        refuse(field, "False, a mapping of checks, or a sequence of their names", value)
    return {str(name): _check(name, item, field, refuse) for name, item in value.items()}


def _switch(name: object, field: str, refuse: Refuse) -> str:
    if isinstance(name, str) and name in _SWITCHES:
        return name
    return refuse(field, "names of " + ", ".join(_SWITCHES) + "; others have a value", name)


def _check(name: object, item: object, field: str, refuse: Refuse) -> object:
    place = f"{field}.{name}" if name in _CHECKS else field
    match name:
        case "json_schema" if isinstance(item, Mapping):
            return _schema(item, place, refuse)
        case "json_schema" | "refusal" | "cut_off":
            if not isinstance(item, bool):
                refuse(place, "True or False" + " or a schema" * (name == "json_schema"), item)
            return item
        case "min_chars":
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 2**31:
                refuse(place, "an int from 0", item)
            return item
        case "function":
            if not isinstance(item, str) or not _is_text(item, MAX_NAME_CHARS):
                refuse(place, "the name of one of fleet.toml's [routing.checks]", item)
            return item
    return refuse(place, "a mapping with none but " + ", ".join(_CHECKS), name)


def _schema(item: Mapping[str, Any], field: str, refuse: Refuse) -> dict[str, Any]:
    try:
        dumped = orjson.dumps(dict(item), default=dict)
    except TypeError:
        refuse(field, "a JSON schema", item)
    if len(dumped) > MAX_SCHEMA_BYTES or b"\\u0000" in dumped:
        refuse(field, f"a JSON schema of up to {MAX_SCHEMA_BYTES} bytes without NUL", item)
    snapshot: dict[str, Any] = orjson.loads(dumped)  # the caller may change theirs
    return snapshot


def _is_text(value: str, longest: int) -> bool:
    """True for what jsonb can hold."""
    if not 0 < len(value) <= longest or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)
