"""What becomes of old files and batches, and what runners may do, in the database itself."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from tests.rows import ago, insert, spec
from uuid_utils.compat import uuid7

from promptfleet_shared.store.batches import (
    Batch,
    Ending,
    Held,
    NewBatch,
    NewLine,
    add_lines,
    begin_batch,
    cancel_batch,
    claim_batches,
    create_batch,
    end_batch,
    hold_batch,
    note_progress,
    pause_batch,
    prune_batches,
    read_batch,
)
from promptfleet_shared.store.deletions import Deletion
from promptfleet_shared.store.files import (
    add_chunk,
    begin_file,
    delete_file,
    finish_file,
    read_chunk,
    read_file,
    sweep_files,
)
from promptfleet_shared.store.sweeping import prune

TENANT = "acme"
ANY_ID = uuid.UUID(int=2**128 - 1)


def do(database: sa.Engine, statement: Any, *args: Any, **options: Any) -> Any:
    with database.begin() as connection:
        return statement(connection, *args, **options)


def change(database: sa.Engine, table: str, id_: uuid.UUID, **sql: str) -> None:
    sets = ", ".join(f"{name} = {expression}" for name, expression in sql.items())
    with database.begin() as connection:
        connection.execute(sa.text(f"UPDATE {table} SET {sets} WHERE id = :id"), {"id": id_})


def count(database: sa.Engine, table: str) -> int:
    with database.connect() as connection:
        return int(connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())


def file(database: sa.Engine, *, finished: bool = True, ttl_s: float | None = None) -> uuid.UUID:
    id_ = uuid7()
    do(database, begin_file, id_, tenant=TENANT)
    assert do(database, add_chunk, id_, 0, b"\0data", tenant=TENANT)
    if finished:
        options = {"purpose": "batch", "filename": "a.jsonl", "ttl_s": ttl_s}
        assert do(database, finish_file, id_, tenant=TENANT, **options)
    return id_


def batch(database: sa.Engine, input_file_id: uuid.UUID) -> Batch:
    new = NewBatch(
        id=uuid7(), tenant=TENANT, endpoint="/v1/completions", input_file_id=input_file_id
    )
    made, is_new = do(database, create_batch, new)
    assert is_new
    assert isinstance(made, Batch)
    return made


def held(database: sa.Engine, runner: str = "one", *, lease_s: float = 30) -> Held:
    [found] = do(database, claim_batches, runner, lease_s=lease_s, limit=5)
    assert isinstance(found, Held)
    return found


def lines(held: Held, start: int, stop: int, **fields: Any) -> list[NewLine]:
    return [
        NewLine(
            n=n,
            custom_id=f"line-{n}",
            spec=spec(tenant=TENANT, batch_id=held.id, **fields),
        )
        for n in range(start, stop)
    ]


class TestFiles:
    def test_nobody_sees_one_that_is_not_finished(self, database: sa.Engine) -> None:
        id_ = file(database, finished=False)
        assert do(database, read_file, id_, tenant=TENANT) is None
        assert do(database, delete_file, id_, tenant=TENANT) is Deletion.MISSING

    def test_old_ones_are_swept_with_their_chunks(self, database: sa.Engine) -> None:
        unfinished, old = file(database, finished=False), file(database, ttl_s=3_600)
        kept = [file(database), file(database, ttl_s=3_600), file(database, finished=False)]
        for id_ in (unfinished, old):
            change(database, "files", id_, expires_at=ago(1))
        assert do(database, read_file, old, tenant=TENANT) is None
        assert do(database, sweep_files) == 2
        assert do(database, sweep_files) == 0
        assert count(database, "files") == count(database, "file_chunks") == len(kept)
        assert not do(database, add_chunk, unfinished, 1, b"late", tenant=TENANT)
        late = {"purpose": "batch", "filename": "a", "ttl_s": None}
        assert do(database, finish_file, unfinished, tenant=TENANT, **late) is None

    def test_a_batch_keeps_what_it_still_reads(self, database: sa.Engine) -> None:
        id_ = file(database, ttl_s=3_600)
        batch(database, id_)
        change(database, "files", id_, expires_at=ago(1))
        assert do(database, sweep_files) == 0
        change(database, "files", id_, expires_at="NULL")
        assert do(database, delete_file, id_, tenant=TENANT) is Deletion.IN_USE
        work = held(database)
        do(database, begin_batch, work, total=2, model=None)
        assert do(database, add_lines, work, lines(work, 0, 1))
        assert do(database, delete_file, id_, tenant=TENANT) is Deletion.IN_USE
        assert do(database, read_chunk, id_, 0, tenant=TENANT) == b"\0data"
        assert do(database, add_lines, work, lines(work, 1, 2))
        assert do(database, delete_file, id_, tenant=TENANT) is Deletion.DONE
        assert count(database, "file_chunks") == 0

    def test_other_tenants_files_do_not_exist(self, database: sa.Engine) -> None:
        id_ = file(database)
        assert do(database, read_file, id_, tenant="other") is None
        assert do(database, read_chunk, id_, 0, tenant="other") is None
        assert do(database, delete_file, id_, tenant="other") is Deletion.MISSING
        assert not do(database, add_chunk, id_, 1, b"x", tenant="other")


class TestBatches:
    def test_one_runner_holds_it_until_its_lease_lapses(self, database: sa.Engine) -> None:
        made = batch(database, file(database))
        first = held(database)
        assert do(database, claim_batches, "two", lease_s=30, limit=5) == []
        change(database, "batches", made.id, lease_until=ago(1))
        second = held(database, "two")

        assert do(database, hold_batch, first) is None
        assert do(database, begin_batch, first, total=5, model=None) is None
        assert do(database, begin_batch, second, total=5, model=None).status == "in_progress"
        assert not do(database, add_lines, first, lines(first, 0, 2))
        assert do(database, note_progress, first) is None
        do(database, pause_batch, first, 0)
        assert do(database, hold_batch, second) is not None
        assert count(database, "jobs") == count(database, "batch_lines") == 0

    def test_lines_are_taken_on_once_and_in_order(self, database: sa.Engine) -> None:
        made = batch(database, file(database))
        work = held(database)
        do(database, begin_batch, work, total=4, model=None)
        assert do(database, add_lines, work, lines(work, 0, 2))
        for again in (lines(work, 0, 2), lines(work, 3, 4)):
            assert not do(database, add_lines, work, again)
        assert do(database, add_lines, work, lines(work, 2, 4))
        assert count(database, "jobs") == count(database, "batch_lines") == 4
        now = do(database, read_batch, made.id, tenant=TENANT)
        assert (now.next_line, now.jobs) == (4, 4)

    def test_a_cancelled_one_gets_no_more_jobs(self, database: sa.Engine) -> None:
        made = batch(database, file(database))
        work = held(database)
        do(database, begin_batch, work, total=2, model=None)
        assert do(database, cancel_batch, made.id, tenant="other") is None
        cancelled, done = do(database, cancel_batch, made.id, tenant=TENANT)
        assert (cancelled.status, done) == ("cancelling", True)
        _, again = do(database, cancel_batch, made.id, tenant=TENANT)
        assert not again
        assert not do(database, add_lines, work, lines(work, 0, 2))
        cut = [NewLine(n=n, custom_id=str(n), error={"code": "batch_cancelled"}) for n in (0, 1)]
        assert do(database, add_lines, work, cut)
        now, ended = do(database, note_progress, work)
        assert (now.status, ended) == ("cancelling", True)
        assert do(database, end_batch, work, Ending(status="completed")) is None
        assert do(database, end_batch, work, Ending(status="cancelled")).cancelled_at

    def test_its_jobs_are_not_pruned_before_its_end(self, database: sa.Engine) -> None:
        batch(database, file(database))
        work = held(database)
        do(database, begin_batch, work, total=1, model=None)
        taken = lines(work, 0, 1)
        assert do(database, add_lines, work, taken)
        [other] = insert(database, spec(tenant=TENANT))
        for line in taken:
            assert line.spec
            change(database, "jobs", line.spec.id, state="'failed'", finished_at=ago(100))
        change(database, "jobs", other, state="'failed'", finished_at=ago(100))
        do(database, prune, floor=ANY_ID, age_s=10)
        assert count(database, "jobs") == 1
        change(database, "batches", work.id, status="'completed'", completed_at=ago(100))
        do(database, prune, floor=ANY_ID, age_s=10)
        assert count(database, "jobs") == 0

    @pytest.mark.parametrize("age_s", [5, 50])
    def test_old_ones_are_pruned(self, database: sa.Engine, age_s: float) -> None:
        batch(database, file(database))
        work = held(database)
        do(database, begin_batch, work, total=1, model=None)
        assert do(database, add_lines, work, lines(work, 0, 1))
        assert do(database, prune_batches, floor=ANY_ID, age_s=1) == 0
        change(database, "batches", work.id, status="'expired'", expired_at=ago(age_s))
        expected = 1 if age_s > 10 else 0
        assert do(database, prune_batches, floor=ANY_ID, age_s=10) == expected
        assert count(database, "batches") == count(database, "batch_lines") == 1 - expected
