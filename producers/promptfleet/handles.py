"""Handles: what `enqueue_prompt` gives back for a job."""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING

from promptfleet.streaming import (
    AsyncTokens,
    OnComplete,
    OnError,
    OnToken,
    Tokens,
    stream,
    stream_async,
)
from promptfleet.waiting import succeeded
from promptfleet_shared.jobs import JobState, Result

if TYPE_CHECKING:
    from promptfleet.async_client import AsyncClient
    from promptfleet.client import Client


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptJob:
    """A job that was accepted.

    Attributes:
        id: Its id: a UUIDv7, so ids sort by time.
        tier: Which tier answers it.
    """

    id: uuid.UUID
    tier: str
    _client: Client = dataclasses.field(repr=False, compare=False)

    def state(self) -> JobState:
        """Where it is now.

        Raises:
            JobNotFoundError: It is not committed, or was pruned long after its end.
        """
        return self._client.get_state(self.id)

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for its end, whatever that is.

        Raises:
            WaitTimeoutError: It is not final within `timeout` seconds; it goes on.
        """
        return self._client.wait_for_result(self.id, timeout)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for its success.

        Raises:
            JobFailedError: It failed; or `JobCancelledError`, `JobExpiredError`.
            WaitTimeoutError: It is not final within `timeout` seconds; it goes on.
        """
        return succeeded(self.wait(timeout))

    def tokens(self, timeout: float | None = None) -> Tokens:
        """Its text as it comes, to iterate over: all of it, whenever the iteration begins.

        Of a job that was not submitted with `stream=True`, the text comes in one piece at its end.
        Where a try breaks off in the middle, the next one begins anew: that piece has `restarts`
        set, and all before it is void.

        Raises:
            JobFailedError: At the end, if it failed; or `JobCancelledError`, `JobExpiredError`.
            WaitTimeoutError: It is not final within `timeout` seconds; it goes on.
        """
        return self._client.tokens(self.id, timeout)

    def stream(
        self,
        *,
        on_token: OnToken | None = None,
        on_complete: OnComplete | None = None,
        on_error: OnError | None = None,
        timeout: float | None = None,
    ) -> Result | None:
        """Call back for each piece of its text, and at its end; returns after that.

        Args:
            on_token: Gets each piece, as `tokens` has it.
            on_complete: Gets the result of a success.
            on_error: Gets the error of anything else; without it, the error is raised.
            timeout: Seconds until its end.

        Returns:
            The result, unless `on_error` was called.
        """
        tokens = self.tokens(timeout)
        return stream(tokens, on_token=on_token, on_complete=on_complete, on_error=on_error)

    def cancel(self) -> bool:
        """Ask for its cancellation; False if it was final already."""
        return self._client.cancel(self.id)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AsyncPromptJob:
    """A job that was accepted; the verbs of `PromptJob`, to be awaited.

    Attributes:
        id: Its id: a UUIDv7, so ids sort by time.
        tier: Which tier answers it.
    """

    id: uuid.UUID
    tier: str
    _client: AsyncClient = dataclasses.field(repr=False, compare=False)

    async def state(self) -> JobState:
        """Where it is now; see `PromptJob.state`."""
        return await self._client.get_state(self.id)

    async def wait(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109  # as the other
        """Wait for its end, whatever that is; see `PromptJob.wait`."""
        return await self._client.wait_for_result(self.id, timeout)

    async def result(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109
        """Wait for its success; see `PromptJob.result`."""
        return succeeded(await self.wait(timeout))

    def tokens(self, timeout: float | None = None) -> AsyncTokens:
        """Its text as it comes, for `async for`; see `PromptJob.tokens`."""
        return self._client.tokens(self.id, timeout)

    async def stream(
        self,
        *,
        on_token: OnToken | None = None,
        on_complete: OnComplete | None = None,
        on_error: OnError | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Result | None:
        """Call back, or await a call, for each piece and at the end; see `PromptJob.stream`."""
        return await stream_async(
            self.tokens(timeout), on_token=on_token, on_complete=on_complete, on_error=on_error
        )

    async def cancel(self) -> bool:
        """Ask for its cancellation; False if it was final already."""
        return await self._client.cancel(self.id)
