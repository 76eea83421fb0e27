"""`promptfleet config check` and `config show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings, without_password
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.terminal import Commands, JsonFlag, note, out, print_json, print_text, table
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
    warnings = [] if mistakes else _missing_keys(fleet)
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
    settings_table = table("setting", "value", left=("value",))
    for name, value in shown.items():
        settings_table.add_row(f"PROMPTFLEET_{name.upper()}", "" if value is None else str(value))
    out().print(settings_table)
    out().print()
    out().print(_tiers(fleet))


def _tiers(fleet: Fleet) -> Any:
    columns = ("tier", "models", "deployments", "batch size", "window ms", "calls at once")
    tiers = table(*columns, left=("models", "deployments"))
    for tier in fleet.tier_names:
        models = fleet.tiers[tier].models if tier in fleet.tiers else ()
        batch = fleet.batch_options(tier)
        places = [d.base_url for model in models for d in fleet.models[model].deployments]
        tiers.add_row(
            tier + (" (default)" if tier == fleet.default_tier else ""),
            ", ".join(models) or "none",
            "\n".join(places) or "none",
            str(batch.max_batch_size),
            f"{batch.batch_window_ms:g}",
            str(batch.max_concurrent_calls),
        )
    return tiers


def _missing_keys(fleet: Fleet) -> list[str]:
    return [
        f"{deployment.name}: the environment has no {deployment.api_key_env} (api_key_env)"
        for model in fleet.models.values()
        for deployment in model.deployments
        if deployment.api_key_env and deployment.secret() is None
    ]


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
