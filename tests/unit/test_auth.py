"""Who calls: keys remembered for seconds, and what may do without one."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from fastapi import Request
from pydantic import SecretStr

from promptfleet.api import auth
from promptfleet.api.auth import RECHECK_S, Authenticator, Caller, bearer, check_scopes, is_local
from promptfleet.api.errors import ApiError
from promptfleet_shared.errors import StoreUnavailableError
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.keys import KnownKey, Scope, key_digest

TENANT = "acme"


def secret(n: int = 0) -> str:
    return f"pf_{n:043d}"


def request(
    key: str | None = None,
    *,
    peer: str | None = "127.0.0.1",
    host: str = "127.0.0.1:8000",
    **headers: str,
) -> Request:
    given = {"host": host, **headers}
    if key is not None:
        given["authorization"] = f"Bearer {key}"
    return Request(
        {
            "type": "http",
            "headers": [(k.encode(), v.encode()) for k, v in given.items()],
            "client": None if peer is None else (peer, 50_000),
        }
    )


class Keys:
    """A table of keys, in place of the store."""

    def __init__(self) -> None:
        self.found: dict[str, KnownKey] = {}
        self.lookups = 0
        self.noted: list[tuple[str, set[uuid.UUID]]] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.away = False

    def add(self, key: str, *, remaining_s: float | None = None) -> KnownKey:
        digest = key_digest(key)
        assert digest is not None
        self.found[key] = KnownKey(
            id=uuid.uuid4(),
            tenant=TENANT,
            scopes=frozenset({Scope.READ}),
            digest=digest,
            remaining_s=remaining_s,
        )
        return self.found[key]

    async def admin(self, statements: Any, /) -> KnownKey | None:
        self.lookups += 1
        await self.answering.wait()
        if self.away:
            raise StoreUnavailableError
        (digest,) = (cell.cell_contents for cell in statements.__closure__)
        return next((key for key in self.found.values() if key.digest == digest), None)

    async def run(self, tenant: str, statement: Any, /) -> None:
        if self.away:
            raise StoreUnavailableError
        contents = {type(cell.cell_contents): cell.cell_contents for cell in statement.__closure__}
        self.noted.append((tenant, contents[set]))


class Bench:
    """An authenticator whose clock stands still unless it is turned."""

    def __init__(self, **settings: Any) -> None:
        self.now_s = 100.0
        self.keys = Keys()
        self.written = asyncio.Event()
        values = {"database_url": SecretStr("postgresql://x/y"), "tenant": "own", **settings}
        self.auth = Authenticator(
            self.keys, Settings(**values), clock=lambda: self.now_s, sleep=self.sleep
        )

    async def sleep(self, seconds: float) -> None:
        await self.written.wait()

    async def caller(self, key: str | None = None, **options: Any) -> Caller:
        return await self.auth.identify(request(key, **options))

    async def refused(self, key: str | None = None, **options: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.caller(key, **options)
        return caught.value


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestKeys:
    async def test_open_what_is_their_tenants(self, bench: Bench) -> None:
        key = bench.keys.add(secret())

        caller = await bench.caller(secret())

        assert caller == Caller(tenant=TENANT, key_id=key.id, scopes=frozenset({Scope.READ}))
        with pytest.raises(ApiError) as caught:
            check_scopes(caller, (Scope.READ, Scope.SUBMIT))
        assert (caught.value.status, caught.value.error_code) == (403, "insufficient_scope")
        assert "submit" in caught.value.message
        assert "read" not in caught.value.message
        check_scopes(caller, (Scope.READ,))

    @pytest.mark.parametrize(
        "presented", [None, "sk-proj-123", "pf_short", secret()[:-1] + "é", secret(), "pf_" * 99]
    )
    async def test_that_open_nothing_are_refused(self, bench: Bench, presented: str | None) -> None:
        error = await bench.refused(presented)

        assert error.status == 401
        assert error.headers["www-authenticate"] == "Bearer"
        assert error.body == {
            "message": error.message,
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        assert presented is None or presented not in error.message

    async def test_are_looked_up_once_in_some_seconds(self, bench: Bench) -> None:
        bench.keys.add(secret())
        for _ in range(3):
            await bench.caller(secret())
            await bench.refused(secret(1))
        assert bench.keys.lookups == 2

        bench.now_s += RECHECK_S
        await bench.caller(secret())
        await bench.refused(secret(1))
        assert bench.keys.lookups == 4

    async def test_that_are_revoked_open_nothing_seconds_later(self, bench: Bench) -> None:
        key = bench.keys.add(secret())
        await bench.caller(secret())
        del bench.keys.found[secret()]

        bench.now_s += RECHECK_S - 0.01
        await bench.caller(secret())
        bench.now_s += 0.01
        await bench.refused(secret())

        bench.keys.found[secret()] = key
        bench.now_s += RECHECK_S
        await bench.caller(secret())
        del bench.keys.found[secret()]
        bench.auth.forget(key.id)
        await bench.refused(secret())

    async def test_that_expire_open_nothing_from_then_on(self, bench: Bench) -> None:
        bench.keys.add(secret(), remaining_s=2)
        await bench.caller(secret())
        del bench.keys.found[secret()]

        bench.now_s += 1.99
        await bench.caller(secret())
        bench.now_s += 0.01
        await bench.refused(secret())

    async def test_are_looked_up_once_for_all_who_ask_at_once(self, bench: Bench) -> None:
        bench.keys.add(secret())
        bench.keys.answering.clear()
        asking = [asyncio.create_task(bench.caller(secret())) for _ in range(50)]
        await asyncio.sleep(0)
        asking[0].cancel()  # who asked first leaves
        await asyncio.sleep(0)
        bench.keys.answering.set()

        callers = await asyncio.gather(*asking[1:])

        assert {caller.tenant for caller in callers} == {TENANT}
        assert bench.keys.lookups == 1

    async def test_that_could_not_be_looked_up_are_not_remembered(self, bench: Bench) -> None:
        bench.keys.add(secret())
        bench.keys.away = True
        with pytest.raises(StoreUnavailableError):
            await bench.caller(secret())
        bench.keys.away = False
        assert (await bench.caller(secret())).tenant == TENANT

    async def test_a_flood_of_made_up_keys_pushes_no_real_one_out(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "MAX_REMEMBERED", 10)
        bench.keys.add(secret())
        await bench.caller(secret())
        for n in range(1, 100):
            await bench.refused(secret(n))
        assert bench.keys.lookups == 100

        await bench.caller(secret())
        assert bench.keys.lookups == 100
        assert len(bench.auth._unknown) == 10


class TestUses:
    async def test_are_written_together_and_once_a_minute(self, bench: Bench) -> None:
        ids = {bench.keys.add(secret(n)).id for n in range(3)}
        for _ in range(2):
            for n in range(3):
                await bench.caller(secret(n))
        assert bench.keys.noted == []
        bench.written.set()
        assert bench.auth._writer is not None
        await bench.auth._writer
        assert bench.keys.noted == [(TENANT, ids)]

        bench.now_s += 59
        await bench.caller(secret())
        assert bench.auth._writer.done()
        bench.now_s += 1
        await bench.caller(secret())
        await bench.auth._writer
        assert [len(noted) for _, noted in bench.keys.noted] == [3, 1]

    async def test_are_written_at_the_end(self, bench: Bench) -> None:
        key = bench.keys.add(secret())
        await bench.caller(secret())
        await bench.auth.close()
        assert bench.keys.noted == [(TENANT, {key.id})]
        await bench.auth.close()
        assert len(bench.keys.noted) == 1

    async def test_that_cannot_be_written_harm_nobody(self, bench: Bench) -> None:
        bench.keys.add(secret())
        await bench.caller(secret())
        bench.keys.away = True
        bench.written.set()
        assert bench.auth._writer is not None
        await bench.auth._writer
        await bench.auth.close()


class TestWithoutAKey:
    async def test_this_machine_is_let_in_where_the_setting_says_so(self, bench: Bench) -> None:
        assert (await bench.refused()).status == 401
        keyless = Bench(api_keyless=True)

        for presented in (None, "unused", "sk-123"):
            caller = await keyless.caller(presented)
            assert caller == Caller(tenant="own", key_id=None, scopes=frozenset(Scope))
        assert keyless.keys.lookups == 0

    async def test_a_key_of_ours_counts_all_the_same(self) -> None:
        keyless = Bench(api_keyless=True)
        keyless.keys.add(secret())
        assert (await keyless.caller(secret())).tenant == TENANT
        assert (await keyless.refused(secret(1))).status == 401

    @pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
    @pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:80", "[::1]:80"])
    def test_local(self, peer: str, host: str) -> None:
        assert is_local(request(peer=peer, host=host))
        assert is_local(request(peer=peer, host=host, origin=f"http://{host}"))

    @pytest.mark.parametrize(
        "options",
        [
            {"peer": None},
            {"peer": "10.0.0.1"},
            {"peer": "192.168.1.5"},
            {"peer": "testclient"},
            {"peer": "::ffff:10.0.0.1"},
            {"peer": "2001:db8::1"},
            {"host": ""},
            {"host": "evil.example"},  # a name that was made to point here
            {"host": "localhost.evil.example"},
            {"host": "127.0.0.1.evil.example"},
            {"origin": "https://evil.example"},  # a page that somebody has open
            {"origin": "null"},
        ],
    )
    def test_not_local(self, options: dict[str, Any]) -> None:
        assert not is_local(request(**options))


def test_bearer() -> None:
    def presented(value: str) -> str | None:
        return bearer(request(authorization=value))

    assert bearer(request()) is None
    assert presented("Bearer abc") == presented("bearer  abc ") == "abc"
    assert presented("Basic abc") is presented("Bearer") is presented("Bearer ") is None
