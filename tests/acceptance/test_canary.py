"""Prompts and outputs are in Postgres and in the response cache, and nowhere else."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import httpx
import orjson
import pytest
import redis
from pydantic import SecretStr
from tests.acceptance.fleet import ROOT, Fleet, procfile_commands
from tests.acceptance.site import Site, open_site
from tests.processes import Process, worker_environment
from tests.waiting import eventually

from promptfleet import Client, PromptFleetError, PromptJob
from promptfleet.dev_stack import EmbeddedValkey, free_port
from promptfleet_shared.settings import Settings

CANARY = f"Kanarienvogel{uuid.uuid4().hex}"
CHAT = [
    {"role": "system", "content": f"You are {CANARY}."},
    {"role": "user", "content": f"Say {CANARY}!"},
]
METADATA = {"note": CANARY}  # its owner's own, and yet no business of the broker's
# Each meets the provider's text in a different way; the simulated provider repeats what it got.
FAULTS = (
    f"[[sim:{CANARY}]]",  # 400, with the marker in the message
    f"[[sim:status=400,code={CANARY}]]",
    f"[[sim:status=500,code={CANARY},times=1]] {CANARY}",
    f"[[sim:error-body,status=400,code={CANARY}]]",
    f"[[sim:html,times=1]] {CANARY}",
    f"[[sim:truncate,times=1]] {CANARY}",
    f"[[sim:disconnect,times=1]] {CANARY}",
    f"[[sim:nul]] {CANARY}",
    f"[[sim:surrogate]] {CANARY}",
    f"[[sim:bad-utf8,times=1]] {CANARY}",
    f"[[sim:text=]] {CANARY}",
)
CRASH = f"[[sim:latency-ms=3000]] {CANARY} when its worker dies"
HANG = f"[[sim:hang]] {CANARY} until it is cancelled"


def _forms(text: str) -> list[bytes]:
    """As it is, as UTF-16, in hex and in base64, wherever it begins there."""
    raw = text.encode()
    coded = [base64.b64encode(b"\0" * n + raw)[4:-4] for n in range(3)]
    return [raw, raw[::-1], text.encode("utf-16-le"), raw.hex().encode(), *coded]


FORMS = _forms(CANARY)


def has_canary(data: bytes | str) -> bool:
    found = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    return any(form in found for form in FORMS)


@pytest.fixture
def site(tmp_path: Path, database_url: str, broker: EmbeddedValkey) -> Iterator[Site]:
    with open_site(tmp_path, database_url, broker.url) as opened:
        yield opened


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """Of this test's own, so that every byte that it ever wrote can be searched."""
    with EmbeddedValkey(tmp_path / "broker") as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "cache") as server:
        yield server


@contextlib.contextmanager
def flower(site: Site, env: Mapping[str, str]) -> Iterator[str]:
    """Flower by the Procfile's command; its URL."""
    port = free_port()
    argv = [word.replace("--conf=", f"--conf={ROOT}/") for word in procfile_commands()["flower"]]
    program = str(Path(sys.executable).with_name(argv[0]))
    own = {**env, "FLOWER_PORT": str(port), "FLOWER_UNAUTHENTICATED_API": "true"}
    log = site.directory / "flower.log"
    with Process([program, *argv[1:]], log=log, ready="Visit me at", env=own):
        yield f"http://127.0.0.1:{port}"


def test_a_canary_is_found_nowhere_but_in_postgres_and_the_cache(
    site: Site, broker: EmbeddedValkey, cache: EmbeddedValkey
) -> None:
    env = worker_environment(
        database_url=site.database_url,
        broker_url=site.broker_url,
        config=site.directory / "fleet.toml",
    )
    fleet = site.workers("w", loglevel="DEBUG", lease_s=1, cache_url=cache.url)
    with flower(site, env) as url, httpx.Client() as http:
        jobs = _ask(site, fleet)
        pages = {f"flower {p}": http.get(url + p).content for p in _flower_pages(http, url)}
        health = re.findall(r"http://127\.0\.0\.1:\d+", _last_line(fleet.output, "health_served"))
        pages |= {p: http.get(health[0] + p).content for p in ("/metrics", "/healthz", "/readyz")}
        flower_log = (site.directory / "flower.log").read_bytes()

    states = {job.id: site.jobs()[job.id].state for job in jobs}
    assert {"succeeded", "failed", "cancelled"} <= set(states.values())
    _check_that_it_is_where_it_belongs(site, cache)
    searched = {
        **pages,
        "Flower's log": flower_log,
        "the workers' log": fleet.output.encode(),
        "the broker's files": _files(broker),
        "the broker's keys": _keys(broker),
        "the cache's key names": b"\n".join(_key_names(cache)),
        "errors on rows": _errors(site),
        "exceptions": "\n".join(_exceptions(site, jobs)).encode(),
    }
    assert {where for where, data in searched.items() if has_canary(data)} == set()
    _check_that_the_search_saw_something(searched, jobs)


