"""infra/prometheus and infra/grafana name only metrics and labels that the code exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from promql_parser import AggregateExpr, Expr, VectorSelector
from tests.docs.pages import ROOT
from tests.docs.test_metrics import _metrics

from promptfleet.api.metrics import ApiMetrics
from promptfleet_workers.metrics import PrometheusHook

RULES = yaml.safe_load((ROOT / "infra/prometheus/alerts.yml").read_text(encoding="utf-8"))
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]
SCRAPED = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((ROOT / "infra/grafana/promptfleet.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
JOBS = {job["job_name"]: job for job in SCRAPED["scrape_configs"]}
# What Prometheus itself adds to every series.
ADDED = {"job", "instance"}


def exported() -> dict[str, set[str]]:
    """The labels of each series that workers and the API export, by the series' name."""
    metrics = dict(_metrics(PrometheusHook()))
    for family in ApiMetrics().registry.collect():
        metrics.setdefault(f"{family.name}_total" if family.type == "counter" else family.name, (
            family.type, _labels_of_api(family.name)
        ))  # fmt: skip
    series = {}
    for name, (kind, labels) in metrics.items():
        series[name] = set(labels)
        if kind == "histogram":
            series |= {f"{name}_sum": set(labels), f"{name}_count": set(labels)}
            series[f"{name}_bucket"] = {*labels, "le"}
    for family in PrometheusHook().registry.collect():
        if family.name.startswith("process_"):
            series[family.name] = set()
    return series


def _labels_of_api(family: str) -> tuple[str, ...]:
    metrics = ApiMetrics()
    metrics.answered("GET", "/healthz", 200, 0.1)
    metrics.refused("waiting")
    for found in metrics.registry.collect():
        if found.name == family:
            return tuple({name for sample in found.samples for name in sample.labels} - {"le"})
    raise AssertionError(family)


SERIES = exported()


def expressions() -> Iterator[tuple[str, str]]:
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def mistakes(expression: str) -> list[str]:
    """What the expression names that nobody exports."""
    found: list[str] = []
    labels: set[str] = set(ADDED)
    grouped: set[str] = set()

    def visit(node: Expr) -> bool:
        if isinstance(node, VectorSelector):
            name = str(node.name)
            if name not in SERIES:
                found.append(name)
            known = SERIES.get(name, set()) | ADDED
            labels.update(known)
            asked = {matcher.name for matcher in node.matchers.matchers}
            found.extend(f"{name}{{{label}}}" for label in asked - known)
        elif isinstance(node, AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found + sorted(f"by ({label})" for label in grouped - labels)


@pytest.mark.parametrize(("name", "expression"), list(expressions()))
def test_expressions_name_what_is_exported(name: str, expression: str) -> None:
    assert mistakes(expression) == []


@pytest.mark.parametrize(
    ("expression", "mistake"),
    [
        ("sum(promptfleet_jobs_done_total)", ["promptfleet_jobs_done_total"]),
        ("promptfleet_calls", ["promptfleet_calls"]),
        ('promptfleet_calls_total{tenant="a"}', ["promptfleet_calls_total{tenant}"]),
        ("sum by (model) (rate(promptfleet_calls_total[5m]))", ["by (model)"]),
        ("promptfleet_api_request_seconds_buckets", ["promptfleet_api_request_seconds_buckets"]),
    ],
)
def test_what_nobody_exports_is_found(expression: str, mistake: list[str]) -> None:
    assert mistakes(expression) == mistake


def test_alerts_say_what_they_are_about() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert alert["annotations"].keys() == {"summary", "description"}
        for label in re.findall(r"\$labels\.(\w+)", str(alert["annotations"])):
            assert f"by ({label})" in alert["expr"], alert["alert"]


def test_what_the_howto_alerts_on_has_a_rule() -> None:
    howto = (ROOT / "docs/howto/monitor-health.md").read_text(encoding="utf-8")
    told = re.findall(r"promptfleet_\w+", howto.partition("## What to alert on")[2])
    assert len(told) >= 5
    ruled = " ".join(alert["expr"] for alert in ALERTS)
    assert [name for name in told if name not in ruled] == []


def test_the_dashboard_is_one() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    (source,) = DASHBOARD["templating"]["list"]
    assert source["type"] == "datasource"
    used = {panel["datasource"]["uid"] for panel in PANELS}
    assert used == {f"${{{source['name']}}}"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_name_labels_that_are_there(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert label in ADDED or f"{label})" in target["expr"], target["expr"]


def test_prometheus_scrapes_what_compose_runs() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    (workers,) = JOBS["promptfleet-workers"]["dns_sd_configs"]
    assert set(workers["names"]) == {name for name in services if name.startswith("worker_")}
    port = services["worker_basic"]["environment"]["PROMPTFLEET_HEALTH_PORT"]
    (api,) = JOBS["promptfleet-api"]["dns_sd_configs"]
    assert (workers["port"], api["names"]) == (port, ["api"])
    assert api["port"] == services["api"]["environment"]["PROMPTFLEET_API_PORT"]
    for file in SCRAPED["rule_files"]:
        assert (ROOT / "infra/prometheus" / file).is_file()
    jobs = set(re.findall(r'job="([\w-]+)"', json.dumps(DASHBOARD).replace("\\", "")))
    assert jobs <= JOBS.keys()
