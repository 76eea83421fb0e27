"""A database, a broker and a provider, with the Procfile's workers for one tier."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy.exc import OperationalError
from tests.acceptance.fleet import Fleet, Watch, procfile_workers
from tests.processes import Provider, provider, worker_environment

from promptfleet import Client, PromptJob
from promptfleet_shared.settings import Settings
from promptfleet_workers.providers.simulated.answers import prompt_hash

FLEET = """
default_tier = "basic"
[batch]
max_concurrent_calls = {calls}
batch_window_ms = 10
[tiers]
basic = {{ models = ["m"] }}
[breaker]
window_s = 600  # what was well stays so for a whole test
[models.m]
price_as = "free"
deployments = [{{ base_url = "{url}", max_concurrent_calls = {at_once} }}]
"""
LEASE_S = 2.0


def unique(text: str) -> str:
    return f"{text} {uuid.uuid4().hex}"


def prompt_key(text: str) -> str:
    """What the provider's statistics call a prompt."""
    return prompt_hash([{"role": "user", "content": text}])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A database, a broker, a provider, and the workers that a test starts there."""

    directory: Path
    database_url: str
    broker_url: str
    provider: Provider
    watch: Watch
    client: Client
    stack: ExitStack

    def workers(
        self,
        *names: str,
        calls: int = 16,
        at_once: int = 16,
        loglevel: str = "INFO",
        **settings: object,
    ) -> Fleet:
        """Workers by the Procfile's command for the tier `basic`."""
        config = self.directory / "fleet.toml"
        config.write_text(FLEET.format(url=self.provider.base_url, calls=calls, at_once=at_once))
        env = worker_environment(
            database_url=self.database_url,
            broker_url=self.broker_url,
            config=config,
            **{"lease_s": LEASE_S, **settings},
        )
        command = procfile_workers()["worker_basic"]
        assert {"basic@%h", "INFO"} <= set(command)
        commands = {}
        for name in names:
            own = {"basic@%h": f"{name}@%h", "INFO": loglevel}
            commands[name] = [own.get(word, word) for word in command]
        fleet = Fleet(env, self.directory, commands)
        self.stack.callback(fleet.supervisor.kill)
        return fleet

    def submit(self, *texts: str, **options: Any) -> list[PromptJob]:
        return self.client.enqueue_prompts(texts, tier="basic", **options)

    def jobs(self) -> dict[uuid.UUID, Any]:
        """Each job's row with what its results row says, if it has one."""
        rows = self.watch.rows(
            "SELECT jobs.*, r.state AS result_state, r.error AS result_error, r.text AS answer,"
            " (SELECT count(*) FROM results WHERE job_id = id) AS results"
            " FROM jobs LEFT JOIN results r ON r.job_id = id"
        )
        return {row.id: row for row in rows}

    def states(self) -> list[str]:
        return [row.state for row in self.jobs().values()]

    def finished(self, *jobs: PromptJob) -> bool:
        try:
            rows = self.jobs()
        except OperationalError:  # it is just being restarted
            return False
        return all(rows[job.id].finished_at is not None for job in jobs)

    def calls(self) -> dict[str, int]:
        calls: dict[str, int] = self.provider.stats()["calls_by_prompt"]
        return calls


@contextmanager
def open_site(directory: Path, database_url: str, broker_url: str) -> Iterator[Site]:
    """All but the workers; those that a test starts are gone at the end."""
    watch = Watch(database_url)
    settings = Settings(database_url=SecretStr(database_url), broker_url=SecretStr(broker_url))
    with ExitStack() as stack:
        stack.callback(watch.engine.dispose)
        yield Site(
            directory=directory,
            database_url=database_url,
            broker_url=broker_url,
            provider=stack.enter_context(provider(directory)),
            watch=watch,
            client=stack.enter_context(Client(settings)),
            stack=stack,
        )
