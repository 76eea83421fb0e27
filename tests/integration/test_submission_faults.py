"""Submissions while Postgres or the broker fail: accepted exactly once, or refused, and soon."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.orm import Session
from tests.integration.proxying import Proxy, Trap, proxy_to
from tests.integration.test_client import (
    messages_in,
    ring_at_once,
    rows_in,
    run_script,
    rung_in,
)
from tests.rows import ago, change, insert, spec
from tests.waiting import eventually

from promptfleet import (
    AsyncClient,
    Client,
    OnUnknown,
    StoreRefusedError,
    StoreUnavailableError,
    resubmission,
)
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import make_celery, publish
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.database import AsyncDatabase, Database
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.submissions import give_up_soon, insert_jobs, request_digest
from promptfleet_shared.store.sweeping import sweep

SOON_S = 10.0
"""A generous bound for what should take a second or two on a busy machine."""
SECRET = "the " + "secret of the prompt"
Prompts = Sequence[Any]
Submit = Callable[[Settings, Prompts], list[uuid.UUID]]


def submit_sync(settings: Settings, prompts: Prompts) -> list[uuid.UUID]:
    with Client(settings) as client:
        client.get_results([uuid.uuid4()])  # connects
        return [job.id for job in client.enqueue_prompts(prompts)]


def submit_async(settings: Settings, prompts: Prompts) -> list[uuid.UUID]:
    async def submit() -> list[uuid.UUID]:
        async with AsyncClient(settings) as client:
            await client.get_results([uuid.uuid4()])
            return [job.id for job in await client.enqueue_prompts(prompts)]

    return asyncio.run(submit())


def keyed(count: int) -> Prompts:
    return [{"prompt": f"number {n}", "idempotency_key": f"k{n}"} for n in range(count)]


@pytest.fixture(autouse=True)
def rings_at_once(broker_url: str) -> None:
    ring_at_once(broker_url)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy has tests of its own: test_resubmission.py."""
    monkeypatch.setattr(resubmission, "PAUSES_S", (0.02, 0.05))


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    with proxy_to(database_url) as proxy:
        yield proxy


@pytest.fixture
def proxied(settings: Settings, proxy: Proxy) -> Settings:
    """Postgres by way of the proxy, and little patience."""
    url = SecretStr(proxy.url(settings.database_url.get_secret_value()))
    update = {"database_url": url, "database_connect_timeout_s": 2, "database_patience_s": 0.5}
    return settings.model_copy(update=update)


# -- a lost reply -------------------------------------------------------------------------------

ONE, ONE_KEYED, MANY_KEYED, MANY = ["hello"], keyed(1), keyed(3), ["hello"] * 1_500


