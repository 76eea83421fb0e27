"""`promptfleet cost`: what was spent, on what, and what was saved."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Sequence
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.keys import seconds
from promptfleet.cli.reports import money, store_connection
from promptfleet.cli.terminal import note, out, print_json, print_text, table
from promptfleet_shared.errors import InvalidRequestError

if TYPE_CHECKING:
    from promptfleet_shared.store.costs import CostRow

FREE = Decimal(0)


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
    ] = "model",
    since: Annotated[
        str, typer.Option(help="How long ago, e.g. 7d or 24h, or a date or instant (UTC).")
    ] = "7d",
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
    begin = instant(since, now, field="since")
    end = now if until is None else instant(until, now, field="until")
    whose = tenant or (None if by == "tenant" else settings.tenant)
    with store_connection(settings) as connection:
        rows = costs(connection, by=by, since=begin, until=end, tenant=whose)
    match format:
        case Format.JSON:
            print_json(
                {
                    "by": by,
                    "since": begin,
                    "until": end,
                    "tenant": whose,
                    "rows": [record(row) for row in rows],
                    "total": record(total(rows)),
                }
            )
        case Format.CSV:
            print_text(_csv([record(row) for row in rows]))
        case Format.TABLE:
            _show(by, rows)


def instant(text: str, now: dt.datetime, *, field: str) -> dt.datetime:
    """An instant from how long ago it was, or from a date or an instant in ISO 8601.

    Raises:
        InvalidRequestError: It is neither.
    """
    try:
        parsed = dt.datetime.fromisoformat(text)
    except ValueError:
        pass
    else:
        return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=dt.UTC)
    try:
        return now - dt.timedelta(seconds=seconds(text, field=field))
    except (InvalidRequestError, OverflowError):
        msg = f"--{field}: must be like 7d or 24h, or like 2026-03-01, not {text!r}"
        raise InvalidRequestError(msg, field=field) from None


def record(row: CostRow) -> dict[str, Any]:
    """A row as JSON and CSV show it."""
    return {
        "key": row.key,
        "calls": row.calls,
        "unknown_calls": row.unknown_calls,
        "unpriced_calls": row.unpriced_calls,
        "input_tokens": row.input_tokens,
        "cached_tokens": row.cached_tokens,
        "output_tokens": row.output_tokens,
        "reasoning_tokens": row.reasoning_tokens,
        "cost_usd": _number(row.cost_usd),
        "estimated_usd": _number(row.estimated_usd),
        "at_most_usd": _number(row.at_most_usd),
        "saved_usd": {name: float(usd) for name, usd in row.saved_usd.items()},
        "saved_jobs": dict(row.saved_jobs),
    }


def total(rows: Sequence[CostRow]) -> CostRow:
    """The sum of all rows."""
    from promptfleet_shared.store.costs import CostRow  # noqa: PLC0415  # slow to import

    saved: dict[str, Decimal] = {}
    jobs: dict[str, int] = {}
    for row in rows:
        for name, usd in row.saved_usd.items():
            saved[name] = saved.get(name, FREE) + usd
        for name, count in row.saved_jobs.items():
            jobs[name] = jobs.get(name, 0) + count
    return CostRow(
        key="all",
        calls=sum(row.calls for row in rows),
        unknown_calls=sum(row.unknown_calls for row in rows),
        input_tokens=sum(row.input_tokens for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        reasoning_tokens=sum(row.reasoning_tokens for row in rows),
        cost_usd=_sum(row.cost_usd for row in rows),
        estimated_usd=_sum(row.estimated_usd for row in rows),
        at_most_usd=_sum(row.at_most_usd for row in rows),
        unpriced_calls=sum(row.unpriced_calls for row in rows),
        saved_usd=saved,
        saved_jobs=jobs,
    )


def _sum(values: Any) -> Decimal | None:
    known = [value for value in values if value is not None]
    return sum(known, FREE) if known else None


def _number(usd: Decimal | None) -> float | None:
    return None if usd is None else float(usd)


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
