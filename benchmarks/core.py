"""The benchmark, run from the repository's root.

    python -m benchmarks.core [--only NAME,...] [--quick]

Starts Postgres and Valkey on data of their own and a simulated provider, measures each contestant
as `benchmarks.contest` describes, prints a table and the goals, and writes
`benchmarks/results/core.json`. Ends with 0 whether or not the goals are met: it reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks import fleet
from benchmarks.contest import GROUPS, Heat, Score, Stage, measure
from benchmarks.machine import REPOSITORY
from benchmarks.peers import contestants as peers
from benchmarks.provider import running_provider
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey

RESULTS = REPOSITORY / "benchmarks" / "results"
LOGS = RESULTS / "logs"
PROVIDER_PER_S = float(peers.CALLS_IN_FLIGHT)
"""What the provider can do at a latency of 1 s: every call in flight ends once a second."""
_QUICK_SHARE = 4


def all_heats() -> list[Heat]:
    """Every measurement, in the order of the report."""
    return [*peers.heats(), *fleet.heats()]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A ratio to reach."""

    text: str
    value: float
    at_least: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.value >= self.at_least


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    flags = _parser().parse_args(arguments)
    console = Console()
    heats = _chosen(all_heats(), only=flags.only, quick=flags.quick)
    scores = run(heats, console)
    best = fastest(scores, "0")
    saturated = fastest(scores, "1000")
    console.print(_table(scores))
    goals = reached(best, saturated)
    for goal in goals:
        console.print(_line(goal))
    overhead = None if flags.quick or flags.only else measure_overhead(console)
    path = write_report(best, saturated, goals, quick=flags.quick, overhead=overhead)
    console.print(f"Written to {path.relative_to(REPOSITORY)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    names = sorted({heat.contestant.name for heat in all_heats()})
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help=f"contestants, separated by commas: {', '.join(names)}",
    )
    parser.add_argument("--quick", action="store_true", help="smaller backlogs, noisier numbers")
    return parser


def _chosen(heats: Iterable[Heat], *, only: list[str] | None, quick: bool) -> list[Heat]:
    chosen = [heat for heat in heats if only is None or heat.contestant.name in only]
    return [_shorter(heat) for heat in chosen] if quick else chosen


