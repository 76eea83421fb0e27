"""`promptfleet doctor`: is everything there and as it must be, and what to do where it is not."""

from __future__ import annotations

import dataclasses
import datetime as dt
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any

import orjson
import typer

from promptfleet.cli.environment import (
    DEFAULT_DATA_DIR,
    DataDir,
    find_settings,
    flower_url,
    without_password,
)
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.reports import store_connection
from promptfleet.cli.terminal import JsonFlag, out, print_json
from promptfleet.unpriced import unpriced
from promptfleet_shared.errors import BrokerUnavailableError, ConfigurationError, PromptFleetError
from promptfleet_shared.fleet import Deployment, Fleet, Model, load_fleet
from promptfleet_shared.settings import Settings
from promptfleet_shared.signing import split_secrets
from promptfleet_shared.tiers import queue_name

TIMEOUT_S = 5.0
MAX_CLOCK_DIFFERENCE_S = 2.0
_ASK_WORKERS_S = 1.5
_WIDTH = 27
_MAX_ANSWER_BYTES = 4_000_000
_UNAUTHORISED = frozenset({401, 403})


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found, and what to do about it."""

    check: str
    level: Level
    text: str
    advice: str = ""


def doctor(*, as_json: JsonFlag = False, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Check database, broker, providers, workers, Flower and clocks; exit 1 on a failure."""
    findings: list[Finding] = []
    for finding in examine(find_settings(data_dir), flower=flower_url(data_dir)):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


def examine(settings: Settings, *, flower: str) -> Iterator[Finding]:
    """All checks, in the order in which a prompt would meet what they look at."""
    try:
        fleet = load_fleet(settings.config_path)
    except ConfigurationError as error:
        yield _fail("fleet.toml", error.message, "promptfleet config check tells every mistake")
        fleet = Fleet()
    else:
        yield _config(settings, fleet)
        yield from _budgets(fleet)
    yield from _database(settings)
    yield from _broker(settings)
    yield from _workers(settings, fleet)
    yield from _providers(fleet)
    yield _flower(flower)


def _config(settings: Settings, fleet: Fleet) -> Finding:
    if not fleet.models:
        place = settings.config_path or "there is no fleet.toml, and it"
        return _warn(
            "fleet.toml",
            f"{place} names no models",
            "workers need one: set PROMPTFLEET_CONFIG or write ./fleet.toml",
        )
    return _ok("fleet.toml", f"{settings.config_path}: {', '.join(fleet.tier_names)}")


def _budgets(fleet: Fleet) -> Iterator[Finding]:
    """Nothing where there are none."""
    gaps = unpriced(fleet)
    for gap in gaps:
        yield _warn("budgets", gap.text, gap.advice)
    if fleet.budgets and not gaps:
        yield _ok("budgets", ", ".join(budget.name for budget in fleet.budgets))


def _database(settings: Settings) -> Iterator[Finding]:
    shown = without_password(settings.database_url.get_secret_value())
    try:
        with store_connection(settings) as connection:
            yield _ok("database", f"{shown} answers")
            yield _clock(connection)
            yield from _schema(connection, settings)
    except PromptFleetError as error:
        yield _fail(
            "database",
            f"{shown}: {error.message}",
            "start Postgres (promptfleet dev), or correct PROMPTFLEET_DATABASE_URL",
        )


def _clock(connection: Any) -> Finding:
    from promptfleet_shared.store.status import database_clock  # noqa: PLC0415  # slow

    before = dt.datetime.now(dt.UTC)
    theirs = database_clock(connection)
    after = dt.datetime.now(dt.UTC)
    difference_s = (theirs - (before + (after - before) / 2)).total_seconds()
    text = f"the database's clock is {abs(difference_s):.2f} s"
    text += " behind ours" if difference_s < 0 else " ahead of ours"
    if abs(difference_s) > MAX_CLOCK_DIFFERENCE_S:
        return _warn("clocks", text, "only deadlines given as instants suffer; let NTP run on both")
    return _ok("clocks", text)


