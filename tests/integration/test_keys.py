"""API keys: their table, the command line, and the admin API."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from tests.databases import emptied, one_database
from typer.testing import CliRunner

from promptfleet.api import create_app, lifespan
from promptfleet.cli import app
from promptfleet.dev_stack import EmbeddedPostgres
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.keys import (
    Key,
    KnownKey,
    NewKey,
    Scope,
    create_key,
    find_key,
    key_digest,
    list_keys,
    note_used,
    revoke_key,
    rotate_key,
)

TENANT, OTHER = "acme", "globex"


@pytest.fixture(scope="module")
def shared_url(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[str]:
    with one_database(postgres, admin, template) as url:
        yield url


@pytest.fixture
def database_url(shared_url: str) -> Iterator[str]:
    with emptied(shared_url, "api_keys") as url:
        yield url


def create(database: sa.Engine, *scopes: str, tenant: str = TENANT, **options: Any) -> NewKey:
    with database.begin() as connection:
        return create_key(connection, tenant=tenant, scopes=scopes or ("read",), **options)


def find(database: sa.Engine, secret: str) -> KnownKey | None:
    digest = key_digest(secret)
    assert digest is not None
    with database.begin() as connection:
        return find_key(connection, digest)


def listed(database: sa.Engine, tenant: str = TENANT) -> list[Key]:
    with database.begin() as connection:
        return list_keys(connection, tenant=tenant)


def age(database: sa.Engine, key: Key, seconds: float) -> None:
    """Let time pass for a key."""
    with database.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE api_keys SET created_at = created_at - :s * interval '1 second',"
                " expires_at = expires_at - :s * interval '1 second',"
                " last_used_at = last_used_at - :s * interval '1 second' WHERE id = :id"
            ),
            {"s": seconds, "id": key.id},
        )


class TestTable:
    def test_a_key_opens_what_it_was_made_for(self, database: sa.Engine) -> None:
        made = create(database, "read", "submit", name="CI")

        assert len(made.secret) == 46
        assert made.secret.startswith(f"pf_{made.key.prefix}")
        assert len(made.key.prefix) == 8
        assert made.secret not in repr(made)
        found = find(database, made.secret)
        assert found is not None
        assert (found.id, found.tenant) == (made.key.id, TENANT)
        assert found.scopes == {Scope.SUBMIT, Scope.READ}
        assert found.remaining_s is None
        assert listed(database) == [made.key]
        assert made.key.usable
        assert listed(database, OTHER) == []

    def test_no_key_is_kept(self, database: sa.Engine) -> None:
        made = create(database)
        with database.connect() as connection:
            row = connection.execute(sa.text("SELECT * FROM api_keys")).one()
        assert made.secret[3:] not in str(tuple(row))
        assert made.secret[11:].encode() not in bytes(row.digest)
        assert find(database, made.secret[:-1] + ("A" if made.secret[-1] != "A" else "B")) is None
        assert create(database).secret != made.secret

    @pytest.mark.parametrize(
        "text", ["", "pf_", "x" * 46, "pf_" + "a" * 42, "pf_" + "a" * 44, "pf_" + "é" * 43]
    )
    def test_what_cannot_be_a_key_has_no_digest(self, text: str) -> None:
        assert key_digest(text) is None

    def test_expiry(self, database: sa.Engine) -> None:
        made = create(database, expires_in_s=60)
        found = find(database, made.secret)
        assert found is not None
        assert found.remaining_s is not None
        assert 30 < found.remaining_s <= 60

        age(database, made.key, 61)
        assert find(database, made.secret) is None
        assert not listed(database)[0].usable

    def test_revocation(self, database: sa.Engine) -> None:
        made, other = create(database), create(database)
        with database.begin() as connection:
            assert revoke_key(connection, made.key.id, tenant=OTHER) is None
        assert find(database, made.secret) is not None

        with database.begin() as connection:
            revoked = revoke_key(connection, made.key.id, tenant=TENANT)
            again = revoke_key(connection, made.key.id, tenant=TENANT)
        assert revoked is not None
        assert revoked.revoked_at is not None
        assert not revoked.usable
        assert again == revoked
        assert find(database, made.secret) is None
        assert find(database, other.secret) is not None

    def test_rotation_has_an_overlap(self, database: sa.Engine) -> None:
        old = create(database, "read", "submit", name="app", expires_in_s=1_000)
        age(database, old.key, 300)

        new = self.rotate(database, old, overlap_s=60)
        assert new is not None
        assert (new.key.name, new.key.scopes) == ("app", old.key.scopes)
        assert new.key.prefix != old.key.prefix
        lives = [find(database, key.secret) for key in (old, new)]
        assert [known and round(known.remaining_s or 0, -2) for known in lives] == [100, 1_000]

        age(database, old.key, 61)
        assert find(database, old.secret) is None
        assert find(database, new.secret) is not None
        assert self.rotate(database, old) is None  # expired

    def test_rotation_makes_no_key_last_longer(self, database: sa.Engine) -> None:
        old = create(database, expires_in_s=60)
        assert self.rotate(database, old, overlap_s=10_000) is not None
        found = find(database, old.secret)
        assert found is not None
        assert found.remaining_s is not None
        assert found.remaining_s <= 60

        endless = create(database)
        new = self.rotate(database, endless, overlap_s=0)
        assert new is not None
        assert new.key.expires_at is None
        assert find(database, endless.secret) is None

    def test_rotation_is_of_ones_own_and_living_keys(self, database: sa.Engine) -> None:
        made = create(database)
        with database.begin() as connection:
            assert rotate_key(connection, made.key.id, tenant=OTHER, overlap_s=1) is None
            revoke_key(connection, made.key.id, tenant=TENANT)
        assert self.rotate(database, made) is None
        assert len(listed(database)) == 1

    def test_uses_are_noted_coarsely(self, database: sa.Engine) -> None:
        made, other = create(database), create(database, tenant=OTHER)

        def note() -> Any:
            with database.begin() as connection:
                note_used(connection, {made.key.id, other.key.id}, tenant=TENANT)
            return listed(database)[0].last_used_at

        first = note()
        assert first is not None
        assert note() == first
        age(database, made.key, 31)
        assert note() > first
        assert listed(database, OTHER)[0].last_used_at is None

    @pytest.mark.parametrize(
        ("field", "options"),
        [
            ("scopes", {"scopes": ["root"]}),
            ("scopes", {"scopes": []}),
            ("tenant", {"tenant": ""}),
            ("tenant", {"tenant": "a\0b"}),
            ("name", {"name": "x" * 201}),
            ("expires_in_s", {"expires_in_s": 0}),
            ("expires_in_s", {"expires_in_s": float("nan")}),
            ("expires_in_s", {"expires_in_s": 1e12}),
        ],
    )
    def test_what_cannot_be(self, database: sa.Engine, field: str, options: dict[str, Any]) -> None:
        values = {"tenant": TENANT, "scopes": ["read"], **options}
        with database.begin() as connection, pytest.raises(InvalidRequestError) as caught:
            create_key(connection, **values)
        assert caught.value.field == field

    @staticmethod
    def rotate(database: sa.Engine, key: NewKey, *, overlap_s: float = 60) -> NewKey | None:
        with database.begin() as connection:
            return rotate_key(connection, key.key.id, tenant=TENANT, overlap_s=overlap_s)


Run = Callable[..., Any]


class TestCommands:
    @pytest.fixture
    def run(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
        monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", settings.database_url.get_secret_value())
        monkeypatch.setenv("PROMPTFLEET_BROKER_URL", settings.broker_url.get_secret_value())
        monkeypatch.setenv("PROMPTFLEET_TENANT", TENANT)
        monkeypatch.setenv("COLUMNS", "200")
        return lambda *arguments: CliRunner().invoke(app, ["keys", *arguments])

    def test_a_key_is_printed_once(self, run: Run, database: sa.Engine) -> None:
        made = run("create", "--name", "CI", "--expires", "2h")
        assert made.exit_code == 0
        secret = made.stdout.strip()
        found = find(database, secret)
        assert found is not None
        assert (found.tenant, found.scopes) == (TENANT, frozenset({Scope.SUBMIT, Scope.READ}))
        assert found.remaining_s is not None
        assert 7_000 < found.remaining_s <= 7_200

        shown = run("list")
        assert secret[:11] in shown.stdout
        assert secret not in shown.stdout
        assert "submit, read" in shown.stdout
        (row,) = json.loads(run("list", "--json").stdout)
        assert (row["name"], row["scopes"], row["usable"]) == ("CI", ["read", "submit"], True)

    def test_of_another_tenant(self, run: Run, database: sa.Engine) -> None:
        made = json.loads(
            run("create", "--tenant", OTHER, "--scopes", "read, admin", "--json").stdout
        )
        found = find(database, made["key"])
        assert found is not None
        assert (found.tenant, found.scopes) == (OTHER, frozenset({Scope.READ, Scope.ADMIN}))
        assert "no keys" in run("list").stderr
        assert run("revoke", made["prefix"]).exit_code != 0
        assert find(database, made["key"]) is not None
        assert run("revoke", made["key"], "--tenant", OTHER).exit_code == 0
        assert find(database, made["key"]) is None

    def test_rotate_and_revoke(self, run: Run, database: sa.Engine) -> None:
        old = run("create").stdout.strip()
        rotated = run("rotate", old[:11], "--overlap", "15m")
        new = rotated.stdout.strip()
        assert find(database, new) is not None
        known = find(database, old)
        assert known is not None
        assert known.remaining_s is not None
        assert 800 < known.remaining_s <= 900

        revoked = run("revoke", "--", old[3:9])  # it may begin with a dash
        assert (revoked.exit_code, find(database, old)) == (0, None)
        assert run("rotate", old[:11]).exit_code == 1
        ambiguous = run("revoke", "pf_")
        assert "2 keys" in ambiguous.stderr
        assert find(database, new) is not None

    @pytest.mark.parametrize(
        "arguments",
        [
            ("create", "--scopes", "root"),
            ("create", "--expires", "soon"),
            ("create", "--expires", "0"),
            ("rotate", "nope"),
            ("revoke", "nope"),
        ],
    )
    def test_mistakes(self, run: Run, database: sa.Engine, arguments: tuple[str, ...]) -> None:
        assert run(*arguments).exit_code == 2
        assert listed(database) == []


class Client:
    """The API in this process, asked from this machine."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def ask(
        self, method: str, path: str = "", *, key: str | None, **options: Any
    ) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return await self.http.request(method, f"/v1/admin/keys{path}", headers=headers, **options)


