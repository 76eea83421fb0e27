"""Who calls: `Authorization: Bearer pf_…`, and what that key may do.

A key is looked up once in some seconds, however many requests bring it: so a revoked key opens
nothing after `RECHECK_S` at the latest, in every process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Annotated, Protocol

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from promptfleet.api.errors import ApiError
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.database import Statement
from promptfleet_shared.store.keys import KnownKey, Scope, find_key, key_digest, note_used

RECHECK_S = 5.0
"""Seconds after which a key is looked up again; unknown keys, too."""
NOTE_EVERY_S = 60.0
"""Seconds between two notes that a key was used."""
MAX_REMEMBERED = 10_000
"""Keys that a process remembers, and as many that are none."""
_NOTE_WITHIN_S = 2.0
_CHALLENGE = {"www-authenticate": "Bearer"}
ALL_SCOPES = frozenset(Scope)
# For the OpenAPI document only: what it parses is parsed by `bearer`.
_Documented = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, bearerFormat="pf_…", scheme_name="API key")),
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Whoever a request comes from.

    Attributes:
        tenant: Whose things it may see; all that is anyone else's does not exist for it.
        key_id: Of the key; None for a caller without one, which only `api_keyless` lets in.
    """

    tenant: str
    key_id: uuid.UUID | None
    scopes: frozenset[Scope]


class KeyStore(Protocol):
    """What looks up keys; `Stores` is the real one."""

    async def admin(self, statements: Statement[KnownKey | None], /) -> KnownKey | None:
        """Run statements of no tenant."""
        ...

    async def run(self, tenant: str, statement: Statement[None], /) -> None:
        """Run a tenant's statement."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What is known of a key, up to a moment of the process's clock."""

    caller: Caller | None
    until_s: float


class Authenticator:
    """Tells who calls, and notes which keys are used."""

    def __init__(
        self,
        stores: KeyStore,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Look up nothing yet.

        Args:
            stores: Where keys are.
            settings: Of the process.
            clock: Monotonic seconds.
            sleep: Waits so many seconds while uses of keys are gathered.
        """
        self._stores = stores
        self._keyless = settings.api_keyless
        self._own_tenant = settings.tenant
        self._clock = clock
        self._sleep = sleep
        # Apart, so that a flood of made-up keys can't push out a real one.
        self._known: OrderedDict[bytes, _Entry] = OrderedDict()
        self._unknown: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lookups: dict[bytes, asyncio.Task[_Entry]] = {}
        self._noted_at: OrderedDict[uuid.UUID, float] = OrderedDict()
        self._used: dict[str, set[uuid.UUID]] = {}
        self._writer: asyncio.Task[None] | None = None

    async def identify(self, request: Request) -> Caller:
        """Who the request comes from.

        Raises:
            ApiError: 401 without a key, or with one that opens nothing.
            StoreUnavailableError: The key could not be looked up.
        """
        presented = bearer(request)
        if presented is None or not presented.startswith("pf_"):
            if self._keyless and is_local(request):
                return Caller(tenant=self._own_tenant, key_id=None, scopes=ALL_SCOPES)
            raise _unauthorized(presented)
        digest = key_digest(presented)
        caller = None if digest is None else (await self._entry(digest)).caller
        if caller is None:
            raise _unauthorized(presented)
        self._note(caller)
        return caller

    def forget(self, key_id: uuid.UUID) -> None:
        """Look a key up again at its next use, since it was changed just now."""
        for digest, entry in list(self._known.items()):
            if entry.caller is not None and entry.caller.key_id == key_id:
                del self._known[digest]

    async def close(self) -> None:
        """Write down what was used; what can't be written now is forgotten."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._write()

    async def _entry(self, digest: bytes) -> _Entry:
        known = self._known.get(digest) or self._unknown.get(digest)
        if known is not None and self._clock() < known.until_s:
            return known
        # One look-up for all who ask at once, which goes on when the first of them leaves.
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(digest))
            self._lookups[digest] = lookup
            lookup.add_done_callback(lambda task: self._looked_up(digest, task))
        return await asyncio.shield(lookup)

    def _looked_up(self, digest: bytes, task: asyncio.Task[_Entry]) -> None:
        self._lookups.pop(digest, None)
        if not task.cancelled():
            task.exception()  # seen, though everybody who asked may have left

    async def _look_up(self, digest: bytes) -> _Entry:
        asked_s = self._clock()
        found = await self._stores.admin(lambda connection: find_key(connection, digest))
        lasts_s, caller = RECHECK_S, None
        if found is not None:
            caller = Caller(tenant=found.tenant, key_id=found.id, scopes=found.scopes)
            if found.remaining_s is not None:
                lasts_s = min(lasts_s, found.remaining_s)
        entry = _Entry(caller=caller, until_s=asked_s + lasts_s)
        self._remember(digest, entry)
        return entry

    def _remember(self, digest: bytes, entry: _Entry) -> None:
        here, there = self._known, self._unknown
        if entry.caller is None:
            here, there = there, here
        there.pop(digest, None)
        here[digest] = entry
        here.move_to_end(digest)
        if len(here) > MAX_REMEMBERED:
            here.popitem(last=False)

    def _note(self, caller: Caller) -> None:
        """Remember that the key was used, and write it down soon, with all others."""
        assert caller.key_id is not None  # noqa: S101  # for the type checker
        now = self._clock()
        noted_at = self._noted_at.get(caller.key_id)
        if noted_at is not None and now - noted_at < NOTE_EVERY_S:
            return
        self._noted_at[caller.key_id] = now
        self._noted_at.move_to_end(caller.key_id)
        if len(self._noted_at) > MAX_REMEMBERED:
            self._noted_at.popitem(last=False)
        self._used.setdefault(caller.tenant, set()).add(caller.key_id)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_soon())

    async def _write_soon(self) -> None:
        while self._used:
            await self._sleep(_NOTE_WITHIN_S)
            await self._write()

    async def _write(self) -> None:
        used, self._used = self._used, {}
        for tenant, ids in used.items():
            try:
                await self._stores.run(tenant, _noting(ids, tenant))
            except PromptFleetError:
                return  # only a date, and the next use writes it again