def _schema(connection: Any, settings: Settings) -> Iterator[Finding]:
    from promptfleet_shared.store.migrating import schema_version  # noqa: PLC0415  # slow
    from promptfleet_shared.store.status import overdue_jobs  # noqa: PLC0415  # slow

    version = schema_version(connection)
    if not version.is_current:
        at = version.current or "nothing"
        yield _fail("schema", f"at {at}, not {version.newest}", "run: promptfleet migrate")
        return
    yield _ok("schema", f"at {version.current}, the newest")
    yield _wall(connection)
    overdue = overdue_jobs(connection)
    if overdue:
        advice = "no worker's sweeper runs: start a worker"
        yield _warn("deadlines", f"{overdue:,} jobs are past their deadline", advice)
    else:
        yield _ok("deadlines", "no job is past its deadline")
    yield _callbacks(connection, settings)


def _wall(connection: Any) -> Finding:
    from promptfleet_shared.store.row_security import inspect_wall  # noqa: PLC0415  # slow

    gap = inspect_wall(connection).gap
    if gap is None:
        return _ok("tenants", "row-level security is forced on every table")
    advice = "statements alone keep tenants apart; run promptfleet migrate as one who may do more"
    return _warn("tenants", gap, advice)


def _callbacks(connection: Any, settings: Settings) -> Finding:
    from promptfleet_shared.store.callbacks import callback_counts  # noqa: PLC0415  # slow

    try:
        secrets = split_secrets(settings.callback_secrets.get_secret_value())
    except ConfigurationError as error:
        return _fail("callbacks", error.message, "correct PROMPTFLEET_CALLBACK_SECRETS")
    counts = callback_counts(connection)
    if not secrets and counts.pending:
        text = f"{counts.pending:,} callbacks wait for a secret to be signed with"
        advice = "set PROMPTFLEET_CALLBACK_SECRETS, for the workers as well"
        return _fail("callbacks", text, advice)
    if counts.exhausted or counts.disabled:
        text = f"given up: {counts.exhausted:,}; disabled endpoints: {counts.disabled:,}"
        return _warn("callbacks", text, "see: promptfleet callbacks list --state exhausted")
    if not secrets:
        return _ok("callbacks", "none wait; there is no secret to sign them with")
    return _ok("callbacks", f"{counts.pending:,} wait, none was given up")


def _broker(settings: Settings) -> Iterator[Finding]:
    import redis  # noqa: PLC0415  # slow to import

    url = settings.broker_url.get_secret_value()
    shown = without_password(url)
    advice = "start Valkey (promptfleet dev), or correct PROMPTFLEET_BROKER_URL"
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
        )
        with client:
            facts: Mapping[str, Any] = client.info()
            snapshots = _snapshots(client)
    except (redis.RedisError, ValueError, OSError) as error:
        yield _fail("broker", f"{shown}: {error}", advice)
        return
    server = "valkey" if "valkey_version" in facts else "redis"
    version = facts.get("valkey_version") or facts.get("redis_version")
    yield _ok("broker", f"{shown} is {server} {version}")
    yield _policy(facts.get("maxmemory_policy"))
    if facts.get("aof_enabled") or snapshots:
        yield _ok("persistence", "append-only file" if facts.get("aof_enabled") else "snapshots")
    else:
        yield _warn(
            "persistence",
            "the broker keeps nothing on disk",
            "no job is lost by that, but a restart costs seconds: set appendonly yes",
        )


def _policy(policy: str | None) -> Finding:
    from promptfleet_shared.queueing import (  # noqa: PLC0415  # slow to import
        EVICTION_CURE,
        KEEPS_ALL,
        eviction_problem,
    )

    if policy is None:
        advice = f"make sure that it is {KEEPS_ALL}"
        return _warn("memory", "the broker does not tell its maxmemory-policy", advice)
    problem = eviction_problem(policy)
    if problem is not None:
        return _fail("memory", f"{problem}; no worker starts on it", EVICTION_CURE)
    return _ok("memory", f"maxmemory-policy is {policy}")


def _snapshots(client: Any) -> bool:
    """Whether the server saves snapshots; managed ones don't tell, and do."""
    import redis  # noqa: PLC0415  # slow to import

    try:
        return bool(client.config_get("save").get("save"))
    except redis.ResponseError:
        return True