CASES: dict[str, tuple[Submit, Prompts, Trap]] = {
    "one": (submit_sync, ONE, Trap(match=b"INSERT", lose="reply")),
    "one, not sent": (submit_sync, ONE, Trap(match=b"INSERT", lose="request")),
    "one, silence": (submit_sync, ONE, Trap(match=b"INSERT", lose="reply", then="silence")),
    "one, twice": (submit_sync, ONE, Trap(match=b"INSERT", lose="reply", times=2)),
    "a key": (submit_sync, ONE_KEYED, Trap(match=b"INSERT", lose="reply")),
    "keys": (submit_sync, MANY_KEYED, Trap(match=b"COMMIT", lose="reply")),
    "keys, not sent": (submit_sync, MANY_KEYED, Trap(match=b"COMMIT", lose="request")),
    "many": (submit_sync, MANY, Trap(match=b"COMMIT", lose="reply")),
    "many, in the middle": (submit_sync, MANY, Trap(match=b"INSERT", lose="reply")),
    "async": (submit_async, ONE, Trap(match=b"INSERT", lose="reply")),
    "async, silence": (
        submit_async,
        ONE_KEYED,
        Trap(match=b"INSERT", lose="reply", then="silence"),
    ),
    "async, keys": (submit_async, MANY_KEYED, Trap(match=b"COMMIT", lose="reply")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lost_reply_is_asked_for_again(
    case: str, proxied: Settings, proxy: Proxy, database: sa.Engine, broker_url: str
) -> None:
    submit, prompts, trap = CASES[case]
    proxy.trap = dataclasses.replace(trap)
    ids = submit(proxied, prompts)
    assert proxy.trap.sprung == trap.times
    assert len(ids) == len(set(ids)) == len(prompts)
    assert rows_in(database) == set(ids)
    assert sorted(rung_in(broker_url)) == sorted(str(id_) for id_ in ids)


@pytest.mark.parametrize(
    ("submit", "then"),
    [(submit_sync, "close"), (submit_sync, "silence"), (submit_async, "silence")],
)
def test_an_outcome_that_stays_unknown_is_told(
    submit: Submit, then: Any, proxied: Settings, proxy: Proxy, database: sa.Engine
) -> None:
    proxy.trap = Trap(match=b"INSERT", lose="reply", then=then, times=9)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="idempotency key") as caught:
        submit(proxied, ONE_KEYED)
    assert time.monotonic() - started < SOON_S
    assert caught.value.unknown_outcome
    assert proxy.trap.sprung == 3
    accepted = rows_in(database)  # the first try did it, and nobody knew
    assert len(accepted) == 1
    proxy.heal()
    assert set(submit(proxied, ONE_KEYED)) == accepted


def test_a_database_that_leaves_in_mid_submission(
    proxied: Settings, proxy: Proxy, database: sa.Engine
) -> None:
    proxy.trap = Trap(match=b"INSERT", lose="reply", then="silence")
    with Client(proxied) as client:
        client.get_results([uuid.uuid4()])

        def leave(_: float) -> None:
            proxy.refuse()

        client._connect()._sleep = leave  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(StoreUnavailableError) as caught:
            client.enqueue_prompt("hello")
        assert caught.value.unknown_outcome
        with pytest.raises(StoreUnavailableError) as caught:
            client.enqueue_prompt("hello")
        assert not caught.value.unknown_outcome  # the next one was never sent
    assert len(rows_in(database)) == 1


def test_the_callers_own_transaction_is_not_repeated(
    settings: Settings, proxied: Settings, proxy: Proxy, database: sa.Engine
) -> None:
    engine = make_engine(proxied.database_url.get_secret_value(), application_name="tests")
    proxy.trap = Trap(match=b"INSERT", lose="request")
    with Client(settings) as client, Session(engine) as session:
        with pytest.raises(StoreUnavailableError) as caught:
            client.enqueue_prompt("hello", session=session)
        assert not caught.value.unknown_outcome  # without a commit nothing is there
    engine.dispose()
    assert proxy.trap.sprung == 1
    assert rows_in(database) == set()


def test_many_prompts_are_accepted_all_or_none(
    proxied: Settings, proxy: Proxy, database: sa.Engine, broker_url: str
) -> None:
    proxy.trap = Trap(match=b"INSERT", lose="request", times=9)
    with Client(proxied) as client:
        with pytest.raises(StoreUnavailableError):
            client.enqueue_prompts(MANY)
        assert rows_in(database) == set()
        proxy.heal()
        assert len(client.enqueue_prompts(MANY)) == len(rows_in(database)) == len(MANY)
    assert len(rung_in(broker_url)) == len(MANY)


def test_an_abandoned_transaction_ends_soon(database: sa.Engine) -> None:
    shown = sa.text("SHOW idle_in_transaction_session_timeout")
    with database.connect() as connection:
        with connection.begin():
            give_up_soon(connection)
            assert connection.execute(shown).scalar() == "5s"
        assert connection.execute(shown).scalar() == "0"


def test_the_same_insert_again_changes_nothing(database: sa.Engine) -> None:
    plain, with_key = spec(), spec(idempotency_key="k", on_unknown=OnUnknown.FAIL)
    for _ in range(3):
        assert insert(database, plain, with_key) == [plain.id, with_key.id]
    with database.connect() as connection:
        kept = connection.execute(sa.text("SELECT id, on_unknown FROM jobs")).all()
    assert set(kept) == {(plain.id, "retry"), (with_key.id, "fail")}
    again = spec(idempotency_key="k", on_unknown=OnUnknown.FAIL)
    assert insert(database, again) == [with_key.id]


def test_digests_of_earlier_versions_hold() -> None:
    facts: dict[str, Any] = {
        "metadata": {"a": 1},
        "callback_url": "https://example.com/",
        "idempotency_key": "k",
    }
    old = request_digest(spec(id=uuid.UUID(int=1), **facts))
    assert old == "471a7fd3972b891ace4727190e080984c0af848b04559fb84ce6e72d44c5254c"
    assert request_digest(spec(on_unknown=OnUnknown.FAIL, **facts)) != old


def test_jobs_that_the_database_drops_are_not_accepted(database: sa.Engine) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION drop_row() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN NULL; END'"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER drop_row BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION drop_row()"
        )
    for one in (spec(), spec(idempotency_key="k")):
        with database.begin() as connection, pytest.raises(StoreRefusedError, match="1 of the"):
            insert_jobs(connection, [one])


