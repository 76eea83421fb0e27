"""Submissions: from what a caller hands over to the `JobSpec` that becomes a row."""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import orjson
from uuid_utils.compat import uuid7

from promptfleet.options import (
    POLICY_OPTIONS,
    PromptOptions,
    callback_url,
    check_option,
    deadline_seconds,
    plain,
    refuse,
    to_json,
)
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import (
    DEFAULT_PRIORITY,
    DEFAULT_TENANT,
    CacheOptions,
    JobKind,
    JobSpec,
    OnUnknown,
)
from promptfleet_shared.tiers import AUTO_TIER

if TYPE_CHECKING:
    from promptfleet_shared.policies.tier_choice import TierChooser

MAX_REQUEST_BYTES = 8 * 1024 * 1024
BYTES_A_TOKEN = 4
MAX_LISTED = 10
"""Names that an error shows."""
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_SYSTEM_ROLES = frozenset({"system", "developer"})

Message: TypeAlias = Mapping[str, Any]
"""A chat message: a role, and whatever else the provider takes; passed on untouched."""
PromptInput: TypeAlias = str | Sequence[Message]
"""A prompt's text, or the messages of a chat."""

# What goes into the provider's body under its own name; the rest is ours.
_CHAT_PARAMETERS = frozenset(
    {
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "response_format",
        "tools",
        "tool_choice",
    }
)
_PARAMETERS = {
    JobKind.CHAT: _CHAT_PARAMETERS,
    JobKind.COMPLETION: frozenset({"max_tokens", "temperature", "top_p", "stop", "seed"}),
    JobKind.EMBEDDING: frozenset[str](),
}


class Prompt(PromptOptions, total=False):
    """One of many prompts with options of its own: has `prompt` or `messages`."""

    prompt: PromptInput
    messages: Sequence[Message]