def _noting(ids: set[uuid.UUID], tenant: str) -> Statement[None]:
    return lambda connection: note_used(connection, ids, tenant=tenant)


def bearer(request: Request) -> str | None:
    """The key that the request presents, whatever it may be; None if it presents none."""
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    presented = presented.strip()
    return presented if scheme.lower() == "bearer" and presented else None


def is_local(request: Request) -> bool:
    """True if the request comes from this very machine, and from no web page that is not.

    A page that somebody has open could post here, under a name of its own that it lets point here:
    so the host that it asked for, and its origin if it has one, must be this machine, too.
    """
    peer = request.client
    if peer is None or not _is_loopback(peer.host):
        return False
    origin = request.headers.get("origin")
    if origin is not None and not _is_loopback(_host_of(origin.partition("://")[2])):
        return False
    return _is_loopback(_host_of(request.headers.get("host", "")))


def _host_of(authority: str) -> str:
    """The host of `host:port`, where an IPv6 address stands in brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _unauthorized(presented: str | None) -> ApiError:
    if presented is None:
        message = "There is no API key: send the header `Authorization: Bearer pf_…`."
    else:  # not a part of it: what was sent may be a key of somebody else's
        message = "This API key is not known, or was revoked, or has expired."
    return ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE)


async def authenticate(request: Request, _: _Documented = None) -> Caller:
    """Who calls; a dependency of FastAPI. Raises as `Authenticator.identify`."""
    authenticator: Authenticator = request.app.state.services.auth
    return await authenticator.identify(request)


def require(*scopes: Scope | str) -> Callable[..., Awaitable[Caller]]:
    """A dependency of FastAPI: who calls, with a key that has all of these scopes.

    Raises, as a dependency, ApiError with 403 where a scope is missing.
    """
    wanted = tuple(Scope(scope) for scope in scopes)

    async def authorised(request: Request, _: _Documented = None) -> Caller:
        caller = await authenticate(request)
        check_scopes(caller, wanted)
        return caller

    return authorised


def check_scopes(caller: Caller, wanted: tuple[Scope, ...]) -> None:
    """Pass if the caller has all of them.

    Raises:
        ApiError: 403; the message names what is missing.
    """
    missing = [scope.value for scope in wanted if scope not in caller.scopes]
    if missing:
        message = f"This API key lacks the scope {', '.join(missing)}."
        raise ApiError(403, message, type="permission_error", code="insufficient_scope")
