"""`promptfleet route`: why `tier="auto"` chooses what it chooses, and what the choice costs."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptfleet.bulk.lines import parse_line, read_lines
from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.reports import money, store_connection
from promptfleet.cli.terminal import JsonFlag, complain, note, out, print_json, table
from promptfleet.options import check_option
from promptfleet.requests import BYTES_A_TOKEN, Defaults, make_spec
from promptfleet_shared.errors import ConfigurationError, InvalidRequestError
from promptfleet_shared.fleet import Fleet, load_fleet
from promptfleet_shared.jobs import Usage
from promptfleet_shared.policies.tier_choice import Decision
from promptfleet_shared.settings import Settings

if TYPE_CHECKING:
    from promptfleet.regret import Regret

USUAL_OUTPUT_TOKENS = 256
"""Output tokens of the expected cost where neither the request nor the tier sets a bound."""
_DAY_S = 86_400.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": _DAY_S, "w": 7 * _DAY_S}
_MAX_PAIRS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """A decision, and what it would cost.

    Attributes:
        models: Of the tier, in their order.
        cost_usd: Expected of one call to the first of them; None where no price is known.
    """

    line: int
    decision: Decision
    models: tuple[str, ...]
    cost_usd: Decimal | None


def route(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt's text; - reads it from stdin.")
    ] = None,
    *,
    file: Annotated[
        Path | None, typer.Option("--file", help="A file of prompts, as `submit` takes it.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", help="NAME=VALUE that you know of the prompt; repeatable."),
    ] = None,
    complexity: Annotated[
        str | None, typer.Option(help="low, medium, high, or a number from 1 to 10.")
    ] = None,
    regret: Annotated[
        bool,
        typer.Option("--regret", help="Compare the sample that also ran on the top tier."),
    ] = False,
    since: Annotated[str, typer.Option(help="With --regret: how far back, e.g. 36h or 7d.")] = "7d",
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Explain which tier a prompt with the tier "auto" gets, and why; nothing is submitted."""
    settings = find_settings(data_dir)
    if regret:
        _report_regret(settings, since, as_json=as_json)
        return
    fleet = load_fleet(settings.config_path)
    options = _options(attribute or [], complexity)
    if file is not None:
        _explain_file(fleet, file, options, as_json=as_json)
        return
    if prompt is None:
        complain("give a prompt, --file or --regret")
        raise typer.Exit(ExitCode.USAGE)
    text = sys.stdin.read() if prompt == "-" else prompt
    explained = explain(fleet, {"prompt": text, **options})
    if as_json:
        print_json(_record(explained))
    else:
        _show(explained)