def utc_now() -> dt.datetime:
    """The present instant."""
    return dt.datetime.now(dt.UTC)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What holds where a caller says nothing.

    Attributes:
        tiers: The tiers that jobs may name; None where no fleet.toml tells.
        models: The models that jobs may name; None where no fleet.toml has any.
        now: The caller's clock, for deadlines that are instants.
        callback_allow_loopback: Whether callbacks may go to this very machine.
        chooser: What decides `tier="auto"`; None where only the tiers' names are known.
    """

    tenant: str = DEFAULT_TENANT
    deadline_s: float = 86_400.0
    tier: str = "standard"
    tiers: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    now: Callable[[], dt.datetime] = utc_now
    callback_allow_loopback: bool = False
    chooser: TierChooser | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """Checked options: what the jobs that share them have in common.

    Attributes:
        parameters: The parameters of the provider's body.
        chooser: What chooses the tier of each; None where `tier` is it.
    """

    tenant: str
    tier: str
    deadline_s: float
    kind: JobKind = JobKind.CHAT
    model: str | None = None
    system: str | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] | None = None
    priority: int = DEFAULT_PRIORITY
    idempotency_key: str | None = None
    callback_url: str | None = None
    cache: CacheOptions | None = None
    on_unknown: OnUnknown = OnUnknown.RETRY
    stream: bool = False
    policy: dict[str, Any] | None = None
    concurrency_key: str | None = None
    chooser: TierChooser | None = None

    def spec(self, prompt: object, field: str = "prompt") -> JobSpec:
        """The job that asks this prompt.

        Raises:
            InvalidRequestError: The prompt is none; names the place in it.
        """
        return self.spec_of(self._request(prompt, field), field)

    def spec_of(self, request: bytes, field: str = "request") -> JobSpec:
        """The job that sends this request, which is ready: the options' parameters are not added.

        Raises:
            InvalidRequestError: It is too large.
        """
        if len(request) > MAX_REQUEST_BYTES:
            msg = f"{field}: the request is {len(request)} bytes of JSON; {MAX_REQUEST_BYTES} fit"
            raise InvalidRequestError(msg, field=field)
        tier, decision = self.tier, None
        if self.chooser is not None:
            tier, decision = self._chosen(self.chooser, request)
        return JobSpec(
            id=uuid7(),
            tier=tier,
            request=request,
            input_tokens=-(-len(request) // BYTES_A_TOKEN),
            deadline_s=self.deadline_s,
            tenant=self.tenant,
            kind=self.kind,
            model=self.model,
            priority=self.priority,
            cache=self.cache,
            metadata=self.metadata,
            idempotency_key=self.idempotency_key,
            callback_url=self.callback_url,
            on_unknown=self.on_unknown,
            stream=self.stream,
            policy=self.policy,
            concurrency_key=self.concurrency_key,
            decision=decision,
        )

    def _chosen(self, chooser: TierChooser, request: bytes) -> tuple[str, dict[str, Any]]:
        # A second call for a prompt that must not be called twice, or whose model stands already?
        may_triage = (
            self.kind is not JobKind.EMBEDDING
            and self.model is None
            and self.on_unknown is OnUnknown.RETRY
        )
        decided = chooser.decide(request, self.policy or {}, may_triage=may_triage)
        return decided.tier, {"tier": decided.record()}

    def _request(self, prompt: object, field: str) -> bytes:
        if self.kind is JobKind.CHAT:
            name = "messages"
            value: object = _messages(prompt, self.system, field)
        else:
            name = "prompt" if self.kind is JobKind.COMPLETION else "input"
            value = _text(prompt, field)
        body = {name: value, **self.parameters}
        try:
            # Sorted, so that equal requests are equal bytes.
            return orjson.dumps(body, default=plain, option=orjson.OPT_SORT_KEYS)
        except TypeError:
            _find_mistake(prompt, self.system, self.parameters, field)
            raise


def make_spec(prompt: object, options: Mapping[str, Any], defaults: Defaults) -> JobSpec:
    """The job of one `enqueue_prompt` call.

    Raises:
        InvalidRequestError: `field` names the option or the place in the prompt.
    """
    return make_template(options, defaults).spec(prompt)


def make_specs(
    prompts: Iterable[object], options: Mapping[str, Any], defaults: Defaults
) -> list[JobSpec]:
    """The jobs of one `enqueue_prompts` call.

    Raises:
        InvalidRequestError: `field` begins with the prompt's place, e.g. `prompts[7].temperature`.
    """
    if isinstance(prompts, str | bytes | Mapping):
        refuse("prompts", "an iterable of prompts", prompts)
    if options.get("idempotency_key") is not None:
        msg = "idempotency_key: belongs to one prompt; give it in the mapping of that prompt"
        raise InvalidRequestError(msg, field="idempotency_key")
    shared = make_template(options, defaults)
    specs = []
    for n, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            specs.append(shared.spec(prompt, f"prompts[{n}]"))
        else:
            specs.append(_one_of_many(prompt, n, shared, options, defaults))
    return specs


def _one_of_many(
    item: object,
    n: int,
    shared: Template,
    options: Mapping[str, Any],
    defaults: Defaults,
) -> JobSpec:
    place = f"prompts[{n}]"
    if not isinstance(item, Mapping):
        return shared.spec(item, place)
    given = [name for name in ("prompt", "messages") if name in item]
    if len(given) != 1:
        hint = "; a single chat message goes into a list" if "role" in item else ""
        msg = f'{place}: must have either "prompt" or "messages"{hint}'
        raise InvalidRequestError(msg, field=place)
    own = {name: value for name, value in item.items() if name != given[0]}
    try:
        template = make_template({**options, **own}, defaults) if own else shared
    except InvalidRequestError as error:
        field = f"{place}.{error.field}"
        raise type(error)(f"{place}.{error.message}", field=field) from None
    return template.spec(item[given[0]], f"{place}.{given[0]}")


def make_template(options: Mapping[str, Any], defaults: Defaults) -> Template:
    """Check options.

    Raises:
        InvalidRequestError: `field` names the option.
    """
    checked = {
        name: check_option(name, value) for name, value in options.items() if value is not None
    }
    kind = checked.pop("kind", JobKind.CHAT)
    deadline = checked.pop("deadline", None)
    tier = checked.pop("tier", defaults.tier)
    if defaults.tiers is not None and tier not in defaults.tiers and tier != AUTO_TIER:
        accepted = ", ".join(defaults.tiers)
        msg = f"tier: the fleet has no tier {tier!r}; its tiers are {accepted}"
        raise InvalidRequestError(msg, field="tier")
    model = checked.get("model")
    if model is not None and defaults.models is not None and model not in defaults.models:
        _refuse_model(model, defaults.models)
    if (url := checked.get("callback_url")) is not None:
        checked["callback_url"] = callback_url(url, allow_loopback=defaults.callback_allow_loopback)
    allowed = _PARAMETERS[kind]
    parameters = {name: checked.pop(name) for name in tuple(checked) if name in allowed}
    _refuse_foreign(checked, kind)
    policy = {name: checked.pop(name) for name in tuple(checked) if name in POLICY_OPTIONS}
    _refuse_unknown_check(policy, defaults)
    _refuse_memory(policy, kind)
    return Template(
        tenant=defaults.tenant,
        tier=tier,
        kind=kind,
        deadline_s=(
            defaults.deadline_s if deadline is None else deadline_seconds(deadline, defaults.now)
        ),
        parameters=parameters,
        policy=policy or None,
        chooser=_chooser(defaults) if tier == AUTO_TIER else None,
        **checked,
    )


def _refuse_unknown_check(policy: Mapping[str, Any], defaults: Defaults) -> None:
    """Refuse a check of the answer that fleet.toml does not name."""
    name = policy.get("escalate_on", {}).get("function")
    chooser = defaults.chooser
    if name is not None and chooser is not None and name not in chooser.checks:
        listed = _listed(sorted(chooser.checks)) or "none"
        msg = f"escalate_on.function: is none of [routing.checks] of fleet.toml, which has {listed}"
        raise InvalidRequestError(msg, field="escalate_on.function")


def _refuse_memory(policy: Mapping[str, Any], kind: JobKind) -> None:
    """Refuse a conversation where there can be none."""
    if "memory" in policy and "memory_id" not in policy:
        raise InvalidRequestError("memory: needs a memory_id", field="memory")
    if "memory_id" not in policy:
        return
    if kind is not JobKind.CHAT:
        msg = f"memory_id: is no option of the kind {kind.value!r}"
        raise InvalidRequestError(msg, field="memory_id")
    if policy.get("service", "standard") == "batch":
        msg = "memory_id: no turn of a conversation can wait for a provider's batch API"
        raise InvalidRequestError(msg, field="memory_id")


def _chooser(defaults: Defaults) -> TierChooser:
    if defaults.chooser is not None:
        return defaults.chooser
    # Here, since what it is made of takes a tenth of a second to import.
    from promptfleet_shared.policies.tier_choice import TierChooser  # noqa: PLC0415

    return TierChooser.of_names(defaults.tiers, fallback=defaults.tier)


def _refuse_model(given: str, models: Sequence[str]) -> NoReturn:
    """Refuse a model that fleet.toml does not have; the text itself could be a prompt."""
    near = difflib.get_close_matches(given, models, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"its models are {_listed(models)}"
    raise InvalidRequestError(f"model: the fleet has no such model; {hint}", field="model")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _refuse_foreign(checked: Mapping[str, Any], kind: JobKind) -> None:
    """Refuse what only a chat has."""
    if kind is JobKind.CHAT:
        return
    for name in checked:
        if name in _CHAT_PARAMETERS or name == "system":
            msg = f"{name}: is no option of the kind {kind.value!r}"
            raise InvalidRequestError(msg, field=name)
    if kind is JobKind.EMBEDDING and checked.get("stream"):
        msg = "stream: is no option of the kind 'embedding', which has no text"
        raise InvalidRequestError(msg, field="stream")


def _text(prompt: object, field: str) -> str:
    if not isinstance(prompt, str) or not prompt:
        refuse(field, "a str that is not empty", prompt)
    return prompt


def _messages(prompt: object, system: str | None, field: str) -> Sequence[Message]:
    if isinstance(prompt, str):
        messages: Sequence[Message] = ({"role": "user", "content": _text(prompt, field)},)
    else:
        messages = _checked_messages(prompt, system, field)
    if system is None:
        return messages
    return [{"role": "system", "content": system}, *messages]


def _checked_messages(prompt: object, system: str | None, field: str) -> Sequence[Message]:
    accepted = "a str that is not empty, or a sequence of at least one message"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray) or not prompt:
        refuse(field, accepted, prompt)
    for n, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            refuse(f"{field}[{n}]", 'a mapping with a "role"', message)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            refuse(f"{field}[{n}].role", "one of " + ", ".join(sorted(ROLES)), role)
        if system is not None and role in _SYSTEM_ROLES:
            msg = f"system: {field}[{n}] is a {role} message already; give one or the other"
            raise InvalidRequestError(msg, field="system")
    return prompt


def _find_mistake(
    prompt: object, system: str | None, parameters: Mapping[str, Any], field: str
) -> None:
    """Find what could not be written as JSON, and raise for it."""
    if isinstance(prompt, str):
        to_json(prompt, field)
    elif isinstance(prompt, Sequence):
        for n, message in enumerate(prompt):
            to_json(message, f"{field}[{n}]")
    to_json(system, "system")
    for name, value in parameters.items():
        to_json(value, name)


def job_ids(ids: Iterable[uuid.UUID | str]) -> list[uuid.UUID]:
    """Ids from ids or their text.

    Raises:
        InvalidRequestError: One of them is no id.
    """
    return [job_id(value) for value in ids]


def job_id(value: uuid.UUID | str) -> uuid.UUID:
    """An id from an id or its text.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(value)
    except (ValueError, AttributeError, TypeError):
        refuse("id", "a job's id: a UUID or its text", value)
