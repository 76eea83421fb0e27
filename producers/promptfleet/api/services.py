"""What every router stands on; `app.py` builds it, once a process."""

from __future__ import annotations

import asyncio
import dataclasses

from promptfleet.api.auth import Authenticator
from promptfleet.api.limits import Limits
from promptfleet.api.metrics import ApiMetrics
from promptfleet.api.result_hub import ResultHub
from promptfleet.api.stores import Stores
from promptfleet.api.stream_hub import StreamHub
from promptfleet.backends import Bell
from promptfleet.requests import Defaults
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """The parts of one API process.

    Attributes:
        settings: Of the process.
        fleet: Tiers and models.
        stores: The database.
        ringer: Rings for what was accepted.
        auth: Knows who calls.
        results: Waits for jobs' ends.
        streams: Follows jobs' tokens.
        limits: What protects memory and database.
        metrics: What is counted.
        defaults: What holds for a job that says nothing; the tenant is replaced by the caller's.
        batch_bell: Set where a batch may be due; `BatchRunner` looks then.
    """

    settings: Settings
    fleet: Fleet
    stores: Stores
    ringer: Bell
    auth: Authenticator
    results: ResultHub
    streams: StreamHub
    limits: Limits
    metrics: ApiMetrics
    defaults: Defaults
    batch_bell: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def defaults_of(self, tenant: str) -> Defaults:
        """What holds for this tenant's jobs."""
        return dataclasses.replace(self.defaults, tenant=tenant)
