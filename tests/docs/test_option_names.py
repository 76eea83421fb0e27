"""What the usual options are called here: every name of ours on that page exists."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import pytest
from pydantic import BaseModel
from tests.docs.pages import ROOT

from promptfleet.handles import PromptJob
from promptfleet.options import PromptOptions
from promptfleet_shared.fleet import Fleet

PAGE = ROOT / "docs/reference/option-names.md"
USUAL = (
    "batchSize batchWindowMs maxBatchSize maxConcurrentBatches cacheTtl type ttl connectionString"
    " namespace enableCache maxTokens temperature streaming timeoutMs retryAttempts retryDelayMs"
    " onToken onComplete onError defaultTier conditions capabilities.maxComplexity"
    " capabilities.maxConcurrency costWeights"
)


def _table() -> list[list[str]]:
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type may hold, be it in a table, a list or an option."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections(part)]


def _exists(name: str) -> bool:
    sections: list[type[BaseModel]] = [Fleet]
    for part in name.split("."):
        if part == "NAME":
            continue
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        if not fields:
            return False
        sections = [found for field in fields for found in _sections(field.annotation)]
    return True


def test_every_usual_name_is_told() -> None:
    assert {name for row in _table() for name in _names(row[0])} == set(USUAL.split())


@pytest.mark.parametrize("row", _table(), ids=lambda row: row[0])
def test_our_name_exists(row: list[str]) -> None:
    names = _names(row[1])
    assert names
    for name in names:
        match row[2]:
            case "fleet.toml":
                assert _exists(name), name
            case "a prompt":
                assert name in PromptOptions.__annotations__, name
            case "Python":
                parameters = inspect.signature(PromptJob.stream).parameters
                assert set(re.findall(r"(\w+)=", name)) <= set(parameters)
            case place:
                pytest.fail(f"there is no such place: {place}")


def test_a_name_that_does_not_exist_is_found_out() -> None:
    assert _exists("models.NAME.deployments.base_url")
    assert not _exists("models.NAME.deployments.costWeights")
    assert not _exists("batchSize")
