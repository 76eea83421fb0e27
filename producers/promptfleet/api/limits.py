"""What protects memory and the database: who brings too much is told when to come again.

A tenant that uses up its own share is told 429, and 503 where the API itself has no room. Both
come before the database is asked for anything that would make matters worse.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from starlette.requests import Request

from promptfleet.api.bodies import (
    BodyMemory,
    BodyReader,
    check_length,
    parse_json,
    require_json,
)
from promptfleet.api.errors import invalid, limited, overloaded, too_large
from promptfleet.api.metrics import ApiMetrics
from promptfleet.api.stores import Stores
from promptfleet_shared.jobs import JobSpec
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.backlog import tenant_backlog, whole_backlog

MAX_LISTENING = 128
MAX_LISTENING_OF_TENANT = 16
LOOK_AGAIN_S = 1.0
"""Seconds between two counts of a backlog, at least."""
LONGEST_LOOK_S = 30.0
FASTEST_GROWTH = 50_000
"""Jobs a second that a backlog may grow by: how soon one could reach its limit unseen."""
_COSTS_AT_MOST = 20
"""A count is made only once in so many times its own duration."""
_BACKLOG_RETRY_S = 5.0
_MAX_TENANTS = 10_000

Count = Callable[[], Awaitable[int]]


class Room:
    """So many requests of a kind at once: of all tenants, and of each."""

    def __init__(
        self, name: str, *, metrics: ApiMetrics, most: int, most_a_tenant: int | None = None
    ) -> None:
        """All free.

        Args:
            name: What is limited, in the plural.
            metrics: Counts who found no room.
            most: At once in this process.
            most_a_tenant: Of one tenant; None for no such limit.
        """
        self._name = name
        self._metrics = metrics
        self._most = most
        self._most_a_tenant = most if most_a_tenant is None else most_a_tenant
        self._taken = 0
        self._by_tenant: defaultdict[str, int] = defaultdict(int)

    @property
    def most_of_tenant(self) -> int:
        """How many one tenant may have at once."""
        return min(self._most, self._most_a_tenant)

    def left(self, tenant: str) -> int:
        """How many more the tenant may have now."""
        own = self._by_tenant.get(tenant, 0)
        return max(0, min(self._most - self._taken, self._most_a_tenant - own))

    @contextlib.contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """Hold a place.

        Raises:
            ApiError: 429, the tenant has all of its places taken; 503, there is none at all.
        """
        if self._taken >= self._most:
            self._metrics.refused(self._name)
            raise overloaded(f"The API has {self._most} {self._name} under way, its limit.")
        if self._by_tenant[tenant] >= self._most_a_tenant:
            self._metrics.refused(f"{self._name}_of_tenant")
            msg = f"You have {self._most_a_tenant} {self._name} under way here, the limit."
            raise limited(msg, code="too_many_requests")
        self._taken += 1
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._taken -= 1
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]


class Backlog:
    """A number of jobs, counted now and then, and guessed in between."""

    def __init__(self, count: Count, *, most: int, clock: Callable[[], float]) -> None:
        """Nothing is known.

        Args:
            count: Counts up to one more than `most`.
            most: The limit; 0 for none.
            clock: Monotonic seconds.
        """
        self._count = count
        self._most = most
        self._clock = clock
        self._known = 0
        self._added = 0
        self._look_at = float("-inf")
        self._looking = asyncio.Lock()

    async def has_room(self, jobs: int = 1) -> bool:
        """True if so many jobs may come on top.

        Raises:
            StoreUnavailableError: The database can't be asked.
        """
        if not self._most:
            return True
        if self._clock() >= self._look_at and not self._looking.locked():
            async with self._looking:
                await self._look()
        return self._known + self._added + jobs <= self._most

    def add(self, jobs: int) -> None:
        """So many came from here."""
        self._added += jobs

    async def _look(self) -> None:
        began = self._clock()
        self._added = 0
        self._known = await self._count()
        took_s = self._clock() - began
        headroom_s = (self._most - self._known) / FASTEST_GROWTH
        pause_s = max(LOOK_AGAIN_S, took_s * _COSTS_AT_MOST, headroom_s)
        self._look_at = self._clock() + min(pause_s, LONGEST_LOOK_S)


class Limits:
    """All limits of one API process.

    Attributes:
        body_memory: Bytes of bodies that are being read.
        submissions: Requests that submit.
        uploads: Of those, uploads of many jobs.
        waiting: Requests that wait for results or stream tokens.
        listening: Requests that wait for whatever lands next: each of them polls.
    """

    def __init__(
        self,
        settings: Settings,
        stores: Stores,
        metrics: ApiMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is taken.

        Args:
            settings: Of the process.
            stores: Where backlogs are counted.
            metrics: Counts who is refused.
            clock: Monotonic seconds.
        """
        self._settings = settings
        self._stores = stores
        self._metrics = metrics
        self._clock = clock
        self.body_memory = BodyMemory(settings.api_body_memory_bytes)
        self.submissions = Room("submissions", metrics=metrics, most=settings.api_max_submissions)
        self.uploads = Room("uploads", metrics=metrics, most=settings.api_max_uploads)
        self.waiting = Room(
            "waiting_requests",
            metrics=metrics,
            most=settings.api_max_waiting,
            most_a_tenant=settings.api_max_waiting_per_tenant,
        )
        self.listening = Room(
            "listening_requests",
            metrics=metrics,
            most=MAX_LISTENING,
            most_a_tenant=MAX_LISTENING_OF_TENANT,
        )
        self._all = Backlog(self._count_all, most=settings.api_max_queued, clock=clock)
        self._of_tenant: dict[str, Backlog] = {}

    async def read_json(self, request: Request) -> Any:
        """The request's body, decoded; its content type must be JSON's.

        Raises:
            ApiError: 408, 413, 415 or 503 as for `read_body`; 422 for its structure.
            InvalidRequestError: It is no JSON.
            ClientDisconnect: The client left.
        """
        require_json(request)
        return parse_json(await self.read_body(request))

    async def read_body(self, request: Request, reader: BodyReader | None = None) -> bytearray:
        """The request's body, bounded.

        Args:
            request: Whose.
            reader: Of this request, where something was looked at already.

        Raises:
            ApiError: 413, it is larger than the limit; told by its content-length before anything
                is read. 503, there is no memory for it. 408, it paused for too long.
            ClientDisconnect: The client left.
        """
        most = self._settings.api_max_body_bytes
        check_length(request, most)
        reader = reader or BodyReader(request.receive)
        return await reader.read_all(most=most, memory=self.body_memory)

    def check_prompts(self, count: int, *, param: str) -> None:
        """Do nothing if one request may hold so many prompts.

        Raises:
            ApiError: 422; names the limit.
        """
        most = self._settings.api_max_prompts
        if count > most:
            msg = f"{param}: holds {count} prompts; {most} is the limit of one request"
            raise invalid(msg, param=param, code="too_many_prompts")

    def check_tokens(self, spec: JobSpec, *, param: str = "prompt") -> None:
        """Do nothing if the job's prompt is short enough, as far as can be told cheaply.

        Raises:
            ApiError: 413; names the limit.
        """
        most = self._settings.api_max_prompt_tokens
        if spec.input_tokens > most:
            msg = f"{param}: is about {spec.input_tokens} tokens; {most} is the limit"
            raise too_large(msg, code="prompt_too_long")

    async def check_backlog(self, tenant: str, jobs: int = 1) -> None:
        """Do nothing if so many jobs of the tenant may come on top of those that wait.

        Raises:
            ApiError: 429, the tenant has too many that are not final; 503, the fleet has.
            StoreUnavailableError: They can't be counted.
        """
        if not await self._all.has_room(jobs):
            self._metrics.refused("queued")
            msg = "The fleet has as many unfinished jobs as it takes; submit again later."
            raise overloaded(msg, retry_after_s=_BACKLOG_RETRY_S)
        if not await self._tenants(tenant).has_room(jobs):
            self._metrics.refused("queued_of_tenant")
            most = self._settings.api_max_queued_per_tenant
            msg = f"You have {most} unfinished jobs, the limit; submit more when some have ended."
            raise limited(msg, code="queue_full", retry_after_s=_BACKLOG_RETRY_S)

    def accepted(self, tenant: str, jobs: int) -> None:
        """So many jobs of the tenant were committed."""
        self._metrics.accepted(jobs)
        self._all.add(jobs)
        self._tenants(tenant).add(jobs)

    def _tenants(self, tenant: str) -> Backlog:
        known = self._of_tenant.get(tenant)
        if known is None:
            if len(self._of_tenant) >= _MAX_TENANTS:
                self._of_tenant.clear()  # they are counted anew when they come again
            most = self._settings.api_max_queued_per_tenant

            async def count() -> int:
                return await self._stores.run(
                    tenant, lambda c: tenant_backlog(c, tenant=tenant, most=most + 1)
                )

            known = self._of_tenant[tenant] = Backlog(count, most=most, clock=self._clock)
        return known

    async def _count_all(self) -> int:
        most = self._settings.api_max_queued + 1
        return await self._stores.admin(lambda connection: whole_backlog(connection, most=most))
