"""The reference pages name exactly what the code has, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
from pydantic import BaseModel, SecretStr
from tests.docs.pages import ROOT, anchors, first_cells, links, pages, rows
from tests.docs.test_examples import CLI_VARIABLES

import promptfleet
from promptfleet.cli import app
from promptfleet.cli.exits import ExitCode
from promptfleet_shared.fleet import (
    BatchOptions,
    BreakerOptions,
    Deployment,
    Fleet,
    Model,
    RetryOptions,
    TierSection,
    TimeoutOptions,
)
from promptfleet_shared.jobs import JobState
from promptfleet_shared.policies.balancing import BalancingSection, BalancingWeights
from promptfleet_shared.policies.budgets import Budget
from promptfleet_shared.policies.caching import CacheSection, SemanticSection
from promptfleet_shared.policies.compact import CompactSection
from promptfleet_shared.policies.context import ContextSection
from promptfleet_shared.policies.conversations import MemorySection
from promptfleet_shared.policies.fairness import FairnessSection
from promptfleet_shared.policies.limits import LimitsSection
from promptfleet_shared.policies.provider_batches import BatchServiceSection
from promptfleet_shared.policies.routing import (
    Conditions,
    EscalateOn,
    RoutingSection,
    ShadowSection,
    TriageSection,
)
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.tables import results

REFERENCE = ROOT / "docs/reference"
SECTIONS: dict[str, type[BaseModel]] = {
    "": Fleet,
    "batch.": BatchOptions,
    "retry.": RetryOptions,
    "timeouts.": TimeoutOptions,
    "cache.": CacheSection,
    "cache.semantic.": SemanticSection,
    "breaker.": BreakerOptions,
    "batch_service.": BatchServiceSection,
    "fairness.": FairnessSection,
    "limits.": LimitsSection,
    "budgets.": Budget,
    "compact.": CompactSection,
    "context.": ContextSection,
    "memory.": MemorySection,
    "balancing.": BalancingSection,
    "balancing.weights.": BalancingWeights,
    "tiers.NAME.": TierSection,
    "tiers.NAME.conditions.": Conditions,
    "tiers.NAME.escalate_on.": EscalateOn,
    "routing.": RoutingSection,
    "routing.triage.": TriageSection,
    "routing.shadow.": ShadowSection,
    "models.NAME.": Model,
    "models.NAME.deployments.": Deployment,
}


def _options() -> dict[str, Any]:
    """Every option of fleet.toml with its default; sections that are told apart left out."""
    sections = {prefix.split(".")[0] for prefix in SECTIONS if prefix}
    told_apart = sections | {"deployments"}
    options = {}
    for prefix, section in SECTIONS.items():
        for name, field in section.model_fields.items():
            nested = name in told_apart and (not prefix or name == "deployments")
            if not nested:
                options[prefix + name] = field.get_default(call_default_factory=True)
    return options


def _shown(default: Any) -> float | str:
    """A default as the tables show it, so that both sides compare."""
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    text = "none" if default is None else str(default).lower()
    if re.fullmatch(r"-?[\d_]+(\.\d+)?", text):
        return float(text.replace("_", ""))
    return text


def _cell(text: str) -> float | str:
    return _shown(text.strip('`"').replace(" ", ""))


def test_fleet_toml_page_has_every_option_once() -> None:
    told = first_cells(REFERENCE / "fleet-toml.md")
    assert sorted(told) == sorted(_options())


def test_fleet_toml_page_has_the_defaults() -> None:
    told = rows(REFERENCE / "fleet-toml.md")
    for name, default in _options().items():
        shown = told[name][0]
        if shown not in {"required", "", "its section's"}:
            assert _cell(shown) == _shown(default), name


def test_settings_page_has_every_variable_with_its_default() -> None:
    told = rows(REFERENCE / "settings.md")
    fields = {f"PROMPTFLEET_{name.upper()}": f for name, f in Settings.model_fields.items()}
    assert set(told) - CLI_VARIABLES == set(fields)
    assert set(told) >= CLI_VARIABLES
    for name, field in fields.items():
        if told[name][0]:
            assert _cell(told[name][0]) == _shown(field.default), name


def test_states_page_has_every_state() -> None:
    assert set(first_cells(REFERENCE / "states.md")) == {state.value for state in JobState}


def test_results_page_has_every_column() -> None:
    assert first_cells(REFERENCE / "results-table.md") == [c.name for c in results.columns]


def test_python_page_has_every_public_name() -> None:
    text = (REFERENCE / "python-api.md").read_text(encoding="utf-8")
    missing = [name for name in promptfleet.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_cli_page_has_every_command_and_option() -> None:
    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^### `promptfleet ([a-z -]+)`$", text, re.MULTILINE))
    sections = dict(
        re.findall(r"^### `promptfleet ([a-z -]+)`\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    )
    commands = dict(_commands(typer.main.get_command(app), ""))
    assert told == set(commands)
    for name, command in commands.items():
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f"`{option}" in sections[name] or option == "--help", f"{name} {option}"


def _commands(group: Any, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += _commands(command, f"{prefix}{name} ")
        else:
            found.append((prefix + name, command))
    return found


def test_cli_page_has_every_exit_code() -> None:
    told = first_cells(REFERENCE / "cli.md")
    assert {str(code.value) for code in ExitCode} <= set(told)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs/index.md"
    reached = {index}
    waiting = [index]
    while waiting:
        page = waiting.pop()
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert set((ROOT / "docs").rglob("*.md")) <= reached
