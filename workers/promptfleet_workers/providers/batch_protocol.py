"""What a provider's own batch API is to the service that hands it jobs."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Protocol

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.protocol import Answer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A request of a batch; `custom_id` tells its answer: letters, digits, - and _, at most 64."""

    custom_id: str
    request: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is asked of the provider.

    Attributes:
        batch_id: Ours.
        count: How many lines there are.
        lines: Gives them, in a fixed order, some at a time, anew each time it is called.
        file_id: Where the provider keeps them, after an upload.
    """

    batch_id: uuid.UUID
    kind: JobKind
    model: str
    count: int
    lines: Callable[[], AsyncIterator[Sequence[Line]]]
    file_id: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What is looked for: a batch that was asked for, and whose making nobody saw the end of.

    Attributes:
        since: Seconds since 1970 when it was asked for, by our clock.
        known: Those of a provider's names that are other batches of ours.
        owns: True for the custom id of one of its lines.
    """

    batch_id: uuid.UUID
    file_id: str | None
    count: int
    since: float
    known: Callable[[Collection[str]], Awaitable[set[str]]]
    owns: Callable[[str], Awaitable[bool]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """What a search came to.

    Attributes:
        provider_id: The provider's name for the batch, if it is there.
        undecided: True if something is there that may be it, and that does not tell yet.
    """

    provider_id: str | None = None
    undecided: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchView:
    """A batch as the provider shows it.

    Attributes:
        is_over: True if nothing is to come any more.
        sources: Where the answers are; none before it is over.
        failure: Why the batch as a whole was refused, if it was: then no line was answered.
    """

    provider_id: str
    is_over: bool
    sources: tuple[str, ...] = ()
    failure: ProviderError | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LineAnswer:
    """What became of a line; answers come in any order."""

    custom_id: str
    answer: Answer


NOT_DONE = frozenset({"batch_expired", "batch_cancelled"})
"""Our codes for lines that the provider did not come to: nothing was done, nothing is owed."""


class BatchApi(Protocol):
    """A deployment's batch API."""

    max_lines: int
    max_bytes: int
    kinds: frozenset[JobKind]

    def written(self, line: Line, kind: JobKind, model: str) -> bytes:
        """The line as it is sent.

        Raises:
            ProviderError: `unsupported`: the protocol has no form for the request.
        """
        ...

    async def upload(self, order: Order) -> str | None:
        """Leave the lines with the provider; its name for them, or None if they go with `create`.

        May be repeated: a file that nobody asks about costs nothing.

        Raises:
            ProviderError: It was refused, or nobody knows.
        """
        ...

    async def create(self, order: Order) -> str:
        """Have the batch made; the provider's name for it.

        Raises:
            ProviderError: It was refused, or nobody knows: see `unknown_outcome`.
        """
        ...

    async def find(self, search: Search) -> Sighting:
        """Look through the provider's list.

        Raises:
            ProviderError: It can't be read.
        """
        ...

    async def look(self, provider_id: str) -> BatchView:
        """How the batch stands.

        Raises:
            ProviderError: It can't be read.
        """
        ...

    def answers(self, view: BatchView, kind: JobKind) -> AsyncIterator[LineAnswer]:
        """What became of the lines of a batch that is over.

        Raises:
            ProviderError: They can't be read, or not to their end.
        """
        ...

    async def cancel(self, provider_id: str) -> None:
        """Ask the provider to stop; lines that it has begun may still be answered.

        Raises:
            ProviderError: It was refused, or nobody knows.
        """
        ...