def _ask(site: Site, fleet: Fleet) -> list[PromptJob]:
    """Successes, cache hits, failures, retries, a crash and a cancellation."""
    ask = site.client.enqueue_prompt
    first = ask(CHAT, tier="basic", metadata=METADATA, idempotency_key="k")
    first.result(20)
    jobs = [first, ask(CHAT, tier="basic", metadata=METADATA)]
    jobs += [ask(prompt, tier="basic") for prompt in (*FAULTS, CRASH, HANG)]
    hung = jobs[-1]
    eventually(lambda: site.jobs()[hung.id].state == "running", "the last one is running")
    eventually(lambda: site.provider.calls_of(CRASH) == 1, "its worker can die")
    os.kill(fleet.pid("w"), signal.SIGKILL)
    fleet.wait_until_ready(2)
    eventually(lambda: site.provider.calls_of(HANG) == 2, "it runs again")
    hung.cancel()
    eventually(lambda: site.finished(*jobs), "all are final", timeout_s=60)
    return jobs


def _last_line(output: str, event: str) -> str:
    return [line for line in output.splitlines() if event in line][-1]


def _flower_pages(http: httpx.Client, url: str) -> list[str]:
    tasks = eventually(lambda: http.get(f"{url}/api/tasks").json(), "Flower heard of tasks")
    some = [f"/api/task/info/{name}" for name in list(tasks)[:3]]
    return ["/api/tasks", "/api/workers", "/workers?json=1", "/tasks", "/metrics", *some]


def _check_that_it_is_where_it_belongs(site: Site, cache: EmbeddedValkey) -> None:
    rows = site.jobs().values()
    assert all(has_canary(orjson.dumps(row.request)) for row in rows)
    assert any(has_canary(row.answer or "") for row in rows)
    assert has_canary(_files(cache)), "no answer was cached"


def _check_that_the_search_saw_something(
    searched: Mapping[str, bytes], jobs: list[PromptJob]
) -> None:
    """Each place tells of the jobs by what it may know of them."""
    assert b'"level": "debug"' in searched["the workers' log"]
    for where in ("the broker's files", "flower /api/tasks"):
        # Flower forgets a worker's events that it did not subscribe to in time.
        assert any(form in searched[where] for job in jobs for form in _id_forms(job.id)), where
    assert b"promptfleet_" in searched["/metrics"]
    assert b"unknown_outcome" in searched["errors on rows"] or b"400" in searched["errors on rows"]
    assert b"JobFailedError" in searched["exceptions"]


def _id_forms(job: uuid.UUID) -> list[bytes]:
    return [form for text in (job.hex, str(job)) for form in _forms(text)]


def _files(server: EmbeddedValkey) -> bytes:
    """All that the server wrote, its own log included."""
    files = sorted(path for path in server.data_dir.rglob("*") if path.is_file())
    return b"\n".join(path.read_bytes() for path in files)


def _key_names(server: EmbeddedValkey) -> list[bytes]:
    with redis.Redis.from_url(server.url) as connection:
        return list(connection.scan_iter(count=1000))


def _keys(server: EmbeddedValkey) -> bytes:
    """Every key with its value, whatever its type, and the commands that it remembers."""
    with redis.Redis.from_url(server.url) as connection:
        kept: list[Any] = [connection.slowlog_get(1000)]
        readers: dict[bytes, Callable[[bytes], Any]] = {
            b"string": connection.get,
            b"list": lambda name: connection.lrange(name, 0, -1),
            b"set": connection.smembers,
            b"hash": connection.hgetall,
            b"zset": lambda name: connection.zrange(name, 0, -1),
            b"stream": connection.xrange,
        }
        for name in _key_names(server):
            kept += [name, readers[cast("bytes", connection.type(name))](name)]
    return repr(kept).encode()


def _errors(site: Site) -> bytes:
    rows = site.watch.rows(
        "SELECT j.last_error, r.error, c.last_error AS told FROM jobs j"
        " LEFT JOIN results r ON r.job_id = j.id LEFT JOIN callbacks c ON c.job_id = j.id"
    )
    return repr(rows).encode()


def _exceptions(site: Site, jobs: list[PromptJob]) -> list[str]:
    """What a producer's own log would show of everything that goes wrong for it."""
    shown = []
    ask = site.client.enqueue_prompt
    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    away = Client(Settings(database_url=SecretStr(nowhere), broker_url=SecretStr(site.broker_url)))
    wrong: list[Any] = [
        *(job.result for job in jobs),
        lambda: ask(f"{CANARY} again", tier="basic", idempotency_key="k"),
        lambda: ask([{"role": CANARY, "content": CANARY}], tier="basic"),
        lambda: ask([{"content": CANARY}], tier="basic"),
        lambda: ask([CANARY], tier="basic"),  # type: ignore[list-item]
        lambda: ask(CANARY, tier="basic", max_tokens=CANARY),  # type: ignore[arg-type]
        lambda: ask(CANARY, tier="none"),
        lambda: ask(CANARY, tier="basic", metadata={CANARY: object()}),
        lambda: away.enqueue_prompt(CANARY, tier="basic"),
    ]
    for attempt in wrong:
        try:
            attempt()
        except (PromptFleetError, TypeError) as error:
            shown.append("".join(traceback.format_exception(error)))
            shown.append(repr(error))
    away.close()
    return shown
