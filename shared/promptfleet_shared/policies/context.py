"""Context windows: what becomes of a chat that is longer than its model can read."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from promptfleet_shared.policies.section import Count, Section

BM25 = "bm25"
EMBEDDINGS = "embeddings:"

Tokens = Annotated[int, Field(ge=0)]
Relevance = Annotated[str, Field(pattern=r"^(bm25|embeddings:.+)$")]


class ContextPolicy(enum.StrEnum):
    """What is left out where a chat does not fit."""

    ERROR = "error"  # nothing: the job fails, code `context_length_exceeded`, and is not called
    TRUNCATE = "truncate"  # the oldest turns
    MIDDLE_OUT = "middle_out"  # the middle turns: the first and the newest ones stay
    RELEVANCE = "relevance"  # the turns that have least to do with the last one
    SUMMARIZE = "summarize"  # the oldest turns, and a summary of them takes their place


class ContextSection(Section):
    """The fleet's policy for what does not fit.

    Attributes:
        policy: What is left out. System messages, the last turn, and tool calls without their
            answers never are.
        reserve_output_tokens: Tokens of the window that are kept free for the answer of a job
            that says nothing of its length.
        relevance: What "relevance" goes by: "bm25" for the words that turns share, or
            "embeddings:MODEL" for a model of the fleet.
        summary_tier: The tier that writes summaries for "summarize".
        summary_tokens: Tokens that a summary may have.
        cut_last_turn: True to cut the longest message of a last turn that is too long by itself;
            else such a job fails.
    """

    policy: ContextPolicy = ContextPolicy.ERROR
    reserve_output_tokens: Tokens = 1024
    relevance: Relevance = BM25
    summary_tier: str | None = None
    summary_tokens: Count = 500
    cut_last_turn: bool = False

    def mistake(self, tiers: Iterable[str], models: Iterable[str]) -> str | None:
        """What does not go together with the fleet, as `field: what is wrong`."""
        if self.summary_tier is not None and self.summary_tier not in set(tiers):
            return f"context.summary_tier: no [tiers.{self.summary_tier}] is defined"
        if self.policy is ContextPolicy.SUMMARIZE and self.summary_tier is None:
            return "context.summary_tier: the policy summarize needs a tier that writes summaries"
        model = self.embedding_model
        if model is not None and model not in set(models):
            return f"context.relevance: no [models.{model!r}] is defined"
        return None

    @property
    def embedding_model(self) -> str | None:
        """The model whose embeddings relevance goes by; None for the words."""
        if self.relevance.startswith(EMBEDDINGS):
            return self.relevance.removeprefix(EMBEDDINGS)
        return None

    def with_options(self, options: ContextOptions | None) -> ContextSection:
        """This policy with what a job says otherwise."""
        if options is None:
            return self
        return self.model_copy(update=options.model_dump(exclude_none=True))


class ContextOptions(Section):
    """A job's own wishes; None means what fleet.toml says. The fields are `ContextSection`'s."""

    policy: ContextPolicy | None = None
    reserve_output_tokens: Tokens | None = None
    relevance: Relevance | None = None
    summary_tier: str | None = None
    summary_tokens: Count | None = None
    cut_last_turn: bool | None = None
