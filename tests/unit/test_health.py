"""Vitals by a clock of their own, and the pages that show them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx
import pytest

from promptfleet_shared.errors import BrokerUnavailableError, ConfigurationError
from promptfleet_workers.health import HealthServer, Phase, Vitals
from promptfleet_workers.queues import QueueWatch


@dataclasses.dataclass(slots=True)
class Server:
    last_commit: float = 0.0
    answered_at: float = 0.0


class Scene:
    """A worker that became ready at second 1000."""

    def __init__(self, *, stale_s: float = 60.0, sweep_interval_s: float = 1.0) -> None:
        self.now = 1000.0
        self.pool, self.beats, self.broker = Server(), Server(), Server()
        self.vitals = Vitals(
            databases=[self.pool, self.beats],
            broker=self.broker,
            tiers=["basic"],
            stale_s=stale_s,
            sweep_interval_s=sweep_interval_s,
            clock=lambda: self.now,
        )

    def all_well(self) -> None:
        self.vitals.phase = Phase.SERVING
        self.pool.last_commit = self.broker.answered_at = self.vitals.looked_at = self.now


@pytest.fixture
def scene() -> Scene:
    return Scene()


class TestVitals:
    def test_a_new_worker_lives_but_is_not_ready(self, scene: Scene) -> None:
        assert scene.vitals.alive
        assert "the worker is starting" in scene.vitals.obstacles()

    def test_it_lives_while_it_commits(self, scene: Scene) -> None:
        scene.now += 61
        assert not scene.vitals.alive
        scene.beats.last_commit = scene.now - 5
        assert scene.vitals.alive
        assert scene.vitals.commit_age_s == 5

    def test_slow_sweeps_do_not_make_an_idle_worker_ill(self) -> None:
        scene = Scene(stale_s=60, sweep_interval_s=30)
        scene.now += 100
        assert scene.vitals.alive

    def test_it_is_ready_when_all_are_heard_of(self, scene: Scene) -> None:
        scene.all_well()
        assert scene.vitals.obstacles() == []

    @pytest.mark.parametrize(
        ("what", "reason"),
        [
            ("pool", "the database has taken nothing for 11 s"),
            ("broker", "the broker has not answered within 10 s"),
            ("consumer", "nobody has looked at the queues within 10 s"),
            ("drain", "the worker is draining"),
        ],
    )
    def test_each_obstacle_is_told(self, scene: Scene, what: str, reason: str) -> None:
        scene.all_well()
        scene.now += 11
        then = scene.now - 11
        scene.all_well()
        match what:
            case "pool":
                scene.pool.last_commit = then
            case "broker":
                scene.broker.answered_at = then
            case "consumer":
                scene.vitals.looked_at = then
            case _:
                scene.vitals.phase = Phase.DRAINING
        assert scene.vitals.obstacles() == [reason]


@pytest.fixture
async def url(scene: Scene) -> AsyncIterator[str]:
    async def ask_broker() -> None:
        if scene.broker.last_commit:  # the test's sign that it answers
            scene.broker.answered_at = scene.now

    server = HealthServer(
        scene.vitals,
        host="127.0.0.1",
        port=0,
        metrics=lambda accept: (f"asked for {accept}".encode(), "text/plain; version=0.0.4"),
        ask_broker=ask_broker,
    )
    yield await server.start()
    await server.stop()


class TestServer:
    async def test_health_is_the_age_of_the_last_commit(self, scene: Scene, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            scene.pool.last_commit = 990.0
            response = await client.get("/healthz")
            assert response.status_code == 200
            assert response.json() == {"status": "alive", "last_commit_age_s": 0.0}

            scene.now += 61
            response = await client.get("/healthz")
            assert response.status_code == 503
            assert response.json() == {"status": "stale", "last_commit_age_s": 61.0}

    async def test_readiness_tells_its_reasons(self, scene: Scene, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            scene.all_well()
            response = await client.get("/readyz")
            assert response.status_code == 200
            assert response.json() == {"status": "ready", "reasons": [], "tiers": ["basic"]}

            scene.vitals.phase = Phase.DRAINING
            response = await client.get("/readyz")
            assert response.status_code == 503
            assert response.json()["reasons"] == ["the worker is draining"]

    async def test_a_broker_that_nobody_asked_lately_is_asked(self, scene: Scene, url: str) -> None:
        scene.all_well()
        scene.broker.answered_at = 0.0
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/readyz")).status_code == 503
            scene.broker.last_commit = 1.0
            assert (await client.get("/readyz")).status_code == 200

    async def test_metrics_come_as_they_are_asked_for(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            response = await client.get("/metrics", headers={"Accept": "text/plain"})
        assert response.text == "asked for text/plain"
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4"

    async def test_a_port_that_is_taken_is_a_wrong_setting(self, scene: Scene, url: str) -> None:
        second = HealthServer(
            scene.vitals,
            host="127.0.0.1",
            port=int(url.rpartition(":")[2]),
            metrics=lambda _: (b"", ""),
            ask_broker=lambda: None,  # type: ignore[arg-type,return-value]
        )
        with pytest.raises(ConfigurationError, match="PROMPTFLEET_HEALTH_PORT"):
            await second.start()


class TestQueueWatch:
    async def test_an_answer_is_remembered(self) -> None:
        def depths(tiers: Sequence[str]) -> Mapping[str, int]:
            return {tier: len(tier) - 1 for tier in tiers}

        watch = QueueWatch(depths, clock=lambda: 7.0)
        assert watch.answered_at == 0
        assert await watch.empty(["a", "bc"]) == ["a"]
        assert watch.answered_at == 7

    async def test_a_lost_broker_has_no_empty_queues(self) -> None:
        def depths(_: Sequence[str]) -> Mapping[str, int]:
            raise BrokerUnavailableError

        watch = QueueWatch(depths)
        assert await watch.empty(["a"]) == []
        assert watch.answered_at == 0
        with pytest.raises(BrokerUnavailableError):
            watch.look(["a"])
