"""Listings, page by page, while others write."""

from __future__ import annotations

import base64
import contextlib
import random
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from tests.databases import emptied, one_database
from tests.rows import ago, change, claim_one, insert, outcome, result_rows, spec
from uuid_utils.compat import uuid7

from promptfleet.dev_stack import EmbeddedPostgres
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import JobError, JobState
from promptfleet_shared.store import cursors, listing, sweeping
from promptfleet_shared.store.claims import claim
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.listing import (
    JobPage,
    ResultPage,
    landed_results,
    list_jobs,
    newest_results,
    read_jobs,
)
from promptfleet_shared.store.results import request_cancel

TENANT = "default"


@pytest.fixture(scope="module")
def shared_url(postgres: EmbeddedPostgres, admin: sa.Engine, template: str) -> Iterator[str]:
    with one_database(postgres, admin, template) as url:
        yield url


@pytest.fixture
def database_url(shared_url: str) -> Iterator[str]:
    with emptied(shared_url, "jobs", "results") as url:
        yield url


def jobs_of(database: sa.Engine, tenant: str = TENANT, **options: Any) -> JobPage:
    with database.begin() as connection:
        return list_jobs(connection, tenant, **options)


def all_pages(database: sa.Engine, **options: Any) -> list[list[uuid.UUID]]:
    pages: list[list[uuid.UUID]] = []
    before = None
    while True:
        page = jobs_of(database, before=before, **options)
        pages.append([job.id for job in page.jobs])
        before = page.cursor
        if before is None:
            return pages


class TestJobs:
    def test_come_newest_first_whatever_comes_meanwhile(self, database: sa.Engine) -> None:
        ids = insert(database, *(spec(str(n)) for n in range(5)))
        insert(database, spec(tenant="another"))

        first = jobs_of(database, limit=2)
        insert(database, spec("newer"))
        second = jobs_of(database, limit=2, before=first.cursor)
        third = jobs_of(database, limit=2, before=second.cursor)

        seen = [job.id for page in (first, second, third) for job in page.jobs]
        assert seen == ids[::-1]
        assert third.cursor is None
        assert jobs_of(database, "nobody") == JobPage(jobs=[], cursor=None)
        assert jobs_of(database, limit=6).cursor is None

    def test_tell_what_became_of_them(self, database: sa.Engine) -> None:
        batch = uuid7()
        wanted = spec(
            stream=True, batch_id=batch, model="m", priority=7, metadata={"user": "ann", "n": 5}
        )
        insert(database, wanted)
        failure = JobError(code="rate_limit", message="Too many.", status=429)
        with database.begin() as connection:
            (claimed,) = claim(connection, [wanted.id], worker="w")
            done = outcome(claimed, state=JobState.FAILED, text=None, error=failure)
            finish(connection, [done])

        (job,) = jobs_of(database).jobs

        assert (job.id, job.tier, job.model, job.priority) == (wanted.id, "basic", "m", 7)
        assert (job.state, job.attempts, job.calls) == (JobState.FAILED, 1, 1)
        assert (job.stream, job.batch_id, job.error) == (True, batch, failure)
        assert job.metadata == {"user": "ann", "n": 5}
        assert job.finished_at is not None
        assert job.created_at < job.finished_at < job.deadline
        with database.begin() as connection:
            assert read_jobs(connection, [wanted.id, uuid7()], tenant=TENANT) == {wanted.id: job}
            assert read_jobs(connection, [wanted.id], tenant="another") == {}

    def test_are_filtered(self, database: sa.Engine) -> None:
        batch = uuid7()
        fast = insert(database, *(spec(tier="fast", metadata={"run": "a"}) for _ in range(2)))
        basic = insert(database, *(spec(metadata={"run": "a", "n": n}) for n in range(2)))
        lines = insert(database, *(spec(batch_id=batch, metadata=None) for _ in range(3)))
        claim_one(database, lines[0])

        def found(**options: Any) -> set[uuid.UUID]:
            return {job.id for job in jobs_of(database, **options).jobs}

        assert found(tier="fast") == set(fast)
        assert found(metadata={"run": "a"}) == {*fast, *basic}
        assert found(metadata={"run": "a", "n": "1"}) == {basic[1]}
        assert found(metadata={"run": "b"}) == set()
        assert found(state=JobState.RUNNING) == {lines[0]}
        assert found(batch_id=batch) == set(lines)
        assert found(batch_id=batch, state=JobState.QUEUED, tier="basic") == set(lines[1:])
        assert found(batch_id=batch, metadata={"run": "a"}) == set()
        assert jobs_of(database, "another", batch_id=batch).jobs == []
        pages = all_pages(database, batch_id=batch, limit=2)
        assert pages == [lines[:0:-1], lines[:1]]

    def test_a_filter_that_seldom_matches_looks_at_so_many_a_page(
        self, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listing, "_LIST_JOBS", listing._LIST_JOBS.bindparams(scanned=4))
        rare = {0, 1, 9}
        ids = insert(
            database, *(spec(metadata={"k": "x" if n in rare else "y"}) for n in range(13))
        )

        pages = all_pages(database, metadata={"k": "x"}, limit=5)
        assert pages == [[ids[9]], [], [ids[1]], [ids[0]]]
        common = all_pages(database, metadata={"k": "y"}, limit=2)
        assert max(len(page) for page in common) == 2
        found = [id_ for page in common for id_ in page]
        assert found == [ids[n] for n in range(12, -1, -1) if n not in rare]
        assert len(all_pages(database, limit=5)) == 3  # without a filter, pages are full


