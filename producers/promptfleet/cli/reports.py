"""Tables over `store.status`, shared by status, demo and submit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.table import Table

from promptfleet.cli.terminal import table
from promptfleet_shared.settings import Settings

if TYPE_CHECKING:
    from promptfleet_shared.store.status import TierSummary


@contextmanager
def store_connection(settings: Settings) -> Iterator[Any]:
    """A connection to the fleet's database for a few questions.

    Raises:
        StoreUnavailableError: It can't be reached.
    """
    # Here, since it takes half a second to import.
    from promptfleet_shared.store.engines import make_engine, store_errors  # noqa: PLC0415

    url = settings.database_url.get_secret_value()
    engine = make_engine(
        url,
        application_name="promptfleet-cli",
        pool_size=1,
        connect_timeout_s=settings.database_connect_timeout_s,
        patience_s=settings.database_patience_s,
    )
    try:
        with store_errors(), engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def summary_table(summaries: Sequence[TierSummary], *, title: str | None = None) -> Table:
    """What finished: a column a tier and one for all, so that it fits a narrow terminal."""
    made = table("", *(summary.tier for summary in summaries), title=title)
    several = len(summaries) > 1
    if several:
        made.add_column("all", justify="right", header_style="dim", style="bold")
    for name, of_one, of_all in _ROWS:
        cells = [of_one(summary) for summary in summaries]
        made.add_row(name, *cells, *([of_all(summaries)] if several else []))
    return made


_Cell = Callable[["TierSummary"], str]
_Total = Callable[[Sequence["TierSummary"]], str]


def _count(name: str) -> tuple[_Cell, _Total]:
    def of_one(summary: TierSummary) -> str:
        return f"{getattr(summary, name):,}"

    def of_all(summaries: Sequence[TierSummary]) -> str:
        return f"{sum(getattr(summary, name) for summary in summaries):,}"

    return of_one, of_all


def _mean_size(summaries: Sequence[TierSummary]) -> str:
    batches = sum(summary.batches for summary in summaries)
    return f"{sum(summary.jobs for summary in summaries) / batches:.1f}" if batches else "-"


def _total_cost(summaries: Sequence[TierSummary]) -> str:
    costs = [summary.cost_usd for summary in summaries if summary.cost_usd is not None]
    return money(sum(costs, Decimal(0)) if costs else None)


def _total_saved(summaries: Sequence[TierSummary]) -> str:
    saved = [s.cache_saved_usd for s in summaries if s.cache_saved_usd is not None]
    return money(sum(saved, Decimal(0)) if saved else None)


_ROWS: Sequence[tuple[str, _Cell, _Total]] = (
    ("jobs", *_count("jobs")),
    ("succeeded", *_count("succeeded")),
    ("batches", *_count("batches")),
    ("mean batch size", lambda summary: f"{summary.mean_batch_size:.1f}", _mean_size),
    ("answered from cache", *_count("cached")),
    ("provider calls", *_count("calls")),
    ("input tokens", *_count("input_tokens")),
    ("output tokens", *_count("output_tokens")),
    ("queued ms p50 / p95", lambda summary: pair(summary.queued_ms), lambda _: ""),
    ("provider ms p50 / p95", lambda summary: pair(summary.provider_ms), lambda _: ""),
    ("cost in US dollars", lambda summary: money(summary.cost_usd), _total_cost),
    ("saved by the cache", lambda summary: money(summary.cache_saved_usd), _total_saved),
)


def summary_record(summary: TierSummary) -> Mapping[str, Any]:
    """A summary as JSON shows it."""
    return {
        "tier": summary.tier,
        "jobs": summary.jobs,
        "succeeded": summary.succeeded,
        "batches": summary.batches,
        "mean_batch_size": round(summary.mean_batch_size, 3),
        "cached": summary.cached,
        "calls": summary.calls,
        "input_tokens": summary.input_tokens,
        "output_tokens": summary.output_tokens,
        "queued_ms": _percentiles(summary.queued_ms),
        "provider_ms": _percentiles(summary.provider_ms),
        "cost_usd": None if summary.cost_usd is None else float(summary.cost_usd),
        "cache_saved_usd": (
            None if summary.cache_saved_usd is None else float(summary.cache_saved_usd)
        ),
    }


def pair(values: tuple[float, float] | None) -> str:
    """Two milliseconds, e.g. p50 and p95."""
    return "-" if values is None else f"{values[0]:,.0f} / {values[1]:,.0f}"


def money(value: Decimal | None) -> str:
    """US dollars, with enough digits for a few prompts."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:,.2f}" if value >= 1 else f"{value:.6f}"


def _percentiles(values: tuple[float, float] | None) -> Mapping[str, float] | None:
    return None if values is None else {"p50": round(values[0], 1), "p95": round(values[1], 1)}
