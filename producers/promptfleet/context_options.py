"""The options that context windows and conversations go by, checked by what fleet.toml's are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    from promptfleet_shared.policies.section import Section

ContextPolicyName: TypeAlias = Literal["error", "truncate", "middle_out", "relevance", "summarize"]


class ContextOption(TypedDict, total=False):
    """What becomes of a chat that is too long for every model that may answer it.

    Attributes:
        policy: What is left out.
        reserve_output_tokens: Tokens that are kept free for the answer, without `max_tokens`.
        relevance: "bm25", or "embeddings:MODEL" with a model of the fleet.
        summary_tier: The tier that writes summaries.
        summary_tokens: Tokens that a summary may have.
        cut_last_turn: True to cut a last turn that is too long by itself.
    """

    policy: ContextPolicyName
    reserve_output_tokens: int
    relevance: str
    summary_tier: str
    summary_tokens: int
    cut_last_turn: bool


class MemoryOption(TypedDict, total=False):
    """How much of its conversation a job is told.

    Attributes:
        strategy: "window" for the newest turns, "summary" for a summary of the others, too.
        max_tokens: Tokens of it at most.
        summarization_threshold: Tokens from which on older turns are summarised.
        summarization_model: The model of the fleet that writes summaries.
        summary_tokens: Tokens that a summary may have.
    """

    strategy: Literal["window", "summary"]
    max_tokens: int
    summarization_threshold: int
    summarization_model: str
    summary_tokens: int


class Refuse(Protocol):
    """Refuses a value by the name of its field, as `promptfleet.options.refuse` does."""

    def __call__(self, field: str, accepted: str, value: object) -> NoReturn:
        """Raise."""
        ...


def context(value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    """What a job says of [context]."""
    # Here, since it takes pydantic, which only who uses this option needs.
    from promptfleet_shared.policies.context import ContextOptions, ContextPolicy  # noqa: PLC0415

    if isinstance(value, str):
        if value not in set(ContextPolicy):
            refuse(field, "one of " + ", ".join(ContextPolicy) + ", or a mapping", value)
        return {"policy": str(value)}
    return _checked(ContextOptions, value, field, refuse)


def memory(value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    """What a job says of [memory]."""
    from promptfleet_shared.policies.conversations import MemoryOptions  # noqa: PLC0415  # as above

    return _checked(MemoryOptions, value, field, refuse)


def _checked(kind: type[Section], value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    from pydantic import ValidationError  # noqa: PLC0415  # as above

    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        refuse(field, "a mapping with some of " + ", ".join(kind.model_fields), value)
    try:
        options = kind.model_validate(dict(value), strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if name not in kind.model_fields:  # what it is called may be anything
            refuse(field, "a mapping with none but " + ", ".join(kind.model_fields), value)
        accepted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        refuse(f"{field}.{name}", accepted, value[name])
    return options.model_dump(mode="json", exclude_none=True)