class TestAdmin:
    @pytest.fixture
    async def client(self, settings: Settings) -> AsyncIterator[Client]:
        own = settings.model_copy(update={"operator_tenant": "operator"})
        api = create_app(own)
        transport = httpx.ASGITransport(app=api, client=("127.0.0.1", 1))
        async with (
            lifespan(api),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http,
        ):
            yield Client(http)

    async def test_a_key_makes_lists_rotates_and_revokes_others(
        self, client: Client, database: sa.Engine
    ) -> None:
        admin = create(database, "admin", "read").secret

        made = await client.ask(
            "POST", key=admin, json={"name": "app", "scopes": ["admin"], "expires_in_s": 3_600}
        )
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        first = made.json()
        assert (first["tenant"], first["name"], first["usable"]) == (TENANT, "app", True)
        assert find(database, first["key"]) is not None

        data = (await client.ask("GET", key=first["key"])).json()["data"]
        assert [row["name"] for row in data] == ["app", ""]
        assert first["key"] not in str(data)
        assert "key" not in data[0]

        rotated = await client.ask(
            "POST", f"/{first['id']}/rotate", key=admin, json={"overlap_s": 60}
        )
        assert rotated.status_code == 201
        second = rotated.json()
        assert (second["scopes"], second["name"]) == (["admin"], "app")
        for key in (first["key"], second["key"]):
            assert (await client.ask("GET", key=key)).status_code == 200
        without_body = await client.ask("POST", f"/{second['id']}/rotate", key=admin)
        assert without_body.status_code == 201

        revoked = await client.ask("DELETE", f"/{first['id']}", key=admin)
        assert (revoked.status_code, revoked.json()["usable"]) == (200, False)
        refused = await client.ask("GET", key=first["key"])  # at once: the same process
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"

    async def test_others_may_not(self, client: Client, database: sa.Engine) -> None:
        reader = create(database, "read", "submit").secret
        for method, path in (
            ("GET", ""),
            ("POST", ""),
            ("DELETE", f"/{uuid.uuid4()}"),
            ("POST", f"/{uuid.uuid4()}/rotate"),
        ):
            refused = await client.ask(method, path, key=reader)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                403,
                "insufficient_scope",
            )
            assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
            assert (await client.ask(method, path, key=None)).status_code == 401

    async def test_another_tenants_key_is_as_one_that_is_not_there(
        self, client: Client, database: sa.Engine
    ) -> None:
        admin = create(database, "admin").secret
        theirs = create(database, tenant=OTHER)

        for method, path in (("DELETE", "/{}"), ("POST", "/{}/rotate")):
            real = await client.ask(method, path.format(theirs.key.id), key=admin)
            missing = await client.ask(method, path.format(uuid.uuid4()), key=admin)
            assert real.status_code == missing.status_code == 404
            assert real.json() == missing.json()
        assert find(database, theirs.secret) is not None
        asked = {"tenant": OTHER}
        for refused in (
            await client.ask("GET", key=admin, params=asked),
            await client.ask("POST", key=admin, json=asked),
        ):
            assert (refused.status_code, refused.json()["error"]["param"]) == (403, "tenant")

    async def test_the_operator_manages_the_keys_of_all(
        self, client: Client, database: sa.Engine
    ) -> None:
        operator = create(database, "admin", tenant="operator").secret
        made = (await client.ask("POST", key=operator, json={"tenant": OTHER})).json()
        known = find(database, made["key"])
        assert known is not None
        assert (known.tenant, known.scopes) == (OTHER, frozenset({Scope.SUBMIT, Scope.READ}))

        ask: dict[str, Any] = {"params": {"tenant": OTHER}}
        data = (await client.ask("GET", key=operator, **ask)).json()["data"]
        assert [row["id"] for row in data] == [made["id"]]
        gone = await client.ask("DELETE", f"/{made['id']}", key=operator, **ask)
        assert gone.status_code == 200
        assert find(database, made["key"]) is None

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"scopes": []}, "scopes"),
            ({"scopes": ["root"]}, "scopes.0"),
            ({"expires_in_s": -1}, "expires_in_s"),
            ({"expires_in_s": 1e300}, "expires_in_s"),
            ({"name": 5}, "name"),
            ({"name": "a\0"}, "name"),
            ({"surprise": 1}, "surprise"),
        ],
    )
    async def test_mistakes_are_named(
        self, client: Client, database: sa.Engine, body: dict[str, Any], param: str
    ) -> None:
        admin = create(database, "admin").secret
        refused = await client.ask("POST", key=admin, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)
        assert len(listed(database)) == 1
