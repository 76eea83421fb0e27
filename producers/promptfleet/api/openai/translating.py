"""From the body of one of OpenAI's requests to the `JobSpec` that becomes a row.

What the fleet does not know goes to the provider as it is. What is the fleet's own stays here:
`model`, `stream`, `stream_options`, `metadata`, `n`, and the fleet's options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import orjson

from promptfleet.api.errors import ApiError
from promptfleet.api.openai.models import find_target
from promptfleet.api.openai.options import BODY_FIELD
from promptfleet.options import refuse
from promptfleet.requests import Defaults, make_template
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import JobKind, JobSpec

PROMPT_FIELDS = {
    JobKind.CHAT: "messages",
    JobKind.COMPLETION: "prompt",
    JobKind.EMBEDDING: "input",
}
KINDS = {
    "/v1/chat/completions": JobKind.CHAT,
    "/v1/completions": JobKind.COMPLETION,
    "/v1/embeddings": JobKind.EMBEDDING,
}
"""The endpoints whose requests are jobs as they stand."""
_OWN_FIELDS = frozenset({"model", "stream", "stream_options", "metadata", "n", BODY_FIELD})
_PRIORITIES = {"flex": 2, "priority": 8}
_BAD_REQUEST = 400


def make_job(
    kind: JobKind,
    body: Mapping[str, Any],
    *,
    fleet: Fleet,
    defaults: Defaults,
    options: Mapping[str, Any],
    stream: bool = False,
) -> JobSpec:
    """The job that this request asks for.

    Args:
        kind: Which endpoint it came to.
        body: Decoded JSON.
        fleet: Whose models it may name.
        defaults: Of the tenant.
        options: What it wants of the fleet, from `fleet_options`.
        stream: Whether its tokens are to be read as they come.

    Raises:
        InvalidRequestError: `field` names what is wrong.
        ApiError: 404, there is no such model; 400 for what the fleet can't do.
    """
    _refuse_choices(body)
    target = find_target(body.get("model"), fleet, defaults)
    wanted: dict[str, Any] = {"kind": kind, "stream": stream, **options}
    if target.model is not None:
        wanted["model"] = target.model
    if target.tier is not None:
        wanted.setdefault("tier", target.tier)
    if (priority := _PRIORITIES.get(str(body.get("service_tier")))) is not None:
        wanted.setdefault("priority", priority)
    if (metadata := _metadata(body, options)) is not None:
        wanted["metadata"] = metadata
    template = make_template(wanted, defaults)
    field = PROMPT_FIELDS[kind]
    parameters = _parameters(body, field)
    prompt = body.get(field)
    if kind is JobKind.CHAT:
        if not isinstance(prompt, list):
            refuse(field, "a list of messages", prompt)
        return dataclasses.replace(template, parameters=parameters).spec(prompt, field)
    check_prompt(prompt, field)
    if stream and count_prompts(prompt) > 1:
        msg = f"{field}: a stream has one prompt; send the others by themselves"
        raise InvalidRequestError(msg, field=field)
    request = orjson.dumps({field: prompt, **parameters}, option=orjson.OPT_SORT_KEYS)
    return template.spec_of(request, field)


def check_prompt(value: object, field: str) -> None:
    """Do nothing if this is a prompt or a list of them: a text, or the numbers of its tokens.

    Raises:
        InvalidRequestError: It is neither.
    """
    accepted = (
        "a text that is not empty, a list of such texts, or of token ids, or of lists of them"
    )
    if isinstance(value, str) and value:
        return
    if not isinstance(value, list) or not value:
        refuse(field, accepted, value)
    if _are_tokens(value):
        return
    for n, item in enumerate(value):
        if not (isinstance(item, str) and item) and not _are_tokens(item):
            refuse(f"{field}[{n}]", "a text that is not empty, or a list of token ids", item)


def count_prompts(value: object) -> int:
    """How many prompts these are."""
    return 1 if isinstance(value, str) or _are_tokens(value) else len(value)  # type: ignore[arg-type]


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _parameters(body: Mapping[str, Any], prompt_field: str) -> dict[str, orjson.Fragment]:
    """What goes to the provider; null means there what leaving a field out means."""
    passed = {
        name: value
        for name, value in body.items()
        if value is not None and name != prompt_field and name not in _OWN_FIELDS
    }
    if body.get("store") is True and body.get("metadata") is not None:
        passed["metadata"] = body["metadata"]  # kept there with the answer
    # As fragments, since a schema's order of keys is the order in which the model answers.
    return {name: orjson.Fragment(orjson.dumps(value)) for name, value in passed.items()}


def _metadata(body: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """OpenAI's own metadata and the fleet's option of that name, which wins."""
    theirs, ours = body.get("metadata"), options.get("metadata")
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return {**theirs, **ours}
    return theirs if ours is None else ours


def _refuse_choices(body: Mapping[str, Any]) -> None:
    """Refuse several answers to one prompt: a job has one."""
    choices = body.get("n")
    if choices is not None and choices != 1:
        message = (
            "n: must be 1, since a job has one answer; for several, send the request several"
            ' times, with {"promptfleet": {"cache": "off"}} in its body'
        )
        raise ApiError(_BAD_REQUEST, message, code="unsupported_value", param="n")
