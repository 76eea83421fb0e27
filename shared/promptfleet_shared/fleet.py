"""fleet.toml: tiers → models → deployments, and how each tier batches, retries and caches."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.policies.balancing import BalancingSection, Complexity, ModelBalancing
from promptfleet_shared.policies.budgets import Budget, twice_named
from promptfleet_shared.policies.caching import CacheSection
from promptfleet_shared.policies.compact import CompactSection
from promptfleet_shared.policies.context import ContextSection
from promptfleet_shared.policies.conversations import MemorySection
from promptfleet_shared.policies.fairness import FairnessSection
from promptfleet_shared.policies.limits import DeploymentLimits, LimitsSection
from promptfleet_shared.policies.provider_batches import BatchServiceSection
from promptfleet_shared.policies.routing import (
    AnyConditions,
    EscalateOn,
    RoutingSection,
    tier_rule,
)
from promptfleet_shared.policies.section import Count, Milliseconds, Section
from promptfleet_shared.policies.tier_choice import TierChooser
from promptfleet_shared.tiers import DEFAULT_TIERS, TIER_NAME

Options = TypeVar("Options", bound=Section)


class BatchOptions(Section):
    """How a tier gathers jobs.

    Attributes:
        max_batch_size: Jobs in a batch at most.
        batch_window_ms: Milliseconds that a batch stays open after its first job.
        max_batch_tokens: Input tokens (estimated) of one request that carries many prompts.
        max_concurrent_batches: Batches of a worker that may be claimed and not yet all called.
        max_concurrent_calls: Provider calls in flight at once in a worker, over its tiers' sum.
    """

    max_batch_size: Count = 100
    batch_window_ms: Milliseconds = 10.0
    max_batch_tokens: Count = 200_000
    max_concurrent_batches: Count = 32
    max_concurrent_calls: Count = 256


class RetryOptions(Section):
    """How often and how soon a failed job is tried again.

    Attributes:
        retry_attempts: Tries after the first one.
        retry_delay_ms: The first delay's upper bound; doubles with each attempt, full jitter.
        max_retry_delay_ms: The upper bound of any delay of our own.
        max_calls: Provider calls that one job may ever cost.
    """

    retry_attempts: Annotated[int, Field(ge=0)] = 3
    retry_delay_ms: Milliseconds = 500.0
    max_retry_delay_ms: Milliseconds = 60_000.0
    max_calls: Count = 8


class TimeoutOptions(Section):
    """The four timers of a call, in milliseconds.

    Attributes:
        connect_timeout_ms: Until the connection (with TLS) stands.
        first_byte_timeout_ms: From the request to the response's headers.
        idle_timeout_ms: Between two pieces of the response.
        timeout_ms: The whole call.
    """

    connect_timeout_ms: Milliseconds = 5_000.0
    first_byte_timeout_ms: Milliseconds = 300_000.0
    idle_timeout_ms: Milliseconds = 60_000.0
    timeout_ms: Milliseconds = 600_000.0


class BreakerOptions(Section):
    """When a deployment that fails is left alone, and how it comes back; over the whole fleet.

    Attributes:
        enabled: False lets every call through.
        window_s: Seconds over which calls are counted.
        min_calls: Fewer calls in the window prove nothing.
        failure_share: The breaker opens when so much of the window's calls failed, 0 to 1.
        cool_down_s: Seconds without a call after the first opening; doubles with each next one.
        max_cool_down_s: The longest cool-down; after as long, a probe without an answer is given
            up on.
        ramp_s: Seconds in which calls in flight may grow from a tenth to all, after a good probe.
        retry_share: Repeated calls for each first call, while the deployment is not seen to be
            well: what a storm of failures is amplified by at most.
        retries_per_s: Repeated calls a second besides, so that a quiet fleet can retry.
    """

    enabled: bool = True
    window_s: Annotated[float, Field(gt=0)] = 30.0
    min_calls: Count = 20
    failure_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    cool_down_s: Annotated[float, Field(gt=0)] = 5.0
    max_cool_down_s: Annotated[float, Field(gt=0)] = 60.0
    ramp_s: Annotated[float, Field(gt=0)] = 30.0
    retry_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    retries_per_s: Annotated[float, Field(gt=0)] = 1.0


class Deployment(Section):
    """One place where a model answers.

    Attributes:
        name: Unique in the fleet; shown on result rows.
        provider: Which protocol it speaks: "openai" (and everything compatible), "anthropic",
            "gemini", or the name of an entry point of the group `promptfleet.providers`.
        base_url: With the version, e.g. https://api.openai.com/v1.
        model: The model's name there; the model's own name when empty.
        api_key: The key itself (better: `api_key_env`).
        api_key_env: The environment variable that holds the key.
        prompts_per_request: Prompts that one completions request may carry; 1 where the endpoint
            takes no list, or its answers can't be told apart.
        headers: Sent with every request.
        max_concurrent_calls: Calls in flight here from one worker; None: the tier's own bound.
        stream: True to have chats and completions streamed: a dead call is noticed after
            `idle_timeout_ms` instead of `timeout_ms`.
        limits: What the provider allows; None: no limit is kept, and none learned.
        max_concurrency: Jobs in flight here from the whole fleet, as far as the balancer knows:
            a deployment that has so many is passed over while another one has room.
        max_complexity: The hardest job, from 1 to 10, that the balancer sends here.
        price_as: As the model's, where this deployment has a price of its own.
        options: Whatever a provider of your own wants to know.
        batch_api: True if its provider's batch API may have jobs of `service="batch"`.
    """

    name: str = ""
    provider: str = "openai"
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")]
    model: str = ""
    api_key: SecretStr | None = None
    api_key_env: str | None = None
    prompts_per_request: Count = 1
    headers: dict[str, str] = Field(default_factory=dict)
    max_concurrent_calls: Count | None = None
    stream: bool = False
    timeouts: TimeoutOptions | None = None
    limits: DeploymentLimits | None = None
    max_concurrency: Count | None = None
    max_complexity: Complexity | None = None
    price_as: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    batch_api: bool = False

    def secret(self) -> str | None:
        """The API key, from wherever it is configured."""
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        return os.environ.get(self.api_key_env) if self.api_key_env else None

    @property
    def key_name(self) -> str | None:
        """The environment variable that its API key is taken from; None where it is from none."""
        return self.api_key_env if self.api_key is None else None


class Model(Section):
    """A model and where it runs.

    Attributes:
        deployments: Tried in this order.
        price_as: The `provider/model` whose price applies, as genai-prices names them; by default
            the deployment's provider and model. "free" for a model of your own.
        context_window: Tokens that the model can read and write in one call; by default what
            genai-prices knows of it.
        max_output_tokens: Tokens that it can write, where that is less.
        balancing: Options of [balancing] that are different for this model.
    """

    deployments: Annotated[tuple[Deployment, ...], Field(min_length=1)]
    price_as: str | None = None
    context_window: Count | None = None
    max_output_tokens: Count | None = None
    balancing: ModelBalancing | None = None


class TierSection(Section):
    """A tier: its models in order of preference, and options that differ from the fleet's.

    Attributes:
        models: Tried in this order.
        max_tokens: Tokens that an answer of this tier has at most: added to a request that sets no
            bound, and put in place of a higher one. None: as the request says.
        conditions: Which prompts of `tier="auto"` are this tier's: one table that holds as a
            whole, or a list of tables of which one is enough.
        escalate_on: What is wrong with an answer, so that the job goes on to the next tier.
    """

    models: Annotated[tuple[str, ...], Field(min_length=1)]
    max_tokens: Count | None = None
    conditions: AnyConditions | None = None
    escalate_on: EscalateOn | None = None
    batch: BatchOptions | None = None
    retry: RetryOptions | None = None
    timeouts: TimeoutOptions | None = None
    compact: CompactSection | None = None


class Fleet(Section):
    """The whole of fleet.toml."""

    default_tier: str = "standard"
    tiers: dict[str, TierSection] = Field(default_factory=dict)
    models: dict[str, Model] = Field(default_factory=dict)
    batch: BatchOptions = BatchOptions()
    retry: RetryOptions = RetryOptions()
    timeouts: TimeoutOptions = TimeoutOptions()
    cache: CacheSection = CacheSection()
    breaker: BreakerOptions = BreakerOptions()
    limits: LimitsSection = LimitsSection()
    batch_service: BatchServiceSection = BatchServiceSection()
    fairness: FairnessSection = FairnessSection()
    context: ContextSection = ContextSection()
    memory: MemorySection = MemorySection()
    balancing: BalancingSection = BalancingSection()
    routing: RoutingSection = RoutingSection()
    budgets: tuple[Budget, ...] = ()
    compact: CompactSection = CompactSection()

    @model_validator(mode="before")
    @classmethod
    def _name_deployments(cls, data: Any) -> Any:
        models = data.get("models") if isinstance(data, dict) else None
        if not isinstance(models, dict):
            return data
        named = {}
        for name, model in models.items():
            deployments = model.get("deployments") if isinstance(model, dict) else None
            if isinstance(deployments, list):
                named[name] = {**model, "deployments": _named(name, deployments)}
            else:
                named[name] = model
        return {**data, "models": named}

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for tier, section in self.tiers.items():
            if not TIER_NAME.fullmatch(tier):
                msg = f"tiers.{tier}: a tier's name is lower-case letters, digits, - and _"
                raise ValueError(msg)
            for model in section.models:
                if model not in self.models:
                    msg = f"tiers.{tier}.models: no [models.{model!r}] is defined"
                    raise ValueError(msg)
        if self.tiers and self.default_tier not in self.tiers:
            msg = f"default_tier: {self.default_tier!r} is none of {', '.join(self.tiers)}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _policies_fit(self) -> Self:
        mistake = (
            self.context.mistake(self.tiers, self.models)
            or self.memory.mistake(self.models)
            or self.routing.mistake(self.tier_names, self.models)
            or self._escalation_mistake()
            or self.limits.mistake(self.api_keys)
        )
        if mistake is not None:
            raise ValueError(mistake)
        if (mistake := twice_named(self.budgets)) is not None:
            raise ValueError(mistake)
        if (unknown := self.cache.unknown_models(self.models)) is not None:
            raise ValueError(unknown)
        names = [d.name for model in self.models.values() for d in model.deployments]
        for name in names:
            if names.count(name) > 1:
                msg = f"models: two deployments are called {name!r}"
                raise ValueError(msg)
        return self

    def _escalation_mistake(self) -> str | None:
        sections = ((name, section.escalate_on) for name, section in self.tiers.items())
        return next(
            (
                f"tiers.{name}.escalate_on.function: must be module:function, or one of"
                " [routing.checks]"
                for name, checks in sections
                if checks and checks.function and not self.routing.knows_check(checks.function)
            ),
            None,
        )

    @property
    def api_keys(self) -> frozenset[str]:
        """The environment variables that deployments take their API keys from."""
        deployments = (d for model in self.models.values() for d in model.deployments)
        return frozenset(d.key_name for d in deployments if d.key_name)

    @property
    def tier_names(self) -> tuple[str, ...]:
        """The tiers that jobs may name."""
        return tuple(self.tiers) or DEFAULT_TIERS

    def tier_chooser(self) -> TierChooser:
        """What decides `tier="auto"` in this fleet."""
        rules = [
            tier_rule(name, self.tiers[name].conditions if name in self.tiers else None)
            for name in self.tier_names
        ]
        return TierChooser(
            rules,
            fallback=self.default_tier,
            section=self.routing,
            triage_tier=self.triage_tier,
        )

    @property
    def triage_model(self) -> str | None:
        """The small model that says how hard a prompt is; None without models."""
        first = next(iter(self.tiers.values()), None)
        return self.routing.triage.model or (first.models[0] if first else None)

    @property
    def triage_tier(self) -> str | None:
        """The tier whose workers ask the small model: the first that has it, else the first."""
        model = self.triage_model
        having = [name for name, section in self.tiers.items() if model in section.models]
        return next(iter(having or self.tiers), None)

    def batch_options(self, tier: str) -> BatchOptions:
        """How this tier gathers."""
        section = self.tiers.get(tier)
        return _merged(self.batch, section.batch if section else None)

    def compact_options(self, tier: str) -> CompactSection:
        """Whether prompts of this tier are compacted."""
        section = self.tiers.get(tier)
        return _merged(self.compact, section.compact if section else None)

    def retry_options(self, tier: str) -> RetryOptions:
        """How this tier retries."""
        section = self.tiers.get(tier)
        return _merged(self.retry, section.retry if section else None)

    def balancing_options(self, model: str) -> ModelBalancing:
        """How this model's deployments share its jobs."""
        found = self.models.get(model)
        return _merged(self.balancing, found.balancing if found else None)

    def timeout_options(self, tier: str, deployment: Deployment) -> TimeoutOptions:
        """The timers of a call: each the deployment's, else the tier's, else the fleet's."""
        section = self.tiers.get(tier)
        options = _merged(self.timeouts, section.timeouts if section else None)
        return _merged(options, deployment.timeouts)


