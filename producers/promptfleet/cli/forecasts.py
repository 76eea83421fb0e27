"""`promptfleet submit --dry-run`: what a file will cost, and nothing is submitted."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from promptfleet.bulk.forecast import Forecast, Forecaster
from promptfleet.bulk.lines import read_lines
from promptfleet.cli.reports import money, store_connection
from promptfleet.cli.terminal import err, note, out, print_json, table
from promptfleet.estimates import DEFAULT_OUTPUT, ENOUGH_ANSWERS, Estimates
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.settings import Settings

if TYPE_CHECKING:
    from promptfleet_shared.store.costs import ObservedOutputs


def seen(settings: Settings) -> tuple[Mapping[str, ObservedOutputs], Mapping[str, float]]:
    """How long answers were, and how many a second; nothing where no database can be asked."""
    from promptfleet_shared.store.costs import (  # noqa: PLC0415  # slow to import
        observed_outputs,
        observed_rates,
    )

    with suppress(PromptFleetError), store_connection(settings) as connection:
        outputs = observed_outputs(connection, tenant=settings.tenant)
        return outputs, observed_rates(connection, tenant=settings.tenant)
    note("The database can't be reached: nothing is known of earlier answers.")
    return {}, {}


def dry_run(
    file: BinaryIO,
    settings: Settings,
    options: Mapping[str, Any],
    *,
    keep_model: bool,
    as_json: bool,
) -> Forecast:
    """Read the file to its end and show the forecast."""
    from promptfleet.postgres import make_defaults  # noqa: PLC0415  # the database's library is slow

    fleet = load_fleet(settings.config_path)
    observed, rates = seen(settings)
    estimates = Estimates(fleet, observed)
    forecaster = Forecaster(
        estimates,
        options=options,
        defaults=make_defaults(settings, fleet),
        keep_model=keep_model,
        rates=rates,
    )
    forecast = forecaster.read(read_lines(file))
    if as_json:
        print_json(record(forecast))
    else:
        _show(forecast)
        _say_how(forecast, estimates, observed)
    return forecast


def record(forecast: Forecast) -> dict[str, Any]:
    """The forecast as JSON shows it."""
    return {
        "lines": forecast.lines,
        "invalid": forecast.invalid,
        "mistakes": [{"line": m.line, "message": m.message} for m in forecast.mistakes],
        "duration_s": forecast.duration_s,
        "tiers": {
            tier.tier: {
                "prompts": tier.prompts,
                "input_tokens": tier.input_tokens,
                "output_tokens": tier.output_tokens,
                "cost_usd": _number(tier.usd.total),
                "high_usd": _number(tier.high_usd.total),
                "batch_usd": _number(tier.batch_usd.total),
                "without_price": tier.usd.unknown,
                "output_from": tier.sources,
                "duration_s": tier.duration_s,
            }
            for tier in forecast.tiers
        },
        "all_on": {
            tier: {"cost_usd": _number(usd), "batch_usd": _number(batch)}
            for tier, (usd, batch) in forecast.all_on.items()
        },
    }


def _number(usd: Decimal | None) -> float | None:
    return None if usd is None else float(usd)


def _show(forecast: Forecast) -> None:
    made = table(
        "tier", "prompts", "input tokens", "output tokens", "$ expected", "$ high", "$ by batch",
        "time", title="as written",
    )  # fmt: skip
    for tier in forecast.tiers:
        made.add_row(
            tier.tier,
            f"{tier.prompts:,}",
            f"{tier.input_tokens:,}",
            f"{tier.output_tokens:,}",
            money(tier.usd.total),
            money(tier.high_usd.total),
            money(tier.batch_usd.total),
            _time(tier.duration_s),
        )
    out().print(made)
    if forecast.all_on:
        others = table("tier", "$ expected", "$ by batch", title="\nall of it on one tier")
        for name, (usd, batch) in forecast.all_on.items():
            others.add_row(name, money(usd), money(batch))
        out().print(others)


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else str(dt.timedelta(seconds=max(1, round(seconds))))


def _say_how(
    forecast: Forecast, estimates: Estimates, observed: Mapping[str, ObservedOutputs]
) -> None:
    for mistake in forecast.mistakes:
        err().print(f"line {mistake.line}: {mistake.message}", markup=False, soft_wrap=True)
    if forecast.invalid:
        note(f"{forecast.invalid:,} of {forecast.lines:,} lines are not valid.")
    for tier in forecast.tiers:
        seen_here = observed.get(tier.tier)
        if seen_here is not None and seen_here.answers >= ENOUGH_ANSWERS:
            note(
                f"{tier.tier}: answers as long as {seen_here.answers:,} earlier ones:"
                f" {seen_here.mean:,.0f} tokens on average, half below {seen_here.p50:,.0f},"
                f" 95 % below {seen_here.p95:,.0f}."
            )
        else:
            note(
                f"{tier.tier}: too few earlier answers; taken are max_tokens, else"
                f" {DEFAULT_OUTPUT} tokens."
            )
    if not estimates.counts_exactly:
        note("Tokens are guessed from the length: install promptfleet[workers] to count them.")
    if not estimates.knows_prices:
        note("No prices are known: install promptfleet[workers].")
    note("Nothing was submitted.")
