"""`promptfleet demo`: the whole fleet, real prompts, and what became of them."""

from __future__ import annotations

import contextlib
import datetime as dt
import shutil
import tempfile
import textwrap
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from promptfleet import local_model
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.jobs import as_record
from promptfleet.cli.reports import store_connection, summary_record, summary_table
from promptfleet.cli.servers import require_workers
from promptfleet.cli.terminal import JsonFlag, err, out, print_json
from promptfleet.dev_stack.local_fleet import LocalProvider
from promptfleet.dev_stack.stack import DevStack, StackOptions
from promptfleet.requests import Prompt
from promptfleet_shared.errors import ConfigurationError, PromptFleetError
from promptfleet_shared.jobs import Result
from promptfleet_shared.settings import Settings
from promptfleet_shared.tiers import DEFAULT_TIERS

if TYPE_CHECKING:
    from promptfleet_shared.store.status import TierSummary

_SHOWN = 2  # answers a tier
_WIDTH = 96
_LONGEST_ANSWER = 320
_DRAIN_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of the demo's prompts.

    Attributes:
        items: As they were submitted.
        results: In the same order.
        took_s: Seconds from the submission to the last result.
    """

    items: Sequence[Prompt]
    results: Sequence[Result]
    summaries: Sequence[TierSummary]
    took_s: float

    @property
    def failed(self) -> list[Result]:
        """Those that did not succeed."""
        return [result for result in self.results if not result.succeeded]


def demo(
    *,
    provider: Annotated[
        LocalProvider | None,
        typer.Option(help="By default local, or simulated where the model is not installed."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep the servers' data here; by default nothing is kept.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for all answers.")] = 170.0,
    as_json: JsonFlag = False,
) -> None:
    """Run a fleet with real servers and a real model on prompts of three tiers."""
    require_workers()
    chosen = _choose(provider)
    run = uuid.uuid4().hex[:12]
    with _directory(data_dir) as where, _fleet(where, chosen, run) as stack:
        outcome = _ask(stack, run, timeout)
    if as_json:
        print_json(_as_record(outcome, chosen))
    else:
        _show(outcome, chosen)
    if outcome.failed:
        raise typer.Exit(ExitCode.FAILED)


def load_prompts() -> list[Prompt]:
    """The prompts that the package carries, with their options."""
    text = resources.files("promptfleet").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    return [orjson.loads(line) for line in text.splitlines() if line.strip()]


def _choose(provider: LocalProvider | None) -> LocalProvider:
    ready = local_model.available()
    if provider is LocalProvider.LOCAL and not ready:
        raise ConfigurationError(f"--provider local: {ready.reason}")
    if provider is None and not ready:
        console = err()
        console.print("[yellow]No real model here[/]: ", end="", soft_wrap=True)
        console.print(f"{ready.reason}.", markup=False, soft_wrap=True)
        console.print("The simulated provider answers instead.", soft_wrap=True)
        return LocalProvider.SIMULATED
    return provider or LocalProvider.LOCAL


@contextlib.contextmanager
def _directory(wanted: Path | None) -> Iterator[Path]:
    """The data directory; a temporary one goes, unless something failed."""
    if wanted is not None:
        yield wanted
        return
    made = Path(tempfile.mkdtemp(prefix="promptfleet-demo-"))
    try:
        yield made
    except PromptFleetError:
        err().print(f"The logs are in {made}", style="dim", soft_wrap=True)
        raise
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _fleet(data_dir: Path, provider: LocalProvider, run: str) -> Iterator[DevStack]:
    """A running fleet whose processes write to a log instead of the terminal."""
    options = StackOptions(
        data_dir=data_dir,
        provider=provider,
        tiers=DEFAULT_TIERS,
        cache_namespace=f"demo-{run}",  # a kept cache would answer the next demo
        worker_flags=("--without-gossip",),
        drain_s=_DRAIN_S,
        api=False,
    )
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log, contextlib.ExitStack() as undo:
        console = err()
        stack = DevStack(
            options,
            console=Console(file=log, width=200),
            on_step=lambda text: _step(console, text),
        )
        undo.callback(stack.stop)
        try:
            started = time.monotonic()
            with console.status("starting the fleet"):
                stack.start()
            _step(console, f"ready after {time.monotonic() - started:.1f} s")
            yield stack
        except PromptFleetError:
            _show_log(log)
            raise


def _step(console: Console, text: str) -> None:
    console.print(f"· {text}", style="dim")


def _show_log(log: Any) -> None:
    log.seek(0)
    for line in log.read().splitlines()[-30:]:
        err().print(line, style="dim", markup=False, soft_wrap=True)


def _ask(stack: DevStack, run: str, timeout: float) -> Outcome:
    from promptfleet.client import Client  # noqa: PLC0415  # the database's library is slow
    from promptfleet_shared.store.status import tier_summaries  # noqa: PLC0415  # slow

    addresses = stack.addresses
    settings = Settings.model_validate(
        {
            "database_url": addresses.database_url,
            "broker_url": addresses.broker_url,
            "config": addresses.config,
        }
    )
    items = load_prompts()
    since = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
    started = time.monotonic()
    with Client(settings) as client:
        jobs = client.enqueue_prompts(items, metadata={"run": run})
        found = _follow(client.as_completed([job.id for job in jobs], timeout), items)
    took_s = time.monotonic() - started
    with store_connection(settings) as connection:
        summaries = tier_summaries(connection, tenant=settings.tenant, since=since, run=run)
    results = [found[job.id] for job in jobs]
    order = {tier: n for n, tier in enumerate(DEFAULT_TIERS)}
    summaries.sort(key=lambda summary: order.get(summary.tier, len(order)))
    return Outcome(items=items, results=results, summaries=summaries, took_s=took_s)


def _follow(results: Iterator[Result], items: Sequence[Prompt]) -> dict[uuid.UUID, Result]:
    """Collect the results, with a bar a tier."""
    found: dict[uuid.UUID, Result] = {}
    bars = Progress(
        TextColumn("  {task.description:<9}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TextColumn("[green]{task.fields[tokens]:>6,} tokens"),
        TextColumn("[red]{task.fields[bad]}"),
        TimeElapsedColumn(),
        console=err(),
    )
    totals = Counter(item.get("tier") or "" for item in items)
    tasks = {
        tier: bars.add_task(tier, total=total, tokens=0, bad="") for tier, total in totals.items()
    }
    tokens, failures = Counter[str](), Counter[str]()
    with bars:
        for result in results:
            found[result.job_id] = result
            tokens[result.tier] += result.usage.output
            failures[result.tier] += not result.succeeded
            bad = f"{failures[result.tier]} failed" if failures[result.tier] else ""
            task = tasks[result.tier]
            bars.update(task, advance=1, tokens=tokens[result.tier], bad=bad)
    return found


def _show(outcome: Outcome, provider: LocalProvider) -> None:
    console = out()
    model = "SmolLM2-135M" if provider is LocalProvider.LOCAL else "a simulated model"
    title = f"{len(outcome.results)} prompts answered by {model} in {outcome.took_s:.1f} s"
    console.print()
    console.print(summary_table(outcome.summaries, title=title))
    console.print()
    for item, result in _examples(outcome):
        _show_answer(console, item, result)
    for result in outcome.failed:
        reason = f"{result.error.code}: {result.error.message}" if result.error else ""
        console.print(f"[red]{result.tier} {result.job_id} {result.state}[/] {reason}")
    if not outcome.failed:
        console.print(f"[bold green]All {len(outcome.results)} prompts succeeded.[/]")


def _examples(outcome: Outcome) -> Iterator[tuple[Prompt, Result]]:
    shown = Counter[str]()
    for item, result in zip(outcome.items, outcome.results, strict=True):
        if result.succeeded and result.text and shown[result.tier] < _SHOWN:
            shown[result.tier] += 1
            yield item, result


def _show_answer(console: Console, item: Prompt, result: Result) -> None:
    width = min(_WIDTH, console.width - 4)
    asked = textwrap.shorten(str(item.get("prompt")), width - len(result.tier), placeholder=" …")
    console.print(f"[bold cyan]{result.tier}[/] ", end="")
    console.print(asked, markup=False, soft_wrap=True)
    answer = textwrap.shorten(result.text or "", _LONGEST_ANSWER, placeholder=" …")
    console.print(textwrap.indent(textwrap.fill(answer, width), "    "), style="dim", markup=False)
    console.print()


def _as_record(outcome: Outcome, provider: LocalProvider) -> dict[str, Any]:
    return {
        "provider": provider,
        "took_s": round(outcome.took_s, 3),
        "succeeded": len(outcome.results) - len(outcome.failed),
        "failed": len(outcome.failed),
        "tiers": [summary_record(summary) for summary in outcome.summaries],
        "results": [
            {"prompt": item.get("prompt"), **as_record(result)}
            for item, result in zip(outcome.items, outcome.results, strict=True)
        ],
    }