# -- a database that is away --------------------------------------------------------------------


def timed(call: Callable[[], object]) -> tuple[float, StoreUnavailableError]:
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        call()
    return time.monotonic() - started, caught.value


def test_a_database_that_refuses_is_told_of_at_once(
    proxied: Settings, proxy: Proxy, database: sa.Engine, broker_url: str
) -> None:
    with Client(proxied) as client:
        client.enqueue_prompt("accepted")
        proxy.refuse()  # the pooled connection is closed, too
        for call in (
            lambda: client.enqueue_prompt(SECRET),
            lambda: client.enqueue_prompts([SECRET] * 2_000),
        ):
            took_s, error = timed(call)
            assert took_s < 1.0
            assert not error.unknown_outcome
        proxy.heal()
        client.enqueue_prompt("accepted")
    assert len(rows_in(database)) == len(rung_in(broker_url)) == 2


def test_a_database_that_never_answers_a_newcomer(
    proxied: Settings, proxy: Proxy, database: sa.Engine
) -> None:
    proxy.silent = True
    took_s, error = timed(lambda: submit_async(proxied, ONE))
    assert took_s < SOON_S
    assert not error.unknown_outcome
    assert rows_in(database) == set()


def test_errors_show_neither_prompts_nor_passwords(proxied: Settings, proxy: Proxy) -> None:
    url = proxied.database_url.get_secret_value()
    password = sa.make_url(url).password
    assert password
    careless = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    proxy.trap = Trap(match=b"INSERT", lose="request", times=9)
    for engine in (None, careless):
        with Client(proxied, engine=engine) as client:
            errors = [timed(lambda: client.enqueue_prompt(SECRET))[1]]
            proxy.refuse()
            errors.append(timed(lambda: client.enqueue_prompt(SECRET))[1])
            proxy.heal()
            proxy.trap = Trap(match=b"INSERT", lose="request", times=9)
        for error in errors:
            shown = "".join(traceback.TracebackException.from_exception(error).format())
            assert "StoreUnavailableError" in shown
            assert "secret of" not in shown
            assert password not in shown
    careless.dispose()


def test_a_read_only_database_is_left_for_the_primary(
    settings: Settings, database: sa.Engine, admin: sa.Engine
) -> None:
    """As after a failover: the pooled connection is to what has become a standby."""

    def set_read_only(value: str) -> None:
        name = database.url.database
        with admin.connect() as connection:
            connection.exec_driver_sql(
                f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"
            )

    set_read_only("on")
    with Client(settings) as client:
        _, error = timed(lambda: client.enqueue_prompt("hello"))
        assert "ReadOnlySqlTransaction" in str(error)
        assert not error.unknown_outcome
        set_read_only("off")
        client.enqueue_prompt("hello")
    assert len(rows_in(database)) == 1


def test_a_table_that_is_locked_is_not_waited_for(
    settings: Settings, database: sa.Engine, database_url: str
) -> None:
    slow = make_engine(database_url, application_name="tests", patience_s=0.3)
    with database.connect() as other, other.begin(), Client(settings, engine=slow) as client:
        other.exec_driver_sql("LOCK TABLE jobs")
        took_s, error = timed(lambda: client.enqueue_prompt("hello", idempotency_key="k"))
        assert took_s < SOON_S
        assert error.unknown_outcome  # the server may do it once the lock is gone
    slow.dispose()
    with Client(settings) as client:
        client.enqueue_prompt("hello", idempotency_key="k")
    assert len(rows_in(database)) == 1


# -- what a failure means, from Postgres itself --------------------------------------------------

PASSING = ["08006", "25006", "40001", "40P01", "53100", "53200", "53300", "55P03", "57014"]
PASSING += ["57P01", "57P02", "57P03", "58030"]
REFUSED = ["22001", "22P02", "23502", "23505", "23514", "28000", "42501", "42P01", "53400", "54000"]
REFUSED += ["0A000", "XX000"]


def raising(sqlstate: str) -> Callable[[sa.Connection], object]:
    text = f"DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING ERRCODE = '{sqlstate}'; END $$"
    return lambda connection: connection.exec_driver_sql(text)


