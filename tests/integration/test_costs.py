"""The ledger has what every call cost, also those that gave no answer; and reports add up."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import datetime as dt
import io
import json
from collections.abc import AsyncIterator, Callable
from decimal import Decimal

import httpx
import pytest
import sqlalchemy as sa
from tests.integration.test_pipeline import Rig, answer_all, make_rig
from tests.rows import claim_one, insert, ledger_rows, outcome, result_rows, spec
from typer.testing import CliRunner

import promptfleet.api
from promptfleet.cli import app
from promptfleet_shared.errors import InvalidRequestError, ProviderError
from promptfleet_shared.jobs import CacheStatus, Usage
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.claims import release
from promptfleet_shared.store.costs import costs, observed_outputs, observed_rates
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.keys import create_key
from promptfleet_shared.store.results import request_cancel
from promptfleet_workers.claims import Abort
from promptfleet_workers.providers.protocol import Answer, Call

__all__ = ["make_rig"]  # the fixture

MakeRig = Callable[..., Rig]
# openai/gpt-4o-mini, as of genai-prices: US dollars a token
INPUT, OUTPUT = Decimal("0.00000015"), Decimal("0.0000006")


class TestCallsWithoutAnswers:
    async def test_an_answer_without_its_end_has_its_price(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        counted = Usage(input=1000, output=100)

        async def cut(call: Call) -> list[Answer]:
            rig.provider.behaviour = answer_all
            raise ProviderError(code="truncated", unknown_outcome=True, usage=counted)

        rig.provider.behaviour = cut
        job = spec(metadata={"project": "x"})
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        (row,) = ledger_rows(rig.rows, job.id)
        assert (row["calls"], row["unknown_calls"]) == (1, 1)
        assert (row["input_tokens"], row["output_tokens"]) == (1000, 100)
        assert row["cost_usd"] == 1000 * INPUT + 100 * OUTPUT
        assert (row["estimated_usd"], row["at_most_usd"]) == (None, None)
        assert (row["model"], row["deployment"]) == ("m", "first")
        assert row["metadata"] == {"project": "x"}

    async def test_a_cut_stream_is_estimated(self, make_rig: MakeRig) -> None:
        rig = make_rig()

        async def cut(call: Call) -> list[Answer]:
            assert call.received is not None
            call.received.hear("x" * 400)
            raise ProviderError(code="truncated", unknown_outcome=True)

        rig.provider.behaviour = cut
        job = spec(stream=True, input_tokens=40)
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        (row,) = ledger_rows(rig.rows, job.id)
        assert (row["input_tokens"], row["output_tokens"]) == (40, 100)
        assert row["cost_usd"] is None
        assert row["estimated_usd"] == 40 * INPUT + 100 * OUTPUT
        assert row["at_most_usd"] > 16_000 * OUTPUT

    async def test_a_cancelled_stream_is_estimated(self, make_rig: MakeRig) -> None:
        rig = make_rig()

        async def speak(call: Call) -> list[Answer]:
            assert call.received is not None
            call.received.input, call.received.cached = 50, 0
            call.received.hear("é" * 20)
            await asyncio.Event().wait()
            raise AssertionError

        rig.provider.behaviour = speak
        job = spec(stream=True)
        insert(rig.rows, job)
        wait = rig.take(job.id)
        await rig.calling()
        with rig.rows.begin() as connection:
            request_cancel(connection, [job.id], tenant="default")
        rig.claims.abort(job.id, Abort.CANCELLED)
        await rig.settled(wait)

        (row,) = ledger_rows(rig.rows, job.id)
        assert (row["calls"], row["unknown_calls"]) == (1, 1)
        assert row["estimated_usd"] == 50 * INPUT + 10 * OUTPUT
        assert result_rows(rig.rows, job.id)[0]["state"] == "cancelled"

    async def test_who_answers_after_another_failed_is_charged_apart(
        self, make_rig: MakeRig
    ) -> None:
        """A first deployment that had counted, and a second one that answers."""
        rig = make_rig()
        counted = Usage(input=7, output=3)

        async def refuse(call: Call) -> list[Answer]:
            raise ProviderError(code="context_length_exceeded", status=400, usage=counted)

        rig.provider.behaviour = refuse
        job = spec()
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        rows = {row["deployment"]: row for row in ledger_rows(rig.rows, job.id)}
        assert {name: row["calls"] for name, row in rows.items()} == {"first": 1, "second": 1}
        assert rows["first"]["input_tokens"] == 7
        assert rows["second"]["cost_usd"] == 10 * INPUT + 5 * OUTPUT
        (result,) = result_rows(rig.rows, job.id)
        assert result["calls"] == 2
        assert result["cost_usd"] == rows["second"]["cost_usd"]

    async def test_a_call_without_a_word_is_bounded(self, make_rig: MakeRig) -> None:
        rig = make_rig()

        async def lose(call: Call) -> list[Answer]:
            raise ProviderError(code="connection_lost", unknown_outcome=True)

        rig.provider.behaviour = lose
        job = spec(request=b'{"max_tokens":100,"messages":[]}', input_tokens=40)
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))

        (row,) = ledger_rows(rig.rows, job.id)
        assert (row["cost_usd"], row["estimated_usd"]) == (None, None)
        assert row["at_most_usd"] == 40 * INPUT + 100 * OUTPUT

    async def test_jobs_that_share_a_request_are_charged_each(self, make_rig: MakeRig) -> None:
        from promptfleet_shared.jobs import JobKind

        rig = make_rig()
        jobs = [
            spec(kind=JobKind.COMPLETION, request=f'{{"prompt":"{n}"}}'.encode()) for n in range(3)
        ]
        insert(rig.rows, *jobs)
        await rig.settled(rig.take(*[job.id for job in jobs]))

        assert len(rig.provider.calls) == 1
        rows = [row for job in jobs for row in ledger_rows(rig.rows, job.id)]
        assert sum(row["calls"] for row in rows) == 1
        assert sum(row["cost_usd"] for row in rows) == 3 * (10 * INPUT + 5 * OUTPUT)

    async def test_compacted_prompts_are_sent_and_told_of(self, make_rig: MakeRig) -> None:
        rig = make_rig()
        text = "one" + "\n" * 60 + "two"
        job = spec(text, policy={"compact": True})
        plain = spec(text + "!")
        insert(rig.rows, job, plain)
        await rig.settled(rig.take(job.id, plain.id))

        sent = sorted(call.requests[0] for call in rig.provider.calls)
        assert ["\\n" * 60 in request for request in sent].count(True) == 1
        (row,) = result_rows(rig.rows, job.id)
        assert row["decision"]["compact"] == {"bytes_saved": 2 * 58}


@pytest.fixture
def spent(database: sa.Engine) -> sa.Engine:
    """Two jobs that were paid for, one that a cache answered, and a claim that was cut."""
    rows = [
        spec("a", metadata={"project": "x"}),
        spec("b", tier="top", metadata={"project": "y"}),
        spec("c", metadata={"project": "x"}),
    ]
    insert(database, *rows)
    usage = Usage(input=100, cached=40, output=10)
    held = [claim_one(database, row.id) for row in rows]
    one = outcome(held[0], model="m1", usage=usage, cost_usd=Decimal("0.5"))
    two = outcome(held[1], model="m2", usage=usage, cost_usd=Decimal(2))
    hit = outcome(
        held[2], model="m1", calls=0, cost_usd=Decimal(0), cache=CacheStatus.HIT,
        saved_usd=Decimal("0.5"),
    )  # fmt: skip
    with database.begin() as connection:
        assert len(finish(connection, [one, two, hit])) == 3
    return database


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _costs(
    database: sa.Engine, by: str, *, tenant: str | None = "default", most: int | None = None
) -> dict[str, object]:
    with database.connect() as connection:
        span = {"since": _now() - dt.timedelta(hours=1), "until": _now() + dt.timedelta(hours=1)}
        rows = costs(connection, by=by, tenant=tenant, most=most, **span)
    return {str(row.key): row.cost_usd for row in rows}


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("model", ["m2", "m1"]),
        ("tier", ["top", "basic"]),
        ("tenant", ["default"]),
        ("metadata.project", ["y", "x"]),
    ],
)
def test_costs_by(spent: sa.Engine, by: str, keys: list[str]) -> None:
    found = _costs(spent, by)
    assert list(found) == keys  # the dearest first
    assert sum(found.values()) == Decimal("2.5")  # type: ignore[arg-type]


def test_costs_of_others_are_not_seen(spent: sa.Engine) -> None:
    assert _costs(spent, "model", tenant="other") == {}
    assert _costs(spent, "day", tenant=None) == {f"{_now():%Y-%m-%d}": Decimal("2.5")}


def test_a_key_that_there_is_not(spent: sa.Engine) -> None:
    with pytest.raises(InvalidRequestError, match="by: must be one of"):
        _costs(spent, "prompt; DROP TABLE ledger")


def test_observed_lengths_and_rates(spent: sa.Engine) -> None:
    with spent.connect() as connection:
        outputs = observed_outputs(connection, tenant="default")
        rates = observed_rates(connection, tenant="default")
        assert observed_outputs(connection, tenant="other") == {}
    assert (outputs["basic"].answers, outputs["basic"].mean, outputs["top"].p95) == (1, 10, 10)
    assert 0 < rates["basic"] <= 2 / 60


def test_a_release_has_its_lost_calls_in_the_ledger(database: sa.Engine) -> None:
    from promptfleet_shared.jobs import LostCall, Release

    job = spec()
    insert(database, job)
    held = claim_one(database, job.id)
    lost = LostCall(
        model="m", provider="openai", deployment="d", usage=Usage(input=5), unknown_calls=1,
        at_most_usd=Decimal("0.1"),
    )  # fmt: skip
    item = Release(job_id=job.id, fence=held.fence, calls=3, unknown_calls=1, lost=(lost,))
    with database.begin() as connection:
        release(connection, [item])

    rows = sorted(ledger_rows(database, job.id), key=lambda row: row["calls"])
    assert [(row["calls"], row["unknown_calls"]) for row in rows] == [(1, 1), (2, 0)]
    assert rows[0]["at_most_usd"] == Decimal("0.1")


def _key(database: sa.Engine, tenant: str, *scopes: str) -> str:
    with database.begin() as connection:
        made = create_key(connection, tenant=tenant, scopes=scopes or ("read",), name="tests")
    return made.secret


@contextlib.asynccontextmanager
async def _api(settings: Settings, key: str) -> AsyncIterator[httpx.AsyncClient]:
    api = promptfleet.api.create_app(settings)
    transport = httpx.ASGITransport(app=api)
    headers = {"authorization": f"Bearer {key}"}
    async with (
        promptfleet.api.lifespan(api),
        httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers) as client,
    ):
        yield client


class TestOverHttp:
    @pytest.mark.parametrize("walls", [1, 2])
    async def test_other_tenants_are_not_seen(
        self, spent: sa.Engine, settings: Settings, walls: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if walls == 1:  # without row-level security, the statements alone
            monkeypatch.setattr("promptfleet.api.stores.step_down", lambda _: None)
        async with _api(settings, _key(spent, "stranger")) as client:
            for by in ("model", "tenant"):
                found = (await client.get("/v1/costs", params={"by": by})).json()
                assert (found["rows"], found["total"]["calls"]) == ([], 0)

    async def test_the_last_seven_days_by_default(
        self, spent: sa.Engine, settings: Settings
    ) -> None:
        with spent.begin() as connection:
            connection.execute(
                sa.text("UPDATE ledger SET at = at - interval '8 days' WHERE tier = 'top'")
            )
        async with _api(settings, _key(spent, "default")) as client:
            found = (await client.get("/v1/costs")).json()
        assert {row["key"]: row["cost_usd"] for row in found["rows"]} == {"m1": 0.5}
        since, until = (dt.datetime.fromisoformat(found[name]) for name in ("since", "until"))
        assert (until - since, until.utcoffset()) == (dt.timedelta(days=7), dt.timedelta(0))

    @pytest.mark.parametrize(
        ("query", "param", "said"),
        [
            ("by=prompt", "by", "must be one of model"),
            ("by=metadata.", "by", "must be one of model"),
            ("by=metadata.a%00b", "by", "must be one of model"),
            ("since=yesterday", "since", "since: must be like 7d"),
            ("since=9999999999d", "since", "since: must be like 7d"),
            ("until=0001-01-01T00:00:00%2B14:00", "until", "until: must be like 7d"),
        ],
    )
    async def test_what_is_wrong_is_named(
        self, spent: sa.Engine, settings: Settings, query: str, param: str, said: str
    ) -> None:
        async with _api(settings, _key(spent, "default")) as client:
            answer = await client.get(f"/v1/costs?{query}")
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (param, "invalid_request")
        assert said in error["message"]

    async def test_a_key_without_the_scope_is_refused(
        self, spent: sa.Engine, settings: Settings
    ) -> None:
        async with _api(settings, _key(spent, "default", "submit")) as client:
            assert (await client.get("/v1/costs")).status_code == 403


@pytest.mark.parametrize("by", ["metadata.project", "tier"])
def test_more_rows_than_there_is_room_for(spent: sa.Engine, by: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"by: {by} has more than 1 values"):
        _costs(spent, by, most=1)
    assert len(_costs(spent, by, most=2)) == 2


class TestCommand:
    @pytest.fixture
    def run(
        self, spent: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., str]:
        monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", settings.database_url.get_secret_value())
        monkeypatch.setenv("COLUMNS", "200")

        def run(*words: str, tenant: str | None = None) -> str:
            whose = [] if tenant is None else ["--tenant", tenant]
            result = CliRunner().invoke(app, ["cost", *words, *whose])
            assert result.exit_code == 0, result.output
            return result.stdout

        return run

    def test_json_adds_up(self, run: Callable[..., str]) -> None:
        found = json.loads(run("--by", "tier", "--format", "json"))
        assert [(row["key"], row["cost_usd"]) for row in found["rows"]] == [
            ("top", 2.0),
            ("basic", 0.5),
        ]
        assert found["total"]["cost_usd"] == 2.5
        assert found["total"]["saved_usd"] == {"hit": 0.5}
        assert found["total"]["input_tokens"] == 200

    def test_csv(self, run: Callable[..., str]) -> None:
        (row,) = csv.DictReader(io.StringIO(run("--by", "tenant", "--format", "csv")))
        assert (row["key"], row["cost_usd"], row["saved_usd"]) == ("default", "2.5", "0.5")

    def test_table(self, run: Callable[..., str]) -> None:
        assert "top" in run("--by", "tier", "--since", "2020-01-01")

    def test_nothing_in_that_time(self, run: Callable[..., str]) -> None:
        assert json.loads(run("--until", "1h", "--format", "json"))["rows"] == []

    async def test_the_api_says_the_same(
        self, run: Callable[..., str], spent: sa.Engine, settings: Settings
    ) -> None:
        span = {"since": "2020-01-01", "until": f"{_now() + dt.timedelta(days=1):%Y-%m-%d}"}
        options = [word for name, value in span.items() for word in (f"--{name}", value)]
        async with _api(settings, _key(spent, "default")) as client:
            for by in ("model", "tier", "deployment", "day", "metadata.project", "tenant"):
                told = json.loads(run("--by", by, *options, "--format", "json", tenant="default"))
                answer = await client.get("/v1/costs", params={"by": by, **span})
                assert answer.status_code == 200
                found = answer.json()
                assert found["rows"]
                assert (found["rows"], found["total"]) == (told["rows"], told["total"])
                assert (found["by"], found["tenant"]) == (by, "default")

    def test_a_wrong_time(self) -> None:
        result = CliRunner().invoke(app, ["cost", "--since", "yesterday"])
        assert result.exit_code == 2
        assert "--since: must be like 7d" in result.stderr
