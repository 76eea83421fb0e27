"""The one tree of exceptions.

    PromptFleetError
    ├── ConfigurationError          a setting or fleet.toml is wrong
    ├── InvalidRequestError         the caller's input is wrong; names the field   (a ValueError)
    │   ├── IdempotencyConflictError   the key was used with another request
    │   └── BlockedAddressError     a URL's host is at an address that is not public
    ├── InvalidSignatureError       a callback does not come from who it should
    ├── JobNotFoundError            no such job for this tenant                     (a LookupError)
    ├── JobFailedError              the job ended without a success; carries the outcome's facts
    │   ├── JobCancelledError
    │   └── JobExpiredError
    ├── WaitTimeoutError            the job is not final yet; it goes on            (a TimeoutError)
    ├── StoreUnavailableError       Postgres is away: nothing was accepted, or nobody knows
    ├── BrokerUnavailableError      Redis can't be reached: jobs wait, none is lost
    ├── StoreRefusedError           Postgres did not take a statement
    └── ProviderError               a provider's call failed; see `retries.classify`

The docstring of a class is its default message; facts are attributes, never prompts or outputs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from promptfleet_shared.jobs import Usage


class PromptFleetError(Exception):
    """promptfleet could not do what was asked."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str | None = None, **facts: object) -> None:
        """Keep `facts` as attributes; `message` replaces the class's docstring."""
        self.message = message or inspect.cleandoc(type(self).__doc__ or "")
        for name, value in facts.items():
            setattr(self, name, value)
        self.facts = facts
        super().__init__(self.message)


class ConfigurationError(PromptFleetError):
    """A setting or fleet.toml is wrong."""

    code = "configuration"


class InvalidRequestError(PromptFleetError, ValueError):
    """The request is not valid; `field` names what is wrong with it."""

    code = "invalid_request"
    field: str = ""


class IdempotencyConflictError(InvalidRequestError):
    """This idempotency key was already used with a different request."""

    code = "idempotency_conflict"


class BlockedAddressError(InvalidRequestError):
    """The URL's host has an address that is not public."""

    code = "blocked_address"


class InvalidSignatureError(PromptFleetError):
    """The callback is not signed with a known secret, or not signed just now."""

    code = "invalid_signature"


class JobNotFoundError(PromptFleetError, LookupError):
    """There is no such job."""

    code = "not_found"


class JobFailedError(PromptFleetError):
    """The job failed."""

    code = "failed"


class JobCancelledError(JobFailedError):
    """The job was cancelled."""

    code = "cancelled"


class JobExpiredError(JobFailedError):
    """The job's deadline passed before it succeeded."""

    code = "expired"


class WaitTimeoutError(PromptFleetError, TimeoutError):
    """The job is not finished yet; it goes on and can be waited for again."""

    code = "wait_timeout"


class StoreUnavailableError(PromptFleetError):
    """The database can't be reached, so nothing was accepted."""

    code = "store_unavailable"
    unknown_outcome: bool = False
    """True where it was lost with a submission under way, which it may have committed."""


class BrokerUnavailableError(PromptFleetError):
    """The broker can't be reached; workers find waiting jobs in the database all the same."""

    code = "broker_unavailable"


class StoreRefusedError(PromptFleetError):
    """The database refused a statement; `sqlstate` says why, where the database told."""

    code = "store_refused"
    sqlstate: str | None = None


class ProviderError(PromptFleetError):
    """A provider's call failed.

    `retries.classify` alone decides from these facts whether and when it is tried again.
    """

    code = "provider_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str = "provider_error",
        status: int | None = None,
        retry_after_s: float | None = None,
        unknown_outcome: bool = False,
        usage: Usage | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """Facts of the failure.

        Args:
            message: What happened, without any part of a prompt or an output.
            code: The provider's or our own short code, e.g. "rate_limit_exceeded".
            status: The HTTP status, where there was one.
            retry_after_s: Seconds the provider told us to wait, if it did.
            unknown_outcome: True if the provider may have done (and billed) the work.
            usage: What the provider itself counted for it, where it did.
            limits: The limits of a minute that its refusal names, by what they count: "requests",
                "input_tokens", "output_tokens" or "tokens".
        """
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # per failure here, per class elsewhere
        self.status = status
        self.retry_after_s = retry_after_s
        self.unknown_outcome = unknown_outcome
        self.usage = usage
        self.limits = limits
