"""Batches whose runners are killed and stopped at the worst moments: nothing lost, none doubled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa
from openai.types import Batch
from tests.api_server import ApiServer, api_server, new_tenant
from tests.processes import provider, start_worker, worker_environment
from tests.waiting import eventually

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[tiers.basic]
models = ["small"]
[models.small]
price_as = "free"
deployments = [{{ base_url = "{url}/v1", model = "sim-small" }}]
"""
LINES = 1_600
# Whoever inserts such a row waits as long as the test holds the gate.
GATES = """
CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock_shared(CAST(TG_ARGV[0] AS bigint)); RETURN NEW; END $$;
CREATE TRIGGER gate BEFORE INSERT ON batch_lines FOR EACH ROW WHEN (NEW.n = 700)
    EXECUTE FUNCTION wait_at_gate(1);
CREATE TRIGGER gate BEFORE INSERT ON file_chunks FOR EACH ROW WHEN (NEW.n = 1)
    EXECUTE FUNCTION wait_at_gate(2);
"""
SECOND_CHUNK, OUTPUT = "SELECT pg_advisory_xact_lock(1)", "SELECT pg_advisory_xact_lock(2)"


class Site:
    """A database with gates, one worker, and API processes that come and go."""

    def __init__(self, database: sa.Engine, directory: Path, env: dict[str, str]) -> None:
        self.database = database
        self.directory = directory
        self.env = env
        self.tenant = new_tenant(database)

    @contextmanager
    def api(self) -> Iterator[ApiServer]:
        with api_server(self.directory, self.env) as server:
            try:
                yield server
            finally:
                if server.process.running:  # it may have been stopped
                    os.kill(server.process.pid, signal.SIGCONT)

    def client(self, server: ApiServer) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=self.tenant.key, max_retries=0)

    @contextmanager
    def gate(self, statement: str) -> Iterator[None]:
        """A closed gate; nobody goes through before the block ends."""
        with self.database.connect() as connection, connection.begin():
            connection.execute(sa.text(statement))
            yield

    def value(self, query: str) -> object:
        with self.database.connect() as connection:
            return connection.execute(sa.text(query)).scalar()

    def wait_until_blocked(self, what: str) -> None:
        blocked = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'promptfleet-api'"
            " AND datname = current_database() AND wait_event_type = 'Lock'"
        )
        eventually(lambda: self.value(blocked), what, timeout_s=40)


@pytest.fixture
def site(database: sa.Engine, database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Site]:
    with database.begin() as connection:
        connection.execute(sa.text(GATES))
    with provider(tmp_path, "--latency-ms", "1", "--tokens-per-s", "0") as simulated:
        config = tmp_path / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.url))
        env = worker_environment(
            database_url=database_url, broker_url=broker_url, config=config, lease_s=1
        )
        with start_worker(["basic"], name="faults", env=env, log=tmp_path / "worker.log"):
            yield Site(database, tmp_path, env)


def test_runners_are_lost_in_every_step(site: Site) -> None:
    key = uuid.uuid4().hex
    lines = [
        {
            "custom_id": f"line-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "small",
                "messages": [
                    {"role": "user", "content": f"{n} {key} [[sim:text={'x' * 400} {n}]]"}
                ],
            },
        }
        for n in range(LINES)
    ]
    content = "\n".join(json.dumps(line) for line in lines).encode()

    # Killed while it reads its input.
    with site.api() as first:
        client = site.client(first)
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        with site.gate("LOCK TABLE file_chunks IN ACCESS EXCLUSIVE MODE"):
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            site.wait_until_blocked("it reads the input")
            assert site.value("SELECT status FROM batches") == "validating"
            first.process.kill()

    # Killed in the transaction that makes jobs of the second chunk.
    with site.gate(SECOND_CHUNK), site.api() as second:
        site.wait_until_blocked("the second chunk is being committed")
        assert site.value("SELECT next_line FROM batches") == 500
        assert site.value("SELECT count(*) FROM jobs") == 500
        second.process.kill()

    with contextlib.ExitStack() as zombies:
        # The next one is stopped there: the server ends its transaction, and its lease lapses.
        with site.gate(SECOND_CHUNK):
            third = zombies.enter_context(site.api())
            site.wait_until_blocked("the second chunk is being committed again")
            os.kill(third.process.pid, signal.SIGSTOP)

        # Killed with a part of the output written.
        with site.gate(OUTPUT), site.api() as fourth:
            finalizing = "SELECT count(*) FROM batches WHERE status = 'finalizing'"
            eventually(lambda: site.value(finalizing), "all lines have ended", timeout_s=60)
            site.wait_until_blocked("it writes its output")
            fourth.process.kill()

        with site.api() as last:
            client = site.client(last)
            os.kill(third.process.pid, signal.SIGCONT)  # a zombie, which changes nothing any more

            def ended() -> Batch | None:
                found = client.batches.retrieve(batch.id)
                return found if found.status == "completed" else None

            done = eventually(ended, "the batch is completed", timeout_s=60)
            assert done
            assert done.request_counts
            assert done.request_counts.completed == done.request_counts.total == LINES
            assert done.error_file_id is None
            text = client.files.content(done.output_file_id or "").text
            answered = [json.loads(line) for line in text.splitlines()]
            assert [line["custom_id"] for line in answered] == [line["custom_id"] for line in lines]
            for n, line in enumerate(answered):
                [choice] = line["response"]["body"]["choices"]
                assert choice["message"]["content"].endswith(f"x {n}")
            assert [f.id for f in client.files.list()] == [done.output_file_id, file.id]
            # What was not finished is invisible, and goes with the next sweep.
            unfinished = (
                "SELECT bool_and(expires_at IS NOT NULL) FROM files WHERE status = 'uploading'"
            )
            assert site.value(unfinished) in {True, None}
    assert site.value("SELECT count(*) FROM jobs") == LINES
    assert site.value("SELECT count(DISTINCT job_id) FROM batch_lines") == LINES
    assert site.value("SELECT count(*) FROM ledger WHERE calls > 0") == LINES