def _merged(base: Options, special: Options | None) -> Options:
    """`base` with what `special` sets explicitly."""
    if special is None:
        return base
    return base.model_copy(
        update={name: getattr(special, name) for name in special.model_fields_set}
    )


def _named(model: str, deployments: list[Any]) -> list[Any]:
    """Deployments without a name get their model's, numbered after the first."""
    named = []
    for n, item in enumerate(deployments, 1):
        if isinstance(item, dict) and not item.get("name"):
            named.append({**item, "name": model if n == 1 else f"{model}-{n}"})
        else:
            named.append(item)
    return named


def load_fleet(path: Path | None) -> Fleet:
    """Read fleet.toml; without one, the three usual tiers and no models.

    Raises:
        ConfigurationError: With every mistake as `path:line: field: what is wrong`.
    """
    if path is None:
        return Fleet()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: can't be read: {error}"
        raise ConfigurationError(msg) from None
    return parse_fleet(text, name=str(path))


def parse_fleet(text: str, *, name: str = "fleet.toml") -> Fleet:
    """Read the text of a fleet.toml; `name` is what errors call it."""
    try:
        return Fleet.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        msg = f"{name}:{line[1] if line else 1}: {error}"
        raise ConfigurationError(msg) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        lines = [
            _mistake(name, text, item["loc"], item["msg"])
            for item in found
            if not _follows_from(item["loc"], [other["loc"] for other in found])
        ]
        raise ConfigurationError("\n".join(lines)) from None


