"""docs/reference/http-api.md against the OpenAPI document and the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.docs.pages import ROOT

import promptfleet.api
from promptfleet.api import uploads
from promptfleet.api.bodies import IDLE_S, MAX_DEPTH, MAX_VALUES
from promptfleet.api.costs import MAX_ROWS
from promptfleet.api.jobs import MAX_PAGE, MAX_WAIT_S
from promptfleet.api.limits import MAX_LISTENING, MAX_LISTENING_OF_TENANT
from promptfleet.api.metrics import ApiMetrics
from promptfleet.cli.api import BACKLOG, KEEP_ALIVE_S
from promptfleet.options import PromptOptions
from promptfleet_shared.settings import Settings

PAGE = ROOT / "docs/reference/http-api.md"
TEXT = PAGE.read_text(encoding="utf-8")
HOWTO = (ROOT / "docs/howto/run-the-api.md").read_text(encoding="utf-8")
TOLD_HERE = {"jobs", "results", "costs", "health"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return promptfleet.api.create_app(Settings()).openapi()


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"{method.upper()} {path}", operation


def test_every_endpoint_is_told_and_no_other(document: dict[str, Any]) -> None:
    told = set(re.findall(r"^### `([A-Z]+ /[^`]*)`$", TEXT, re.MULTILINE))
    known = dict(_operations(document))
    ours = {name for name, op in known.items() if TOLD_HERE & set(op["tags"])}
    assert ours <= told
    assert told <= set(known)


def test_every_endpoint_is_described(document: dict[str, Any]) -> None:
    for name, operation in _operations(document):
        assert operation.get("summary"), name
        assert operation.get("description"), name
        assert operation["responses"]["default"], name
        assert (operation["security"] == []) == (
            name.split()[1] in {"/healthz", "/readyz", "/metrics"}
        )


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    wanted = set(re.findall(r"'#/components/schemas/(\w+)'", str(document)))
    assert wanted <= set(document["components"]["schemas"])


def test_every_field_and_parameter_is_told(document: dict[str, Any]) -> None:
    cells = re.findall(r"^\| (`[^|]*`) \|", TEXT, re.MULTILINE)
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    schemas = document["components"]["schemas"]
    for shape in ("JobRequest", "JobShape", "ResultShape", "CostShape"):
        assert set(schemas[shape]["properties"]) <= told, shape
    for name, operation in _operations(document):
        if TOLD_HERE & set(operation["tags"]):
            asked = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"}
            assert asked <= told, name


def test_requests_have_the_options_of_python(document: dict[str, Any]) -> None:
    fields = set(document["components"]["schemas"]["JobRequest"]["properties"])
    assert fields == {*PromptOptions.__annotations__, "prompt", "messages"}


def test_every_metric_is_told() -> None:
    page, _ = ApiMetrics().page("text/plain")
    ours = set(re.findall(r"# TYPE (promptfleet_api_\w+)", page.decode()))
    told = set(re.findall(r"^\| `(promptfleet_api_\w+)`", TEXT, re.MULTILINE))
    assert told == {name for name in ours if not name.endswith("_created")}


def test_limits_are_told_as_they_are() -> None:
    settings = Settings()
    mib = 1024 * 1024
    section = TEXT.partition("## Limits")[2]
    for number in (
        f"{settings.api_max_body_bytes // mib} MiB",
        f"{settings.api_max_line_bytes // mib} MiB",
        f"{settings.api_body_memory_bytes // mib} MiB",
        *(
            f"{number:,}"
            for number in (
                MAX_DEPTH,
                MAX_VALUES,
                settings.api_max_prompt_tokens,
                settings.api_max_prompts,
                settings.api_max_queued_per_tenant,
                settings.api_max_queued,
                settings.api_max_waiting,
                settings.api_max_waiting_per_tenant,
                settings.api_max_uploads,
                settings.api_max_submissions,
                MAX_LISTENING,
                MAX_LISTENING_OF_TENANT,
            )
        ),
    ):
        assert f" {number}" in section, number
    assert f"up to {MAX_WAIT_S:g}" in TEXT
    assert f"1 to {MAX_PAGE:,}" in TEXT
    assert f"more than {MAX_ROWS:,} values" in TEXT
    assert f"up to {uploads.MAX_JOBS:,} at a time" in TEXT
    assert f"paused for more than {IDLE_S:g} s" in TEXT
    assert f"{KEEP_ALIVE_S} s" in HOWTO
    assert f"{BACKLOG:,} connections" in HOWTO
