"""`promptfleet cost`: what was spent, on what, and what was saved."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.reports import money, store_connection
from promptfleet.cli.terminal import note, out, print_json, print_text, table
from promptfleet.cost_report import DEFAULT_BY, DEFAULT_SINCE, FREE, instant, record, report, total

if TYPE_CHECKING:
    from promptfleet_shared.store.costs import CostRow


class Format(StrEnum):
    """How a report is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def cost(
    *,
    by: Annotated[
        str,
        typer.Option(help="model, tier, tenant, day, provider, deployment or metadata.KEY."),
    ] = DEFAULT_BY,
    since: Annotated[
        str, typer.Option(help="How long ago, e.g. 7d or 24h, or a date or instant (UTC).")
    ] = DEFAULT_SINCE,
    until: Annotated[
        str | None, typer.Option(help="The same; by default now. It is left out itself.")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Whose; by default PROMPTFLEET_TENANT, or all with --by tenant."),
    ] = None,
    format: Annotated[Format, typer.Option(help="How it is printed.")] = Format.TABLE,  # noqa: A002  # what users call it
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Show what the ledger says was spent, the dearest first, and what caches and others saved."""
    from promptfleet_shared.store.costs import check_key, costs  # noqa: PLC0415  # slow to import

    check_key(by)
    settings = find_settings(data_dir)
    now = dt.datetime.now(dt.UTC)
    begin = instant(since, now, field="since", label="--since")
    end = now if until is None else instant(until, now, field="until", label="--until")
    whose = tenant or (None if by == "tenant" else settings.tenant)
    with store_connection(settings) as connection:
        rows = costs(connection, by=by, since=begin, until=end, tenant=whose)
    match format:
        case Format.JSON:
            print_json(report(rows, by=by, since=begin, until=end, tenant=whose))
        case Format.CSV:
            print_text(_csv([record(row) for row in rows]))
        case Format.TABLE:
            _show(by, rows)


def _csv(records: Sequence[dict[str, Any]]) -> str:
    """One line a row; what was saved is summed up."""
    if not records:
        return ""
    flat = [
        {
            **row,
            "saved_usd": sum(row["saved_usd"].values()),
            "saved_jobs": sum(row["saved_jobs"].values()),
        }
        for row in records
    ]
    written = io.StringIO()
    writer = csv.DictWriter(written, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return written.getvalue()


def _show(by: str, rows: Sequence[CostRow]) -> None:
    if not rows:
        note("Nothing was called or saved in that time.")
        return
    made = table(by, "calls", "input", "cached", "output", "$", "$ estimated", "$ saved", "unknown")
    everything = total(rows)
    for row in (*rows, everything) if len(rows) > 1 else rows:
        made.add_row(
            "?" if row.key is None else row.key,
            f"{row.calls:,}",
            f"{row.input_tokens:,}",
            f"{row.cached_tokens:,}",
            f"{row.output_tokens:,}",
            money(row.cost_usd),
            money(row.estimated_usd),
            money(sum(row.saved_usd.values(), FREE) if row.saved_usd else None),
            f"{row.unknown_calls:,}",
            style="bold" if row is everything else None,
        )
    out().print(made)
    _explain(everything)


def _explain(everything: CostRow) -> None:
    for name, count in sorted(everything.saved_jobs.items()):
        usd = money(everything.saved_usd.get(name))
        note(f"saved by {name}: {count:,} jobs, ${usd}")
    if everything.unknown_calls:
        note(
            f"{everything.unknown_calls:,} calls have an unknown outcome: at most"
            f" ${money(everything.at_most_usd)} more."
        )
    if everything.unpriced_calls:
        note(f"{everything.unpriced_calls:,} calls have no known price: see price_as.")
