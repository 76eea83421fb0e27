"""The producer's one public surface."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import promptfleet
from promptfleet_shared import errors

WORKERS_ONLY = {"ProviderError"}


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(promptfleet).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert promptfleet.__all__ == sorted(public)


def test_every_error_that_a_caller_can_see_is_public() -> None:
    tree = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.PromptFleetError)
    }
    assert tree - WORKERS_ONLY <= set(promptfleet.__all__)


@pytest.mark.parametrize("name", promptfleet.__all__)
def test_what_is_public_is_documented(name: str) -> None:
    value = getattr(promptfleet, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)


@pytest.mark.parametrize("module", ["promptfleet", "promptfleet.testing"])
def test_importing_is_cheap(module: str) -> None:
    """Servers' libraries are imported when a client is made; pytest imports us at every start."""
    heavy = ["celery", "kombu", "sqlalchemy", "psycopg", "pydantic", "redis", "alembic"]
    script = f"import sys, {module}; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"


def test_both_clients_have_the_same_verbs() -> None:
    def verbs(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in vars(kind).items()
            if not name.startswith("_") and callable(value)
        }

    assert verbs(promptfleet.Client) == verbs(promptfleet.AsyncClient)
    assert verbs(promptfleet.PromptJob) == verbs(promptfleet.AsyncPromptJob)