def test_each_failure_is_read_right(database_url: str) -> None:
    base = Database(database_url, application_name="tests")
    for sqlstate in PASSING:
        with pytest.raises(StoreUnavailableError) as passing:
            base.run(raising(sqlstate))
        assert passing.value.facts["sqlstate"] == sqlstate
        assert SECRET not in str(passing.value)
    for sqlstate in REFUSED:
        with pytest.raises(StoreRefusedError) as refused:
            base.run(raising(sqlstate))
        assert SECRET not in str(refused.value)
    base.close()


async def test_workers_insist_on_what_will_pass_only(database_url: str) -> None:
    base = AsyncDatabase(database_url, application_name="tests")
    tries: list[str] = []

    def fail_first(sqlstate: str) -> Callable[[sa.Connection], int]:
        def statement(connection: sa.Connection) -> int:
            tries.append(sqlstate)
            if tries.count(sqlstate) == 1:
                raising(sqlstate)(connection)
            return int(connection.execute(sa.text("SELECT 7")).scalar_one())

        return statement

    for sqlstate in ("40P01", "53100", "53300", "57P03", "25006"):
        assert await base.insist(fail_first(sqlstate), patience_s=20) == 7
        assert tries.count(sqlstate) == 2
    with pytest.raises(StoreRefusedError):
        await base.insist(fail_first("23505"), patience_s=20)
    assert tries.count("23505") == 1
    await base.close()


# -- a broker that is away ----------------------------------------------------------------------


def latencies_ms(settings: Settings, count: int = 200) -> list[float]:
    samples = []
    with Client(settings) as client:
        client.enqueue_prompt("the first call connects")
        for _ in range(count):
            started = time.perf_counter()
            client.enqueue_prompt("hello", tier="basic")
            samples.append((time.perf_counter() - started) * 1000)
    return samples


def p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]


@pytest.mark.parametrize("fault", ["refuses", "stops answering"])  # never answers: see below
def test_a_broker_that_is_away_slows_nobody(
    settings: Settings, broker_url: str, database: sa.Engine, fault: str
) -> None:
    usual = p99(latencies_ms(settings))
    with proxy_to(broker_url) as proxy:
        if fault == "refuses":
            proxy.refuse()
        else:
            proxy.trap = Trap(match=b"prompts.", lose="reply", then="silence", times=99)
        url = SecretStr(proxy.url(broker_url))
        started = time.monotonic()
        away = p99(latencies_ms(settings.model_copy(update={"broker_url": url})))
        took_s = time.monotonic() - started
        print(f"enqueue_prompt p99 {usual:.1f} ms, while the broker {fault} {away:.1f} ms")
    assert away < max(10 * usual, 50.0)
    assert away < 500.0
    assert took_s < SOON_S  # close() gives the broker two seconds
    assert len(rows_in(database)) == 402


def test_a_process_ends_although_the_broker_never_answers(
    settings: Settings, broker_url: str, database: sa.Engine, tmp_path: Path
) -> None:
    script = """
        import time
        from promptfleet import enqueue_prompt
        started = time.monotonic()
        enqueue_prompt("hello")
        print(time.monotonic() - started, flush=True)
        import atexit
        begun = time.monotonic()
        atexit._run_exitfuncs()
        print(time.monotonic() - begun)
    """
    with proxy_to(broker_url) as proxy:
        proxy.silent = True
        url = SecretStr(proxy.url(broker_url))
        started = time.monotonic()
        printed = run_script(script, settings.model_copy(update={"broker_url": url}), tmp_path)
        took_s = time.monotonic() - started
    called_s, exit_s = (float(line) for line in printed.split())
    assert called_s < 5.0  # libraries are imported in it
    assert exit_s < 5.0
    assert took_s < 20.0
    assert len(rows_in(database)) == 1


def test_jobs_of_a_lost_broker_are_rung_for_later(
    settings: Settings, broker_url: str, database: sa.Engine
) -> None:
    with proxy_to(broker_url) as proxy:
        proxy.refuse()
        url = SecretStr(proxy.url(broker_url))
        client = Client(settings.model_copy(update={"broker_url": url}))
        lost = client.enqueue_prompt("nobody hears of it")
        ringer = client._connect()._bell  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        assert ringer.flush(SOON_S)
        proxy.heal()
        heard = client.enqueue_prompt("the same client rings again")
        eventually(lambda: rung_in(broker_url) == [str(heard.id)], "the doorbell")
        client.close()
    change(database, lost.id, sweep_at=ago(1))
    with database.begin() as connection:
        found = sweep(connection).doorbells
    assert found == [Doorbell(job_id=lost.id, tier="standard")]
    publish(make_celery(broker_url, ["standard"]), found)
    assert len(messages_in(broker_url)) == 2
