"""`promptfleet api` before it serves anything, and what its log lines show."""

from __future__ import annotations

import logging
import logging.config
import subprocess
import sys

import orjson
import pytest
from typer.testing import CliRunner

from promptfleet.api.logs import ConsoleFormatter, JsonFormatter, log_config
from promptfleet.cli import api, app

runner = CliRunner()


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    ended = runner.invoke(app, ["api"])
    assert ended.exit_code != 0
    assert "pip install 'promptfleet[api]'" in ended.output


def test_a_wrong_setting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_API_MAX_UPLOADS", "none")
    ended = runner.invoke(app, ["api"])
    assert ended.exit_code != 0
    assert "PROMPTFLEET_API_MAX_UPLOADS" in ended.output
    assert "Traceback" not in ended.output


def test_the_producer_stays_light() -> None:
    heavy = ["fastapi", "uvicorn", "starlette", "prometheus_client"]
    code = (
        f"import sys, promptfleet, promptfleet.cli; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lines_have_their_fields() -> None:
    record = logging.makeLogRecord(
        {"name": "promptfleet.api", "levelno": logging.ERROR, "levelname": "ERROR"}
        | {"msg": "request_failed", "route": "/v1/jobs", "at": ["a.py:1"]}
    )
    line = orjson.loads(JsonFormatter().format(record))
    assert (line["event"], line["level"], line["route"]) == ("request_failed", "error", "/v1/jobs")
    assert line["at"] == ["a.py:1"]
    assert ConsoleFormatter().format(record).endswith("request_failed route=/v1/jobs at=['a.py:1']")
    logging.config.dictConfigClass(log_config("json", "info"))  # a valid configuration
