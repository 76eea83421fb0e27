"""[cache]: where answers are kept, for how long, and how safely."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from promptfleet_shared.policies.section import Count, Milliseconds, Section

VERIFY_BY_MODEL = "model:"


class SemanticSection(Section):
    """Answers to prompts that mean the same, compared by embeddings; off unless asked for.

    Attributes:
        enabled: True to look for prompts that are alike where no equal one is known.
        model: The embedding model, one of the fleet's models.
        threshold: The cosine similarity from which two prompts count as alike, 0 to 1.
        verify: What has the last word: "none", "model:NAME" (a model of the fleet is asked whether
            both want the same answer), or "module:function" of yours.
        max_entries: Prompts that are compared with at most; of one tenant, namespace, model,
            system message and parameters.
        timeout_ms: What the embeddings of a batch, and then a verification, may take.
    """

    enabled: bool = False
    model: str | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    verify: Annotated[str, Field(pattern=r"^(none|model:.+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$")] = (
        "none"
    )
    max_entries: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    timeout_ms: Milliseconds = 5_000.0

    @property
    def verify_model(self) -> str | None:
        """The model that verifies, where one does."""
        if not self.verify.startswith(VERIFY_BY_MODEL):
            return None
        return self.verify.removeprefix(VERIFY_BY_MODEL)

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.enabled and self.model is None:
            msg = "model: the semantic cache needs an embedding model, one of [models]"
            raise ValueError(msg)
        return self


class CacheSection(Section):
    """The response cache.

    Attributes:
        enabled: False turns it off for every job.
        type: "redis"; "memory", of each worker by itself; "disk", of each machine by itself; or
            "custom", a class of yours.
        ttl_s: Seconds that an answer is kept.
        namespace: A prefix of the keys; change it to start afresh.
        connection: The server's URL, or the file's path; by default the settings' own server.
        connection_env: The environment variable that holds it, for one with a password.
        factory: Of a custom one: "module:name", or a name in the entry points
            `promptfleet.caches`.
        max_value_bytes: A longer response is not cached.
        max_bytes: What "memory" and "disk" may hold; what was not used for longest goes first.
        compression: "zlib" for answers from 16 KiB, or "none".
        encryption_key_env: The environment variable with the keys, each of 32 bytes in base64,
            divided by commas: the first encrypts, all of them decrypt.
        layers: ["memory"] keeps answers in the worker's memory for some seconds, too.
        single_flight: "fleet" for one call for equal prompts in flight anywhere (with "redis");
            "worker" for one in each worker.
        semantic: Prompts that are alike, not equal.
    """

    enabled: bool = True
    type: Literal["redis", "memory", "disk", "custom"] = "redis"
    ttl_s: Count = 3600
    namespace: str = "default"
    connection: SecretStr | None = None
    connection_env: str | None = None
    factory: str | None = None
    max_value_bytes: Count = 1_000_000
    max_bytes: Count | None = None
    compression: Literal["zlib", "none"] = "zlib"
    encryption_key_env: str | None = None
    layers: tuple[Literal["memory"], ...] = ()
    single_flight: Literal["fleet", "worker"] = "fleet"
    semantic: SemanticSection = SemanticSection()

    def where(self) -> str | None:
        """The server's URL or the file's path, from wherever it is configured."""
        if self.connection is not None:
            return self.connection.get_secret_value()
        return os.environ.get(self.connection_env) if self.connection_env else None

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        for mistake in self._mistakes():
            raise ValueError(mistake)
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.connection is not None and self.connection_env is not None:
            yield "connection_env: give either it or connection"
        if self.type == "custom" and self.factory is None:
            yield 'factory: type "custom" needs "module:name", or a name in promptfleet.caches'
        if self.type != "custom" and self.factory is not None:
            yield f'factory: belongs to type "custom", not to {self.type!r}'
        if self.type == "disk" and self.connection is None and self.connection_env is None:
            yield 'connection: type "disk" needs the path of its file'
        if self.type == "redis" and self.max_bytes is not None:
            yield "max_bytes: Redis evicts by its own maxmemory and maxmemory-policy; set those"
        if self.layers and self.type == "memory":
            yield 'layers: type "memory" is in memory already'
        if self.semantic.enabled and self.type != "redis":
            yield f'semantic.enabled: needs type "redis", not {self.type!r}'

    def unknown_models(self, models: Collection[str]) -> str | None:
        """What is wrong with the models that this section names, if anything."""
        semantic = self.semantic
        if not semantic.enabled:
            return None
        for name, field in ((semantic.model, "model"), (semantic.verify_model, "verify")):
            if name is not None and name not in models:
                return f"cache.semantic.{field}: no [models.{name!r}] is defined"
        return None
