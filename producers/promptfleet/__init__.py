"""Enqueue prompts and read their results."""

from promptfleet.async_client import AsyncClient
from promptfleet.callbacks import CallbackEvent, verify_callback
from promptfleet.client import Client
from promptfleet.default_client import (
    cancel,
    delete_conversation,
    enqueue_prompt,
    enqueue_prompts,
    get_conversation,
    get_result,
    wait_for_result,
)
from promptfleet.handles import AsyncPromptJob, PromptJob
from promptfleet.options import PromptOptions
from promptfleet.requests import Message, Prompt
from promptfleet.streaming import Token
from promptfleet_shared.errors import (
    BlockedAddressError,
    BrokerUnavailableError,
    ConfigurationError,
    IdempotencyConflictError,
    InvalidRequestError,
    InvalidSignatureError,
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobNotFoundError,
    PromptFleetError,
    StoreRefusedError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from promptfleet_shared.jobs import (
    CacheMode,
    CacheOptions,
    CacheStatus,
    Conversation,
    ConversationTurn,
    JobError,
    JobKind,
    JobState,
    OnUnknown,
    Result,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncPromptJob",
    "BlockedAddressError",
    "BrokerUnavailableError",
    "CacheMode",
    "CacheOptions",
    "CacheStatus",
    "CallbackEvent",
    "Client",
    "ConfigurationError",
    "Conversation",
    "ConversationTurn",
    "IdempotencyConflictError",
    "InvalidRequestError",
    "InvalidSignatureError",
    "JobCancelledError",
    "JobError",
    "JobExpiredError",
    "JobFailedError",
    "JobKind",
    "JobNotFoundError",
    "JobState",
    "Message",
    "OnUnknown",
    "Prompt",
    "PromptFleetError",
    "PromptJob",
    "PromptOptions",
    "Result",
    "StoreRefusedError",
    "StoreUnavailableError",
    "Token",
    "Usage",
    "WaitTimeoutError",
    "cancel",
    "delete_conversation",
    "enqueue_prompt",
    "enqueue_prompts",
    "get_conversation",
    "get_result",
    "verify_callback",
    "wait_for_result",
]
