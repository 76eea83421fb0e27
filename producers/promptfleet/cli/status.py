"""`promptfleet status`: queues, states and rates."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.reports import store_connection, summary_record, summary_table
from promptfleet.cli.terminal import JsonFlag, out, print_json, table
from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.jobs import JobState
from promptfleet_shared.settings import Settings

if TYPE_CHECKING:
    from promptfleet_shared.store.status import TierSummary

_OPEN = (JobState.QUEUED, JobState.RUNNING, JobState.SUBMITTED)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The fleet at one moment.

    Attributes:
        doorbells: Messages in each tier's queue; None while the broker can't be reached.
        parked: Jobs of all tenants that wait for their turn before each tier's queue; the same.
        states: Jobs that are not final: tier → state → how many.
        finished: What finished within the last `span_s` seconds.
    """

    tiers: tuple[str, ...]
    doorbells: Mapping[str, int] | None
    parked: Mapping[str, int] | None
    states: Mapping[str, Mapping[str, int]]
    overdue: int
    finished: tuple[TierSummary, ...]
    span_s: float


def status(
    *,
    minutes: Annotated[float, typer.Option(min=0.1, help="Of which the rates tell.")] = 5.0,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between looks.")] = 2.0,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show queues by tier, the states of open jobs, and what finished lately."""
    settings = find_settings(data_dir)
    span_s = minutes * 60
    if not watch:
        snapshot = look(settings, span_s=span_s)
        if as_json:
            print_json(as_record(snapshot))
        else:
            out().print(render(snapshot))
        return
    with Live(console=out(), auto_refresh=False, screen=out().is_terminal) as live:
        while True:
            live.update(render(look(settings, span_s=span_s)), refresh=True)
            time.sleep(every)


def look(settings: Settings, *, span_s: float) -> Snapshot:
    """Ask database and broker.

    Raises:
        StoreUnavailableError: The database can't be reached; the broker may be down.
    """
    from promptfleet_shared.store.status import (  # noqa: PLC0415  # slow to import
        open_jobs,
        overdue_jobs,
        tier_summaries,
    )

    since = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=span_s)
    with store_connection(settings) as connection:
        states = open_jobs(connection, tenant=settings.tenant)
        finished = tier_summaries(connection, tenant=settings.tenant, since=since)
        overdue = overdue_jobs(connection)
    tiers = load_fleet(settings.config_path).tier_names
    others = sorted((states.keys() | {row.tier for row in finished}) - set(tiers))
    doorbells, parked = _waiting(settings, tiers)
    return Snapshot(
        tiers=(*tiers, *others),
        doorbells=doorbells,
        parked=parked,
        states=states,
        overdue=overdue,
        finished=tuple(finished),
        span_s=span_s,
    )


def render(snapshot: Snapshot) -> Group:
    """The snapshot as tables."""
    now = table("tier", "doorbells", "parked", *_OPEN, "per s", title="now")
    finished = {summary.tier: summary for summary in snapshot.finished}
    for tier in snapshot.tiers:
        waiting = (_count(counts, tier) for counts in (snapshot.doorbells, snapshot.parked))
        counts = snapshot.states.get(tier, {})
        done = finished[tier].jobs if tier in finished else 0
        states = [f"{counts.get(state, 0):,}" for state in _OPEN]
        now.add_row(tier, *waiting, *states, f"{done / snapshot.span_s:.2f}")
    parts: list[Any] = [now, Text()]
    if snapshot.finished:
        title = f"finished in the last {snapshot.span_s / 60:g} min"
        parts.append(summary_table(snapshot.finished, title=title))
    else:
        parts.append(Text(f"nothing finished in the last {snapshot.span_s / 60:g} min", "dim"))
    if snapshot.doorbells is None:
        parts.append(Text("the broker can't be reached: see promptfleet doctor", "yellow"))
    if snapshot.overdue:
        warning = f"{snapshot.overdue:,} jobs are past their deadline: does a worker run?"
        parts.append(Text(warning, "yellow"))
    return Group(*parts)


def as_record(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as JSON shows it."""
    finished = {summary.tier: summary for summary in snapshot.finished}
    tiers = {}
    for tier in snapshot.tiers:
        counts = snapshot.states.get(tier, {})
        done = finished.get(tier)
        tiers[tier] = {
            "doorbells": None if snapshot.doorbells is None else snapshot.doorbells.get(tier, 0),
            "parked": None if snapshot.parked is None else snapshot.parked.get(tier, 0),
            "open": {str(state): counts.get(state, 0) for state in _OPEN},
            "per_s": round(done.jobs / snapshot.span_s, 3) if done else 0.0,
            "finished": summary_record(done) if done else None,
        }
    return {"tiers": tiers, "overdue": snapshot.overdue, "span_s": snapshot.span_s}


def _count(counts: Mapping[str, int] | None, tier: str) -> str:
    return "?" if counts is None else f"{counts.get(tier, 0):,}"


def _waiting(
    settings: Settings, tiers: tuple[str, ...]
) -> tuple[Mapping[str, int] | None, Mapping[str, int] | None]:
    """Doorbells in the queues and jobs parked before them; None and None without a broker."""
    from promptfleet.broker import Broker  # noqa: PLC0415  # slow

    try:
        with Broker(settings.broker_url.get_secret_value(), tiers) as broker:
            return broker.doorbells(), broker.parked()
    except BrokerUnavailableError:
        return None, None
