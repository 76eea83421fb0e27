"""`promptfleet audit`: what a file of prompts wastes, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from promptfleet.audit.report import Audit, Auditor
from promptfleet.bulk.forecast import spec_of_line
from promptfleet.bulk.lines import RawLine, read_lines
from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.reports import money
from promptfleet.cli.terminal import JsonFlag, note, out, print_json, table
from promptfleet.estimates import Estimates
from promptfleet_shared.errors import ConfigurationError, InvalidRequestError
from promptfleet_shared.fleet import load_fleet


def audit(
    path: Annotated[Path, typer.Argument(help="Lines as for promptfleet submit.")],
    *,
    tier: Annotated[str | None, typer.Option(help="Where a line names none.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Where a line has none.")] = None,
    reorder: Annotated[
        Path | None, typer.Option(help="Gets the lines in an order that suits prefix caches.")
    ] = None,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Report tokens, shared beginnings, waste, duplicates and prices; needs no servers."""
    from promptfleet.postgres import make_defaults  # noqa: PLC0415  # the database's library is slow

    settings = find_settings(data_dir)
    fleet = load_fleet(settings.config_path)
    if reorder is not None and reorder.resolve() == path.resolve():
        raise ConfigurationError("--reorder: must be another file than the one that is read")
    given = {"tier": tier, "max_tokens": max_tokens}
    options = {name: value for name, value in given.items() if value is not None}
    auditor = Auditor(Estimates(fleet), tuple(fleet.tiers))
    defaults = make_defaults(settings, fleet)
    places: list[tuple[int, int]] = []
    with _opened(path) as file:
        for raw, place in _placed(file):
            try:
                spec = spec_of_line(raw, options, defaults, keep_model=tier is None)
            except InvalidRequestError:
                auditor.refuse()
                continue
            auditor.add(spec, raw.number)
            places.append(place)
        found = auditor.report()
        if reorder is not None:
            _write(file, reorder, [places[n] for n in found.order])
    if as_json:
        print_json(_record(found))
        return
    _show(found)
    if reorder is not None:
        note(f"{len(found.order):,} lines are in {reorder}; invalid ones were left out.")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from None


def _placed(file: BinaryIO) -> Iterator[tuple[RawLine, tuple[int, int]]]:
    """The lines, and where each begins and ends; blank ones before it are taken with it."""
    start = 0
    for raw in read_lines(file):
        end = file.tell()
        yield raw, (start, end)
        start = end


def _write(file: BinaryIO, path: Path, places: Sequence[tuple[int, int]]) -> None:
    try:
        with path.open("wb") as output:
            for start, end in places:
                file.seek(start)
                line = file.read(end - start).strip().removeprefix(b"\xef\xbb\xbf")
                output.write(line + b"\n")
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be written: {error.strerror}") from None


def _record(found: Audit) -> dict[str, Any]:
    return {
        "prompts": found.prompts,
        "invalid": found.invalid,
        "input_tokens": found.input_tokens,
        "output_tokens": found.output_tokens,
        "cost_usd": _number(found.usd),
        "batch_usd": _number(found.batch_usd),
        "all_on": {
            tier: {"cost_usd": _number(usd), "batch_usd": _number(batch)}
            for tier, (usd, batch) in found.all_on.items()
        },
        "prefixes": [dataclasses.asdict(prefix) for prefix in found.prefixes],
        "cached_tokens": {"now": found.cached_now, "reordered": found.cached_then},
        "white_space_tokens": found.white_space,
        "repeated_paragraph_tokens": found.repeated,
        "boilerplate": [
            {"line": p.line, "prompts": p.prompts, "tokens": tokens, "moves": p.moves}
            for p, tokens in found.boilerplate
        ],
        "duplicates": found.duplicates,
        "near_duplicates": found.near_duplicates,
        "without_max_tokens": found.unbounded,
        "suggestions": [
            {"code": s.code, "text": s.text, "tokens": s.tokens, "usd": _number(s.usd)}
            for s in found.suggestions
        ],
    }


def _number(usd: Decimal | None) -> float | None:
    return None if usd is None else float(usd)


def _show(found: Audit) -> None:
    facts = table("", "", title="prompts")
    facts.add_row("prompts", f"{found.prompts:,}")
    if found.invalid:
        facts.add_row("lines that are not valid", f"{found.invalid:,}")
    facts.add_row("input tokens", f"{found.input_tokens:,}")
    facts.add_row("  the longest", f"{found.longest[0]:,} in line {found.longest[1]:,}")
    facts.add_row("  white space that compact leaves out", f"{found.white_space:,}")
    facts.add_row("  paragraphs said twice in a prompt", f"{found.repeated:,}")
    facts.add_row("  from a prefix cache, in this order", f"{found.cached_now:,}")
    facts.add_row("  from a prefix cache, reordered", f"{found.cached_then:,}")
    facts.add_row("output tokens, expected", f"{found.output_tokens:,}")
    facts.add_row("exact duplicates", f"{found.duplicates:,}")
    facts.add_row("near duplicates", f"{found.near_duplicates:,}")
    facts.add_row("US dollars, expected", money(found.usd))
    facts.add_row("  by the batch API", money(found.batch_usd))
    out().print(facts)
    if found.all_on:
        prices = table("tier", "$ expected", "$ by batch", title="\nall of it on one tier")
        for tier, (usd, batch) in found.all_on.items():
            prices.add_row(tier, money(usd), money(batch))
        out().print(prices)
    if found.prefixes:
        shared = table("tokens", "prompts", "lines", title="\nshared beginnings", left=["lines"])
        for prefix in found.prefixes:
            lines = ", ".join(str(line) for line in prefix.lines)
            more = " …" if prefix.prompts > len(prefix.lines) else ""
            shared.add_row(f"{prefix.tokens:,}", f"{prefix.prompts:,}", lines + more)
        out().print(shared)
    if found.boilerplate:
        often = table("tokens", "prompts", "first in line", "place", title="\nboilerplate")
        for paragraph, tokens in found.boilerplate:
            place = "moves" if paragraph.moves else "fixed"
            often.add_row(f"{tokens:,}", f"{paragraph.prompts:,}", f"{paragraph.line:,}", place)
        out().print(often)
    _suggest(found)


def _suggest(found: Audit) -> None:
    if not found.suggestions:
        return
    out().print("\n[bold]suggestions[/], by money")
    for item in found.suggestions:
        usd = "" if item.usd is None else f" (${money(item.usd)})"
        out().print(f"- {item.text}{usd}", markup=False, soft_wrap=True)
