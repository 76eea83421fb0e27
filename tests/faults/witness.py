"""Watches a run from outside: rows that must not change, and places that must not know prompts."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import orjson
import redis
from sqlalchemy.exc import DBAPIError
from tests.faults.world import KEY_BOUND, TENANT_BOUND, World

from promptfleet_shared.queueing import PARKED_KEY
from promptfleet_workers.caching.keys import KEY_PREFIX

LOOK_EVERY_S = 1.0
_BASE64 = re.compile(rb'"body": ?"([A-Za-z0-9+/=]+)"')
_HEALTH_URL = re.compile(r'health_served.*?"url": "(http[^"]+)"')

# A row's own version, too: an update that changes nothing is one.
_FINAL_ROWS = """
SELECT job_id, 'result ' || results.xmin || ' ' || md5(results::text) AS digest FROM results
 WHERE finished_at > clock_timestamp() - :age_s * interval '1 second'
UNION ALL
SELECT id, 'job ' || jobs.xmin || ' ' || md5(jobs::text) FROM jobs
 WHERE finished_at > clock_timestamp() - :age_s * interval '1 second'
"""
_EVER_S = 1e8
_IN_FLIGHT = """
SELECT concurrency_key, count(*) FROM jobs
 WHERE finished_at IS NULL AND state = 'running' AND lease_until > clock_timestamp()
   AND tenant = 'bounded' GROUP BY concurrency_key
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """A row that is not what it was when it was final."""

    job_id: uuid.UUID
    before: str
    after: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exceeded:
    """More jobs of a tenant, or of one of its keys, were running than may; by `time.monotonic`."""

    at: float
    of: str
    running: int
    bound: int


class Witness:
    """Looks every second or so, whatever is being broken meanwhile."""

    def __init__(self, world: World, canaries: Iterable[str]) -> None:
        """Look at nothing yet.

        Args:
            world: What to watch.
            canaries: What must be nowhere but in Postgres and the response cache.
        """
        self._world = world
        self._canaries = [canary.encode() for canary in canaries]
        self._seen: dict[tuple[uuid.UUID, str], str] = {}
        self.changed: list[Changed] = []
        self.leaks: set[str] = set()
        self.events = 0
        self.keys = 0
        self.looks = 0
        self.exceeded: list[Exceeded] = []
        self.most_in_flight = (0, 0)
        self.most_parked = 0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, name="witness", daemon=True),
            threading.Thread(target=self._listen, name="eavesdropper", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look once more, at everything."""
        self._over.set()
        for thread in self._threads:
            thread.join(30)
        self.look_at_rows(age_s=_EVER_S)
        self.look_at_valkey()
        self._look_at_logs()
        self._look_at_metrics()

    # -- rows --------------------------------------------------------------------------------

    def look_at_rows(self, *, age_s: float = 15.0) -> None:
        """Hold final rows against what they were."""
        rows = self._world.rows(_FINAL_ROWS, age_s=age_s)
        self.looks += 1
        for job_id, digest in rows:
            table = digest.split(" ", 1)[0]
            before = self._seen.setdefault((job_id, table), digest)
            if before != digest:
                self.changed.append(Changed(job_id=job_id, before=before, after=digest))
        if age_s == _EVER_S:
            there = {(job_id, digest.split(" ", 1)[0]) for job_id, digest in rows}
            for gone in self._seen.keys() - there:
                self.changed.append(
                    Changed(job_id=gone[0], before=self._seen[gone], after="it is gone")
                )

    def look_at_bounds(self) -> None:
        """Count what runs of the tenant whose jobs are bounded."""
        running: dict[str | None, int] = dict(map(tuple, self._world.rows(_IN_FLIGHT)))
        total = sum(running.values())
        most = max([count for key, count in running.items() if key is not None], default=0)
        self.most_in_flight = (
            max(self.most_in_flight[0], most),
            max(self.most_in_flight[1], total),
        )
        for of, count, bound in (("a key", most, KEY_BOUND), ("the tenant", total, TENANT_BOUND)):
            if count > bound:
                now = time.monotonic()
                self.exceeded.append(Exceeded(at=now, of=of, running=count, bound=bound))

    def parked(self) -> int:
        """How many doorbells wait for their turns."""
        with self._world.redis() as client:
            count = parked(client)
        self.most_parked = max(self.most_parked, count)
        return count

    # -- leaks -------------------------------------------------------------------------------

    def look_at_valkey(self) -> None:
        """Search every key but those of the response cache."""
        with self._world.redis() as client:
            for key in client.scan_iter(count=500):
                if key.startswith(KEY_PREFIX.encode()):
                    continue
                self.keys += 1
                for value in _values(client, key):
                    self.search(f"Valkey, key {key!r}", value)

    def search(self, where: str, data: bytes) -> None:
        """Take note of a canary in the data, or in what they carry as base64."""
        for text in (data, *_carried(data)):
            if any(canary in text for canary in self._canaries):
                self.leaks.add(where)

    def _look_at_logs(self) -> None:
        world = self._world
        paths = [world.postgres.log_path, world.valkey.log_path]
        paths += [path for path in world.directory.glob("*.log") if path.name != "provider.log"]
        for path in paths:
            self.search(f"the log {path.name}", path.read_bytes())

    def _look_at_metrics(self) -> None:
        for url in set(_HEALTH_URL.findall(self._world.output)):
            for page in ("metrics", "healthz", "readyz"):
                try:
                    said = httpx.get(f"{url.rstrip('/')}/{page}", timeout=5)
                except httpx.HTTPError:  # of a worker that has ended since
                    continue
                self.search(f"the page {page} of a worker", said.content)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            try:
                self.look_at_bounds()
                self.parked()
                self.look_at_rows()
                self.look_at_valkey()
            except (DBAPIError, redis.RedisError):
                pass  # it is being broken

    def _listen(self) -> None:
        """Hear every message that Flower could hear."""
        while not self._over.is_set():
            try:
                with self._world.redis() as client, client.pubsub() as channel:
                    channel.psubscribe("*")
                    self._hear(channel)
            except redis.RedisError:
                time.sleep(0.1)

    def _hear(self, channel: Any) -> None:
        while not self._over.is_set():
            message = channel.get_message(timeout=0.5)
            if message is not None and message["type"] == "pmessage":
                self.events += 1
                self.search(f"a message on {message['channel']!r}", message["data"])


def parked(client: Any) -> int:
    """How many doorbells wait for their turns: as their counters say, and as they are there."""
    counters = list(client.scan_iter(match=PARKED_KEY % "*", count=500))
    places = list(client.scan_iter(match="promptfleet:fair:*:b:q:*", count=500))
    counted: int = sum(int(value or 0) for value in client.mget(counters)) if counters else 0
    there: int = sum(client.zcard(place) for place in places)
    return max(counted, there)


def _values(client: Any, key: bytes) -> Iterator[bytes]:
    kind = client.type(key)
    if kind == b"string":
        yield client.get(key) or b""
    elif kind == b"list":
        yield from client.lrange(key, 0, -1)
    elif kind == b"set":
        yield from client.smembers(key)
    elif kind == b"hash":
        for field, value in client.hgetall(key).items():
            yield field + b" " + value
    elif kind == b"zset":
        yield from client.zrange(key, 0, -1)
    elif kind == b"stream":
        yield orjson.dumps([[repr(entry)] for entry in client.xrange(key)])


def _carried(data: bytes) -> Iterator[bytes]:
    """The bodies of Celery's messages, which are base64 in JSON."""
    for body in _BASE64.findall(data):
        try:
            yield base64.b64decode(body)
        except (ValueError, binascii.Error):
            continue