class Writers:
    """Writes results for tenants, in any number of transactions at once."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url, application_name="tests", pool_size=10)
        self.committed: set[uuid.UUID] = set()
        self.open: list[Writer] = []

    def begin(self) -> Writer:
        return Writer(self)

    def write(self, count: int = 1, **fields: Any) -> list[uuid.UUID]:
        writer = self.begin()
        ids = writer.write(count, **fields)
        writer.commit()
        return ids

    def act(self, chance: random.Random) -> None:
        """Begin, write or end one of several transactions."""
        if not self.open or (len(self.open) < 8 and chance.random() < 0.4):
            self.open.append(self.begin())
        which = chance.randrange(len(self.open))
        self.open[which].write(chance.randint(1, 3))
        if chance.random() < 0.3:
            ending = self.open.pop(which)
            ending.commit() if chance.random() < 0.8 else ending.roll_back()


class Writer:
    """One transaction."""

    def __init__(self, writers: Writers) -> None:
        self.writers = writers
        self.connection = writers.engine.connect()
        self.transaction = self.connection.begin()
        self.ids: list[uuid.UUID] = []

    def write(
        self, count: int = 1, *, tenant: str = TENANT, batch: uuid.UUID | None = None
    ) -> list[uuid.UUID]:
        # Random ids: nothing of their own order is of use.
        ids = [uuid.uuid4() for _ in range(count)]
        query = sa.text(
            "INSERT INTO results (job_id, tenant, tier, state, created_at, api_batch_id) VALUES"
            " (:id, :tenant, 'basic', 'succeeded', clock_timestamp(), :batch)"
        )
        rows = [{"id": id_, "tenant": tenant, "batch": batch} for id_ in ids]
        self.connection.execute(query, rows)
        self.ids += ids if tenant == TENANT else []
        return ids

    def commit(self) -> None:
        self.transaction.commit()
        self.connection.close()
        self.writers.committed |= set(self.ids)

    def roll_back(self) -> None:
        self.transaction.rollback()
        self.connection.close()


@pytest.fixture
def writers(database_url: str) -> Iterator[Writers]:
    made = Writers(database_url)
    with contextlib.closing(made.engine.raw_connection()):
        pass
    yield made
    made.engine.dispose()


def landed(database: sa.Engine, after: str | None = None, **options: Any) -> ResultPage:
    with database.begin() as connection:
        return landed_results(connection, options.pop("tenant", TENANT), after=after, **options)


def ids_in(page: ResultPage) -> list[uuid.UUID]:
    return [result.job_id for result in page.results]


class Reader:
    """Reads what lands, page by page."""

    def __init__(self, database: sa.Engine) -> None:
        self.database = database
        self.ids: list[uuid.UUID] = []
        self.cursor: str | None = None

    def read(self, limit: int) -> bool:
        page = landed(self.database, self.cursor, limit=limit)
        self.cursor = page.cursor
        self.ids += ids_in(page)
        return page.has_more

    def catch_up(self, limit: int) -> None:
        for _ in range(300):
            if not self.read(limit):
                return
        pytest.fail("it reads on and on")


class TestLandedResults:
    def test_come_in_the_order_of_their_transactions(
        self, database: sa.Engine, writers: Writers
    ) -> None:
        ids = [writers.write(2, tenant="another") and sorted(writers.write(3)) for _ in range(3)]
        expected = [id_ for some in ids for id_ in some]

        first = landed(database, limit=4)
        assert (ids_in(first), first.has_more) == (expected[:4], True)
        second = landed(database, first.cursor, limit=4)
        assert (ids_in(second), second.has_more) == (expected[4:8], True)
        last = landed(database, second.cursor, limit=4)
        assert ids_in(last) == expected[8:]
        rest = landed(database, last.cursor)
        assert (rest.results, rest.has_more) == ([], False)
        assert ids_in(landed(database, rest.cursor)) == []
        assert ids_in(landed(database, rest.cursor, tenant="another")) == []

    def test_none_is_skipped_that_commits_late(self, database: sa.Engine, writers: Writers) -> None:
        """A transaction that began first, and has the smaller number, ends last."""
        slow = writers.begin()
        late = slow.write(2)
        early = writers.write()

        seen = landed(database)
        assert ids_in(seen) == early  # nobody waits for the slow one
        unchanged = landed(database, seen.cursor)
        assert ids_in(unchanged) == []
        slow.commit()

        assert ids_in(landed(database, seen.cursor)) == sorted(late)
        after = landed(database, unchanged.cursor, limit=1)
        assert (ids_in(after), after.has_more) == (sorted(late)[:1], True)
        assert ids_in(landed(database, after.cursor)) == sorted(late)[1:]

    def test_none_is_skipped_between_two_pages(self, database: sa.Engine, writers: Writers) -> None:
        slow = writers.begin()
        late = slow.write()
        early = sorted(writers.write(3))

        first = landed(database, limit=2)
        assert ids_in(first) == early[:2]
        slow.commit()
        newest = writers.write()
        second = landed(database, first.cursor, limit=2)
        assert (ids_in(second), second.has_more) == (early[2:], True)
        assert ids_in(landed(database, second.cursor)) == [*late, *newest]

    @pytest.mark.parametrize("remembered", [cursors.MAX_UNDER_WAY, 2])
    @pytest.mark.parametrize("seed", range(4))
    def test_each_comes_exactly_once(
        self,
        database: sa.Engine,
        writers: Writers,
        monkeypatch: pytest.MonkeyPatch,
        seed: int,
        remembered: int,
    ) -> None:
        """Writers and a reader at random; after each look, all that is committed was read."""
        monkeypatch.setattr(cursors, "MAX_UNDER_WAY", remembered)
        chance = random.Random(seed)
        reader = Reader(database)
        for _ in range(200):
            if chance.random() < 0.7:
                writers.act(chance)
            elif chance.random() < 0.5:
                reader.read(limit=chance.randint(1, 4))
            else:
                reader.catch_up(limit=chance.randint(1, 4))
                if remembered > len(writers.open):
                    assert set(reader.ids) == writers.committed
            assert len(reader.ids) == len(set(reader.ids))
        for writer in writers.open:
            writer.commit()
        for _ in range(2):  # a full memory may have kept some back until now
            reader.catch_up(limit=3)
        assert len(reader.ids) == len(set(reader.ids)) > 30
        assert set(reader.ids) == writers.committed

    def test_of_a_batch(self, database: sa.Engine, writers: Writers) -> None:
        batch, other = uuid7(), uuid7()
        lines = sorted(writers.write(3, batch=batch))
        writers.write(2, batch=other)
        writers.write(2)
        late = writers.write(1, batch=batch)

        first = landed(database, batch_id=batch, limit=2)
        assert ids_in(first) == lines[:2]
        assert ids_in(landed(database, first.cursor, batch_id=batch)) == [lines[2], *late]
        assert ids_in(landed(database, batch_id=batch, tenant="another")) == []

    def test_from_now_on(self, database: sa.Engine, writers: Writers) -> None:
        slow = writers.begin()
        late = slow.write()
        writers.write()
        with database.begin() as connection:
            cursor = newest_results(connection)
        newer = writers.write()
        slow.commit()

        assert ids_in(landed(database, cursor)) == [*late, *newer]

    def test_whoever_ended_them(self, database: sa.Engine) -> None:
        """Each way in which a job ends writes all that the listing needs."""
        batch = uuid7()
        finished, swept, cancelled = insert(database, *(spec(batch_id=batch) for _ in range(3)))
        change(database, swept, unknown_calls="2", deadline=ago(1), sweep_at=ago(1))
        change(database, cancelled, unknown_calls="3")
        change(database, finished, unknown_calls="4")
        claimed = claim_one(database, finished)
        with database.begin() as connection:
            finish(connection, [outcome(claimed, calls=2, unknown_calls=1)])
        with database.begin() as connection:
            sweeping.sweep(connection)
        with database.begin() as connection:
            request_cancel(connection, [cancelled], tenant=TENANT)

        page = landed(database, batch_id=batch)

        assert ids_in(page) == [finished, swept, cancelled]
        assert [result.unknown_calls for result in page.results] == [5, 2, 3]
        ((row,), *_) = (result_rows(database, id_) for id_ in (finished, swept, cancelled))
        assert row["api_batch_id"] == batch


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TestCursors:
    BAD = (
        "",
        "x",
        "nonsense",
        "!!!!",
        "é",
        "A" * 5_000,
        _encoded(b""),
        _encoded(b"\x01" + bytes(15)),
        _encoded(b"\x03" + bytes(16)),
        _encoded(b"\x02"),
        _encoded(b"\x02\x00"),
        _encoded(b"\x02\x01\x00\x01"),
        _encoded(b"\x02\x02\x05\x00\x01"),
        _encoded(b"\x02\xff\xff\xff\x7f" + bytes(50)),
        _encoded(b"\x02\x00" + b"\xff" * 9 + b"\x01"),
        _encoded(b"\x02\x00\x05\x00\x00\x05" + bytes(16)),
        _encoded(b"\x02\x00\x05\x00\x05\x05" + bytes(15)),
    )

    @pytest.mark.parametrize("cursor", BAD)
    def test_that_are_none_of_ours_are_refused(self, database: sa.Engine, cursor: str) -> None:
        with pytest.raises(InvalidRequestError, match="cursor: must be one") as caught:
            landed(database, cursor)
        assert caught.value.field == "cursor"
        with pytest.raises(InvalidRequestError, match="cursor: must be one"):
            jobs_of(database, before=cursor)

    def test_of_one_listing_are_none_of_the_other(
        self, database: sa.Engine, writers: Writers
    ) -> None:
        insert(database, spec(), spec())
        writers.write(2)
        of_jobs = jobs_of(database, limit=1).cursor
        of_results = landed(database, limit=1).cursor
        assert of_jobs is not None
        with pytest.raises(InvalidRequestError):
            landed(database, of_jobs)
        with pytest.raises(InvalidRequestError):
            jobs_of(database, before=of_results)

    def test_fit_into_a_url_however_much_is_under_way(
        self, database: sa.Engine, writers: Writers
    ) -> None:
        open_ = [writers.begin() for _ in range(9)]
        for writer in open_:
            writer.write()
            writers.write(1)
        page = landed(database, limit=5)
        assert page.has_more
        assert set(page.cursor) <= set(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        )
        assert len(page.cursor) < 100
        for writer in open_:
            writer.roll_back()
        snapshot = cursors.Snapshot(
            below=2**62, under_way=tuple(2**61 + 999 * n for n in range(256))
        )
        place = cursors.Place(seen=snapshot, seal=snapshot, last=(2**60, uuid7()))
        assert len(place.encode()) < 2_000
        assert cursors.Place.decode(place.encode()) == place

    def test_that_were_tampered_with_do_no_harm(
        self, database: sa.Engine, writers: Writers
    ) -> None:
        """Whatever passes for a cursor, Postgres takes: never a failure of the server."""
        chance = random.Random(7)
        slow = writers.begin()
        slow.write()
        ids = set(writers.write(4))
        page = landed(database, limit=2)
        good = base64.urlsafe_b64decode(page.cursor + "=" * (-len(page.cursor) % 4))
        taken = 0
        for _ in range(400):
            data = bytearray(good)
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(1, len(data))] = chance.choice([0, 1, 127, 128, 255])
            with contextlib.suppress(InvalidRequestError):
                assert ids.issuperset(ids_in(landed(database, _encoded(bytes(data)))))
                taken += 1
        slow.roll_back()
        assert taken > 20