def _follows_from(location: Sequence[str | int], others: Sequence[Sequence[str | int]]) -> bool:
    """True for a mistake about a whole of which a part is wrong already."""
    depth = len(location)
    return any(len(other) > depth and other[:depth] == location for other in others)


def _mistake(name: str, text: str, location: Sequence[str | int], message: str) -> str:
    message = message.removeprefix("Value error, ")
    field = ".".join(str(part) for part in location)
    if not location:  # a check over several fields: it names the field itself
        field, _, message = message.partition(": ")
        location = field.split(".")
    return f"{name}:{_line_of(text, location)}: {field}: {message}"


def _line_of(text: str, location: Sequence[str | int]) -> int:
    """The line where the innermost known part of a location stands; 1 if none is found."""
    names = [str(part) for part in location if isinstance(part, str)]
    indexes = [part for part in location if isinstance(part, int)]
    best, best_depth = 1, 0
    table: list[str] = []
    tables_seen: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if header := re.match(r"(\[\[?)\s*([^\]]+?)\s*\]", stripped):
            table = _key_parts(header[2])
            tables_seen[tuple(table)] = tables_seen.get(tuple(table), -1) + 1
            path = table
        elif assignment := re.match(r"([\w.\"'\- ]+?)\s*=", stripped):
            path = table + _key_parts(assignment[1])
        else:
            continue
        nth = tables_seen.get(tuple(table), 0)
        if indexes and table == names[: len(table)] and nth != indexes[0] and len(table) > 1:
            continue
        if path == names[: len(path)] and len(path) > best_depth:
            best, best_depth = number, len(path)
    return best


def _key_parts(key: str) -> list[str]:
    parts = re.findall(r'"([^"]*)"|\'([^\']*)\'|([\w-]+)', key)
    return [next(part for part in match if part) if any(match) else "" for match in parts]