def explain(fleet: Fleet, item: Mapping[str, Any], line: int = 1) -> Explained:
    """The decision for one prompt.

    Args:
        fleet: Whose tiers these are.
        item: `prompt` or `messages`, and options, as `enqueue_prompts` takes them.
        line: Of the file that it stands in.

    Raises:
        InvalidRequestError: It can't be submitted like this.
    """
    options = {name: value for name, value in item.items() if name not in {"prompt", "messages"}}
    # No scorer yet: the decision is made below, where all of it can be seen.
    spec = make_spec(
        item.get("prompt", item.get("messages")), {**options, "tier": None}, Defaults()
    )
    decision = fleet.tier_chooser().decide(spec.request, spec.policy or {})
    section = fleet.tiers.get(decision.tier)
    models = section.models if section else ()
    bound = options.get("max_tokens") or (section.max_tokens if section else None)
    usage = Usage(input=-(-len(spec.request) // BYTES_A_TOKEN), output=bound or USUAL_OUTPUT_TOKENS)
    return Explained(
        line=line, decision=decision, models=models, cost_usd=_price(fleet, models, usage)
    )


def _price(fleet: Fleet, models: Sequence[str], usage: Usage) -> Decimal | None:
    try:
        from promptfleet_shared.pricing import Pricer  # noqa: PLC0415  # only with the workers' extra
    except ImportError:
        return None
    if not models:
        return None
    model = fleet.models[models[0]]
    place = model.deployments[0]
    name, price_as = place.model or models[0], place.price_as or model.price_as
    return Pricer().cost(place.provider, name, usage, price_as)


def _options(attributes: Sequence[str], complexity: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if attributes:
        options["attributes"] = dict(map(_attribute, attributes))
    if complexity is not None:
        options["complexity"] = _number(complexity)
        check_option("complexity", options["complexity"])
    return options


def _attribute(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        msg = f"--attribute: must be NAME=VALUE, not {text!r}"
        raise InvalidRequestError(msg, field="attributes")
    return name, {"true": True, "false": False}.get(value.lower(), _number(value))


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _seconds(text: str) -> float:
    number, unit = text[:-1], _UNITS.get(text[-1:])
    if unit is None or not number.isdigit():
        msg = "--since: must be a number of s, m, h, d or w, such as 36h"
        raise InvalidRequestError(msg, field="since")
    return float(number) * unit


def _explain_file(fleet: Fleet, file: Path, options: Mapping[str, Any], *, as_json: bool) -> None:
    counts: Counter[str] = Counter()
    total, bad = Decimal(0), 0
    for found in _explained(fleet, file, options):
        if isinstance(found, str):
            bad += 1
            note(found)
            continue
        counts[found.decision.tier] += 1
        total += found.cost_usd or 0
        if as_json:
            print_json(_record(found))
        else:
            score = found.decision.record().get("score")
            out().print(
                f"{found.line:>6}  {found.decision.tier:<12} {'' if score is None else score}",
                highlight=False,
            )
    shown = ", ".join(f"{count:,} {tier}" for tier, count in counts.most_common())
    note(f"{shown or 'nothing'}; expected cost {money(total)} US dollars; {bad:,} lines not valid")


def _explained(fleet: Fleet, file: Path, options: Mapping[str, Any]) -> Iterator[Explained | str]:
    """Each line's decision, or what is wrong with it."""
    with file.open("rb") as lines:
        for raw in read_lines(lines):
            try:
                item = parse_line(raw, keep_model=False).item
                yield explain(fleet, {**options, **item}, raw.number)
            except InvalidRequestError as error:
                yield f"line {raw.number}: {error.message}"


def _record(explained: Explained) -> dict[str, Any]:
    choice = explained.decision.choice
    checks = choice.checks if choice else ()
    return {
        "line": explained.line,
        "tier": explained.decision.tier,
        "decision": explained.decision.record(),
        "conditions": [dataclasses.asdict(check) for check in checks],
        "models": list(explained.models),
        "expected_cost_usd": None if explained.cost_usd is None else float(explained.cost_usd),
    }


def _show(explained: Explained) -> None:
    decision, console = explained.decision, out()
    record = decision.record()
    console.print(f"[bold]{decision.tier}[/]: {_why(record)}", soft_wrap=True)
    for name, points in record.get("reasons", {}).items():
        console.print(f"  {points:+.2f}  {name.replace('_', ' ')}")
    for check in decision.choice.checks if decision.choice else ():
        mark = "[green]yes[/]" if check.holds else "[red]no[/]"
        wanted = (
            " or ".join(str(value) for value in check.wanted)
            if isinstance(check.wanted, tuple)
            else str(check.wanted)
        )
        console.print(
            f"  {mark:<14} {check.tier}: {check.attribute} is {wanted} (here: {check.found})",
            soft_wrap=True,
        )
    if explained.models:
        console.print(f"models: {', '.join(explained.models)}", soft_wrap=True)
    cost = explained.cost_usd
    if cost is not None:
        console.print(f"expected cost: {money(cost)} US dollars")


def _why(record: Mapping[str, Any]) -> str:
    if "chosen" not in record:
        return "a small model is asked first how hard the prompt is (triage)"
    if record["by"] == "attributes":
        return "by what was said of the prompt"
    score = f", {record['score']:g} of 10" if "score" in record else ""
    text = f"{record['level']} complexity{score}, by {record['by']}"
    return f"{text}; no tier's conditions hold" if record.get("no_match") else text


def _report_regret(settings: Settings, since: str, *, as_json: bool) -> None:
    since_s = _seconds(since)
    try:
        # Here, since what compares texts comes with the workers' extra.
        from promptfleet.regret import measure_regret  # noqa: PLC0415
    except ImportError:
        raise ConfigurationError("--regret needs `pip install promptfleet[workers]`") from None
    with store_connection(settings) as connection:
        found = measure_regret(connection, settings.tenant, since_s=since_s, limit=_MAX_PAIRS)
    _show_regret(found, since, as_json=as_json)


def _show_regret(regrets: Sequence[Regret], since: str, *, as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(regret) for regret in regrets])
        return
    if not regrets:
        note(f"no prompt of the last {since} ran on the top tier, too; see [routing.shadow]")
        return
    made = table(
        "tier", "top tier", "pairs", "equal", "similarity", "its cost", "top cost", "ms", "top ms"
    )
    for regret in regrets:
        made.add_row(
            regret.tier,
            regret.top_tier,
            f"{regret.pairs:,}",
            f"{regret.equal:.0%}",
            f"{regret.similarity:.0%}",
            money(regret.usd),
            money(regret.top_usd),
            f"{regret.provider_ms:,.0f}",
            f"{regret.top_provider_ms:,.0f}",
        )
    out().print(made)
    note(
        "similarity: shared words, whatever their order; it says how often the top tier would have"
        " answered otherwise, not which answer is better. Costs in US dollars, median latencies."
    )