def _workers(settings: Settings, fleet: Fleet) -> Iterator[Finding]:
    from promptfleet.broker import Broker  # noqa: PLC0415  # slow

    try:
        with Broker(settings.broker_url.get_secret_value(), fleet.tier_names) as broker:
            workers = broker.workers(timeout_s=_ASK_WORKERS_S)
    except BrokerUnavailableError:  # the broker's own check has told
        return
    for tier in fleet.tier_names:
        names = sorted(name for name, tiers in workers.items() if tier in tiers)
        if names:
            yield _ok(f"worker {tier}", ", ".join(names))
        else:
            advice = f"run: promptfleet worker --tier {tier}"
            yield _fail(f"worker {tier}", f"no worker consumes {queue_name(tier)}", advice)


def _providers(fleet: Fleet) -> Iterator[Finding]:
    places = [(model, place) for model in fleet.models.values() for place in model.deployments]
    if not places:
        return
    with ThreadPoolExecutor(max_workers=min(8, len(places))) as pool:
        yield from pool.map(lambda pair: _provider(*pair), places)


def _provider(model: Model, deployment: Deployment) -> Finding:  # noqa: ARG001
    check = f"provider {deployment.name}"
    if deployment.api_key_env and deployment.secret() is None:
        advice = "export it, for the workers as well"
        return _fail(check, f"the environment has no {deployment.api_key_env}", advice)
    url = deployment.base_url.rstrip("/") + "/models"
    try:
        answer = _get(url, _headers(deployment))
    except urllib.error.HTTPError as error:
        if error.code in _UNAUTHORISED:
            return _fail(check, f"{url} answers {error.code}", "correct its API key")
        return _ok(check, f"{deployment.base_url} is reachable (no list of models: {error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return _fail(check, f"{url}: {reason}", "start it, or correct its base_url")
    return _model_there(check, deployment, answer)


def _model_there(check: str, deployment: Deployment, answer: bytes) -> Finding:
    try:
        known = {item["id"] for item in orjson.loads(answer)["data"]}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        known = set()
    if deployment.model and known and deployment.model not in known:
        text = f"{deployment.base_url} has no model {deployment.model}"
        return _warn(check, text, f"it has: {', '.join(sorted(known)[:5])}")
    return _ok(check, f"{deployment.base_url} is reachable")


def _headers(deployment: Deployment) -> dict[str, str]:
    headers = {"User-Agent": "promptfleet-doctor", **deployment.headers}
    key = deployment.secret()
    if key and deployment.provider == "anthropic":
        headers |= {"x-api-key": key, "anthropic-version": "2023-06-01"}
    elif key and deployment.provider == "gemini":
        headers["x-goog-api-key"] = key
    elif key:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _flower(url: str) -> Finding:
    try:
        _get(f"{url.rstrip('/')}/healthcheck", {})
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        advice = "not needed to work; set PROMPTFLEET_FLOWER_URL if it runs elsewhere"
        return _warn("Flower", f"{without_password(url)}: {reason}", advice)
    return _ok("Flower", f"{without_password(url)} answers")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to somewhere else."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        """Follow none."""


def _get(url: str, headers: Mapping[str, str]) -> bytes:
    # Directly, as the workers do: a proxy of the environment is not theirs.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310  # http(s) by check
    with opener.open(request, timeout=TIMEOUT_S) as response:
        return bytes(response.read(_MAX_ANSWER_BYTES))


def _finding(level: Level) -> Callable[..., Finding]:
    def make(check: str, text: str, advice: str = "") -> Finding:
        return Finding(check=check, level=level, text=text, advice=advice)

    return make


_ok, _warn, _fail = _finding(Level.OK), _finding(Level.WARN), _finding(Level.FAIL)

_MARKS = {
    Level.OK: "[green]✓ ok  [/]",
    Level.WARN: "[yellow]! warn[/]",
    Level.FAIL: "[red]✗ fail[/]",
}


def _print(finding: Finding) -> None:
    console = out()
    console.print(f"{_MARKS[finding.level]} [bold]{finding.check:<{_WIDTH}}[/] ", end="")
    console.print(finding.text, markup=False, soft_wrap=True)
    if finding.advice:
        console.print(f"{'':7}{'':{_WIDTH}} → {finding.advice}", markup=False, soft_wrap=True)
