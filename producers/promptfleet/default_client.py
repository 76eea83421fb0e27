"""The verbs as functions: one client of the environment's settings, made at first use."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Unpack

from promptfleet.client import Client
from promptfleet.handles import PromptJob
from promptfleet.options import PromptOptions
from promptfleet.requests import Prompt, PromptInput
from promptfleet_shared.jobs import Conversation, Result

if TYPE_CHECKING:
    from promptfleet.client import SyncSession


class _Default:
    """The client behind the functions; safe from threads and over forks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._hooked = False

    def get(self) -> Client:
        return self._client or self._make()

    def _make(self) -> Client:
        if not self._hooked and hasattr(os, "register_at_fork"):
            self._hooked = True
            os.register_at_fork(after_in_child=self._after_fork)
        with self._lock:
            if self._client is None:
                self._client = Client()
            return self._client

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # the parent's may have been held by a thread of its own


_default = _Default()


def enqueue_prompt(
    prompt: PromptInput,
    *,
    session: SyncSession | None = None,
    **options: Unpack[PromptOptions],
) -> PromptJob:
    """Accept a prompt: once this returns, the job is never lost.

    Args:
        prompt: The prompt's text, or the messages of a chat.
        session: A SQLAlchemy session or connection of the caller's: the job joins its
            transaction, and workers hear of it after the commit.
        options: `tier`, `model`, `max_tokens` and so on; see `PromptOptions`.

    Raises:
        InvalidRequestError: `field` names what is wrong.
        IdempotencyConflictError: The key was used with another request.
        StoreUnavailableError: The database can't be reached. Nothing was accepted, unless
            `unknown_outcome` says that nobody knows: then the same key makes a repeat safe.

    Example:
        >>> from promptfleet.testing import fake_fleet
        >>> with fake_fleet("Bonjour."):
        ...     job = enqueue_prompt("Say hello in French.", tier="basic")
        ...     job.result(timeout=30).text
        'Bonjour.'
    """
    return _default.get().enqueue_prompt(prompt, session=session, **options)


def enqueue_prompts(
    prompts: Iterable[PromptInput | Prompt],
    *,
    session: SyncSession | None = None,
    **options: Unpack[PromptOptions],
) -> list[PromptJob]:
    """Accept many prompts in one transaction; see `Client.enqueue_prompts`."""
    return _default.get().enqueue_prompts(prompts, session=session, **options)


def get_result(id: uuid.UUID | str) -> Result | None:  # noqa: A002  # what users call it
    """The job's result, or None while it is not final; see `Client.get_result`."""
    return _default.get().get_result(id)


def wait_for_result(id: uuid.UUID | str, timeout: float | None = None) -> Result:  # noqa: A002
    """Wait for the job's end and return its result; see `Client.wait_for_result`."""
    return _default.get().wait_for_result(id, timeout)


def cancel(id: uuid.UUID | str) -> bool:  # noqa: A002
    """Ask for the job's cancellation; see `Client.cancel`."""
    return _default.get().cancel(id)


def get_conversation(memory_id: str) -> Conversation | None:
    """What is remembered under a `memory_id`; see `Client.get_conversation`."""
    return _default.get().get_conversation(memory_id)


def delete_conversation(memory_id: str) -> bool:
    """Forget a conversation; see `Client.delete_conversation`."""
    return _default.get().delete_conversation(memory_id)