def _shorter(heat: Heat) -> Heat:
    """About a quarter of it, in whole waves where calls take long (see `Heat.warm_up`)."""
    measured = (heat.prompts - heat.warm_up) // _QUICK_SHARE
    if heat.latency_ms == "0":
        warm_up = heat.warm_up // _QUICK_SHARE
    else:
        warm_up = heat.warm_up
        measured = max(measured // warm_up, 1) * warm_up
    return dataclasses.replace(heat, warm_up=warm_up, prompts=warm_up + measured)


def run(heats: Sequence[Heat], console: Console) -> list[Score]:
    """Measure one after the other; heats of the same latency share the provider's process."""
    scores: list[Score] = []
    with servers(console) as (postgres, valkey):
        for latency_ms, group in itertools.groupby(
            sorted(heats, key=lambda heat: float(heat.latency_ms)), lambda heat: heat.latency_ms
        ):
            with stage_at(latency_ms, postgres, valkey) as stage:
                for heat in group:
                    scores.append(measure(heat, stage))
                    console.print(_progress(scores[-1]))
    return scores


def measure_overhead(console: Console) -> dict[str, float]:
    """With latencies spread from 0.1 to 10 s: what a prompt waits beyond its own call."""
    heat = fleet.spread_heat()
    with servers(console) as (postgres, valkey), stage_at(heat.latency_ms, postgres, valkey) as s:
        measure(heat, s)
        overhead = fleet.overhead_ms(s)
    console.print(
        f"Latencies of {heat.latency_ms} ms: from claim to result a prompt waits beyond its own "
        f"call {overhead['p50']:.0f} ms (p50), {overhead['p95']:.0f} ms (p95), "
        f"{overhead['max']:.0f} ms (max)"
    )
    return overhead


@contextmanager
def servers(console: Console) -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    """Durable servers on the repository's own disk: a temporary directory may be in memory."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="servers-", dir=RESULTS) as name:
        directory = Path(name)
        postgres = EmbeddedPostgres(directory / "postgres")
        with postgres, EmbeddedValkey(directory / "valkey") as valkey:
            console.print(f"Postgres and Valkey run on {directory.relative_to(REPOSITORY)}")
            yield postgres, valkey


@contextmanager
def stage_at(
    latency_ms: str, postgres: EmbeddedPostgres, valkey: EmbeddedValkey
) -> Iterator[Stage]:
    """The stage with a provider of this latency; its logs stay after the run."""
    LOGS.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(postgres.url)
    assert postgres.pid is not None
    assert valkey.pid is not None
    with running_provider(latency_ms, LOGS) as provider:
        yield Stage(
            engine=engine,
            database_url=postgres.url,
            broker_url=valkey.url,
            provider_url=provider.url,
            directory=LOGS,
            pids={
                "postgres": postgres.pid,
                "valkey": valkey.pid,
                "provider": provider.process.pid,
            },
        )
    engine.dispose()


def _progress(score: Score) -> str:
    return (
        f"  {score.name} ({score.variant}), provider {score.latency_ms} ms: "
        f"{score.prompts_per_s:,.0f} prompts/s"
    )


def fastest(scores: Iterable[Score], latency_ms: str) -> dict[str, Score]:
    """The best variant of each contestant at one latency."""
    best: dict[str, Score] = {}
    for score in scores:
        known = best.get(score.name)
        if score.latency_ms == latency_ms and (
            known is None or score.prompts_per_s > known.prompts_per_s
        ):
            best[score.name] = score
    return best


def reached(best: Mapping[str, Score], saturated: Mapping[str, Score]) -> list[Goal]:
    """The goals whose numbers were measured in this run."""
    peers_rates = {
        "hand-rolled Celery in one process": (
            _best_rate(best, "hand_rolled_threads", "hand_rolled_gevent"),
            10.0,
        ),
        "hand-rolled prefork on both cores": (_best_rate(best, "hand_rolled_prefork"), 6.0),
        "the bare loop": (_best_rate(best, "bare_loop"), 0.6),
    }
    goals = [
        Goal(text=f"{name} / {peer}", value=best[name].prompts_per_s / rate, at_least=at_least)
        for name in ("fleet", "fleet_single_enqueue")
        for peer, (rate, at_least) in peers_rates.items()
        if name in best and rate
    ]
    if "fleet" in saturated:
        share = saturated["fleet"].prompts_per_s / PROVIDER_PER_S
        goals.append(Goal(text="fleet / the provider's 500/s", value=share, at_least=0.95))
    return goals


def _best_rate(best: Mapping[str, Score], *names: str) -> float:
    """0 if none of them was measured."""
    return max((best[name].prompts_per_s for name in names if name in best), default=0.0)


def _line(goal: Goal) -> str:
    mark = "[green]met[/]" if goal.met else "[red]missed[/]"
    return f"{mark}  {goal.text}: {goal.value:.2f} (goal {goal.at_least:g})"


def _table(scores: Sequence[Score]) -> Table:
    best = [*fastest(scores, "0").values(), *fastest(scores, "1000").values()]
    table = Table(
        title=f"{os.cpu_count()} cores, Python {platform.python_version()}",
        caption="latency in ms; µs of CPU a prompt, by process; other load in cores",
    )
    table.add_column("contestant")
    table.add_column("set up")
    for title in ("latency", "prompts/s", *GROUPS, "other load"):
        table.add_column(title, justify="right")
    for score in scores:
        cpu = [f"{score.cpu_us_per_prompt[group]:,.0f}" for group in GROUPS]
        table.add_row(
            score.name,
            score.variant,
            score.latency_ms,
            f"{score.prompts_per_s:,.0f}",
            *cpu,
            f"{score.foreign_cores:.2f}",
            style="bold" if score in best else "dim",
        )
    return table


def write_report(
    best: Mapping[str, Score],
    saturated: Mapping[str, Score],
    goals: Sequence[Goal],
    *,
    quick: bool,
    overhead: Mapping[str, float] | None,
) -> Path:
    """Write `core.json`; what was not measured in this run is not in it, or null."""
    shares = {name: score.prompts_per_s / PROVIDER_PER_S for name, score in saturated.items()}
    report = {
        "prompts_per_s": {name: round(score.prompts_per_s, 1) for name, score in best.items()},
        "cpu_us_per_prompt": {
            name: {
                group: round(score.cpu_us_per_prompt[group], 1) for group in ("worker", "postgres")
            }
            for name, score in best.items()
        },
        "saturation": shares.get("fleet"),
        "saturation_by_contestant": shares,
        "overhead_ms_at_100_to_10000_ms": overhead,
        "foreign_cores": {name: round(score.foreign_cores, 2) for name, score in best.items()},
        "variants": {name: score.variant for name, score in best.items()},
        "goals": [{**dataclasses.asdict(goal), "met": goal.met} for goal in goals],
        "quick": quick,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    path = RESULTS / "core.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
