"""`promptfleet config check` and `config show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings, without_password
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.terminal import Commands, JsonFlag, note, out, print_json, print_text
from promptfleet.unpriced import unpriced
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import Fleet, load_fleet

app = typer.Typer(cls=Commands, help="Check or show the configuration.", no_args_is_help=True)

_MISTAKE = re.compile(r"(?P<path>.*?):(?P<line>\d+): (?:(?P<field>[^\s:]+): )?(?P<message>.*)")


@app.command()
def check(
    path: Annotated[Path | None, typer.Argument(help="By default the fleet's own.")] = None,
    *,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Print every mistake as file:line: field: message; exit 2 if there is one."""
    checked = path or find_settings(data_dir).config_path
    mistakes: list[str] = []
    fleet = Fleet()
    try:
        fleet = load_fleet(checked)
    except ConfigurationError as error:
        mistakes = error.message.splitlines()
    warnings = [] if mistakes else [*_missing_keys(fleet), *_missing_prices(fleet)]
    if as_json:
        found = [_as_record(mistake) for mistake in mistakes]
        print_json({"path": checked, "mistakes": found, "warnings": warnings})
    elif mistakes:
        for mistake in mistakes:
            print_text(mistake)
    else:
        print_text(f"{checked or 'no fleet.toml'}: {_summary(fleet)}: no mistakes")
        for warning in warnings:
            note(f"warning: {warning}")
    if mistakes:
        raise typer.Exit(ExitCode.USAGE)


@app.command()
def show(*, as_json: JsonFlag = False, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Print the settings and the fleet as they are in effect, without secrets."""
    settings = find_settings(data_dir)
    fleet = load_fleet(settings.config_path)
    shown: dict[str, Any] = settings.model_dump(mode="json")
    for name in ("database_url", "broker_url", "cache_url"):
        shown[name] = without_password(getattr(settings, name).get_secret_value())
    shown["config"] = None if settings.config_path is None else str(settings.config_path)
    if as_json:
        print_json({"settings": shown, "fleet": fleet.model_dump(mode="json")})
        return
    console = out()
    for name, value in shown.items():
        console.print(f"[dim]PROMPTFLEET_{name.upper():<20}[/]", end="")
        console.print("" if value is None else str(value), markup=False, soft_wrap=True)
    for tier in fleet.tier_names:
        _show_tier(fleet, tier)


def _show_tier(fleet: Fleet, tier: str) -> None:
    batch, console = fleet.batch_options(tier), out()
    default = " (default)" if tier == fleet.default_tier else ""
    console.print(
        f"\n[bold]{tier}[/]{default}: batches of up to {batch.max_batch_size} within"
        f" {batch.batch_window_ms:g} ms, {batch.max_concurrent_calls} calls at once",
        soft_wrap=True,
    )
    for name in fleet.tiers[tier].models if tier in fleet.tiers else ():
        model = fleet.models[name]
        price = f", priced as {model.price_as}" if model.price_as else ""
        console.print(f"  {name}{price}", markup=False, soft_wrap=True)
        for place in model.deployments:
            text = f"    {place.name}: {place.provider} at {place.base_url}"
            console.print(text, markup=False, soft_wrap=True)


def _missing_keys(fleet: Fleet) -> list[str]:
    return [
        f"{deployment.name}: the environment has no {deployment.api_key_env} (api_key_env)"
        for model in fleet.models.values()
        for deployment in model.deployments
        if deployment.api_key_env and deployment.secret() is None
    ]


def _missing_prices(fleet: Fleet) -> list[str]:
    return [f"{found.text}: {found.advice}" for found in unpriced(fleet)]


def _summary(fleet: Fleet) -> str:
    deployments = sum(len(model.deployments) for model in fleet.models.values())
    counts = ((len(fleet.tier_names), "tier"), (len(fleet.models), "model"))
    parts = [*counts, (deployments, "deployment")]
    return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in parts)


def _as_record(mistake: str) -> dict[str, Any]:
    match = _MISTAKE.fullmatch(mistake)
    if match is None:
        return {"path": None, "line": None, "field": None, "message": mistake}
    return {**match.groupdict(), "line": int(match["line"])}
