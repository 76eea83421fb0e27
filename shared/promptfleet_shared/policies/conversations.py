"""Conversation memory: how much of what was said before is put before a job's new turn."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from promptfleet_shared.policies.section import Count, Section


class MemoryStrategy(enum.StrEnum):
    """What of a long conversation is remembered."""

    WINDOW = "window"  # the newest turns
    SUMMARY = "summary"  # the newest turns, and a summary of those before


class MemorySection(Section):
    """What jobs with a `memory_id` are told of their conversation.

    Attributes:
        strategy: What of a long conversation is remembered.
        max_tokens: Tokens of remembered turns (and summary) at most.
        summarization_threshold: Tokens of remembered turns from which on the older ones are
            summarised, for the strategy "summary".
        summarization_model: The model of the fleet that writes summaries; by default whatever
            model answers the conversation.
        summary_tokens: Tokens that a summary may have.
        retention_days: Days after its last turn that a conversation is kept; None keeps it as
            long as results are kept.
    """

    strategy: MemoryStrategy = MemoryStrategy.WINDOW
    max_tokens: Count = 4000
    summarization_threshold: Count = 3000
    summarization_model: str | None = None
    summary_tokens: Count = 500
    retention_days: Annotated[float, Field(gt=0)] | None = None

    def mistake(self, models: Iterable[str]) -> str | None:
        """What does not go together with the fleet, as `field: what is wrong`."""
        model = self.summarization_model
        if model is not None and model not in set(models):
            return f"memory.summarization_model: no [models.{model!r}] is defined"
        return None

    def with_options(self, options: MemoryOptions | None) -> MemorySection:
        """This memory with what a job says otherwise."""
        if options is None:
            return self
        return self.model_copy(update=options.model_dump(exclude_none=True))


class MemoryOptions(Section):
    """A job's own wishes; None means what fleet.toml says. The fields are `MemorySection`'s."""

    strategy: MemoryStrategy | None = None
    max_tokens: Count | None = None
    summarization_threshold: Count | None = None
    summarization_model: str | None = None
    summary_tokens: Count | None = None
