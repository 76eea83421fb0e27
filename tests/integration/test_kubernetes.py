"""infra/k8s: of the right shape, consistent with the code, and KEDA's query counts the work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
import yaml
from tests.integration.deployed import ROOT, dockerfile
from tests.integration.test_deployment import SERVICES
from tests.rows import ago, change, claim_one, insert, outcome, spec

from promptfleet.api import create_app
from promptfleet_shared import __version__
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.tiers import DEFAULT_TIERS

INFRA = ROOT / "infra"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((INFRA / "kustomization.yaml").read_text("utf-8"))
FLEET = load_fleet(INFRA / "fleet.toml")
HOWTO = (ROOT / "docs/howto/deploy-on-kubernetes.md").read_text("utf-8")
# From the first one that knows `preStop.sleep` by default to the newest that is told here.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
# What we use of KEDA's ScaledObject, as https://keda.sh/docs/latest/reference/scaledobject-spec and
# https://keda.sh/docs/latest/scalers/postgresql describe it.
SCALED_OBJECT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["scaleTargetRef", "triggers"],
    "properties": {
        "scaleTargetRef": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {"name": {"type": "string"}},
        },
        "pollingInterval": {"type": "integer", "minimum": 1},
        "cooldownPeriod": {"type": "integer", "minimum": 0},
        "minReplicaCount": {"type": "integer", "minimum": 0},
        "maxReplicaCount": {"type": "integer", "minimum": 1},
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "horizontalPodAutoscalerConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"behavior": {"type": "object"}},
                }
            },
        },
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "metadata"],
                "properties": {
                    "type": {"const": "postgresql"},
                    "metadata": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["connectionFromEnv", "query", "targetQueryValue"],
                        "properties": {
                            name: {"type": "string"}
                            for name in (
                                "connectionFromEnv",
                                "query",
                                "targetQueryValue",
                                "activationTargetQueryValue",
                            )
                        },
                    },
                },
            },
        },
    },
}


def manifests() -> Iterator[dict[str, Any]]:
    for path in KUSTOMIZATION["resources"]:
        yield from yaml.safe_load_all((INFRA / path).read_text("utf-8"))


MANIFESTS = list(manifests())
BY_NAME = {(m["kind"], m["metadata"]["name"]): m for m in MANIFESTS}
OURS = [m for m in MANIFESTS if m["kind"] != "ScaledObject"]
RUNNING = {
    m["metadata"]["name"].removeprefix("promptfleet-"): m
    for m in MANIFESTS
    if m["kind"] in {"Deployment", "Job"}
}
WORKERS = {f"worker-{tier}": tier for tier in DEFAULT_TIERS}


def pod(name: str) -> dict[str, Any]:
    found: dict[str, Any] = RUNNING[name]["spec"]["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = pod(name)["containers"]
    return dict(found)


def environment(name: str) -> dict[str, Any]:
    """Each variable's value, or where it comes from."""
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(name).get("env", [])}


def scaled(tier: str) -> dict[str, Any]:
    found: dict[str, Any] = BY_NAME["ScaledObject", f"promptfleet-worker-{tier}"]["spec"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OURS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_manifests_follow_the_schemas_of_kubernetes(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_mistake_in_a_manifest_is_found() -> None:
    wrong = yaml.safe_load(yaml.safe_dump(RUNNING["api"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["comand"] = ["sh"]
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("tier", DEFAULT_TIERS)
def test_scaled_objects_follow_kedas_description(tier: str) -> None:
    manifest = BY_NAME["ScaledObject", f"promptfleet-worker-{tier}"]
    assert manifest["apiVersion"] == "keda.sh/v1alpha1"
    jsonschema.validate(scaled(tier), SCALED_OBJECT)
    # KEDA hands this on to the autoscaler that it makes.
    autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "made-by-keda"},
        "spec": {
            "scaleTargetRef": {"kind": "Deployment", **scaled(tier)["scaleTargetRef"]},
            "maxReplicas": scaled(tier)["maxReplicaCount"],
            **scaled(tier)["advanced"]["horizontalPodAutoscalerConfig"],
        },
    }
    kubernetes_validate.validate(autoscaler, VERSIONS[-1], strict=True)


def test_a_mistake_in_a_scaled_object_is_found() -> None:
    with pytest.raises(jsonschema.ValidationError, match="cooldown"):
        jsonschema.validate({**scaled("basic"), "cooldown": 300}, SCALED_OBJECT)


def test_kustomization_holds_all_and_what_it_names_exists() -> None:
    files = {f"k8s/{path.name}" for path in (INFRA / "k8s").glob("*.yaml")}
    assert set(KUSTOMIZATION["resources"]) == files
    (image,) = KUSTOMIZATION["images"]
    assert (image["name"], image["newTag"]) == ("promptfleet", __version__)
    generated = {made["name"]: made for made in KUSTOMIZATION["configMapGenerator"]}
    assert generated.keys() == {"promptfleet-files", "promptfleet-settings"}
    mounted = {
        f"/etc/promptfleet/{f.split('/')[-1]}" for f in generated["promptfleet-files"]["files"]
    }
    variables = " ".join(rest for name, rest in dockerfile() if name == "ENV")
    assert f"PROMPTFLEET_CONFIG={min(mounted)}" in variables
    assert all((INFRA / file).is_file() for file in generated["promptfleet-files"]["files"])
    settings = {f"PROMPTFLEET_{field.upper()}" for field in Settings.model_fields}
    literals = {pair.split("=")[0] for pair in generated["promptfleet-settings"]["literals"]}
    assert literals <= settings
    for name in RUNNING:
        for volume in pod(name)["volumes"]:
            assert volume.get("configMap", {"name": "promptfleet-files"})["name"] in generated
        for source in container(name).get("envFrom", []):
            if "configMapRef" in source:
                assert source["configMapRef"]["name"] in generated


def test_commands_are_those_of_compose_which_a_test_starts() -> None:
    assert RUNNING.keys() == {"migrate", "api", "flower", *WORKERS}
    for name in RUNNING:
        assert container(name)["command"] == SERVICES[name.replace("-", "_")]["command"]


def test_each_tier_has_the_same_workers() -> None:
    assert FLEET.tier_names == DEFAULT_TIERS

    def of(tier: str) -> str:
        text = (INFRA / f"k8s/worker-{tier}.yaml").read_text("utf-8")
        text = re.sub(
            r"# Never none.*|# None while.*|(min\w+Count|targetQueryValue|LIMIT)\W+\d+", "", text
        )
        return re.sub(rf"\b{tier}\b(?!:\n)", "TIER", text)  # `advanced:` is a key of KEDA's, too

    assert len({of(tier) for tier in DEFAULT_TIERS}) == 1


def test_images_are_pinned() -> None:
    assert {container(name)["image"] for name in RUNNING} == {f"promptfleet:{__version__}"}


@pytest.mark.parametrize("name", RUNNING)
def test_pods_may_do_no_more_than_they_must(name: str) -> None:
    user = next(rest for key, rest in dockerfile() if key == "RUN" and "useradd" in rest)
    context = pod(name)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"--uid {context['runAsUser']} " in user
    assert f"--gid {context['runAsGroup']} " in user
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(name)["automountServiceAccountToken"] is False
    assert {"requests", "limits"} == container(name)["resources"].keys()
    assert "memory" in container(name)["resources"]["limits"]
    # A Service named promptfleet-api would otherwise set PROMPTFLEET_API_PORT.
    assert pod(name)["enableServiceLinks"] is False


def test_secrets_are_named_and_told_of() -> None:
    told = set(re.findall(r"--from-literal=([\w-]+)=", HOWTO))
    for name in RUNNING:
        for variable, value in environment(name).items():
            secret = re.search("URL|AUTH|SECRET|KEY", variable)
            assert bool(secret) == isinstance(value, dict), variable
            if secret:
                assert value["secretKeyRef"]["name"] == "promptfleet"
                assert value["secretKeyRef"]["key"] in told
        for source in container(name).get("envFrom", []):
            if "secretRef" in source:
                assert f"create secret generic {source['secretRef']['name']} " in HOWTO
    keys = {d.api_key_env for model in FLEET.models.values() for d in model.deployments}
    assert {key for key in keys if key} <= told


def test_variables_are_settings() -> None:
    settings = {f"PROMPTFLEET_{field.upper()}" for field in Settings.model_fields}
    # Of Flower, and of `promptfleet api` itself.
    others = {"FLOWER_ADDRESS", "FLOWER_PORT", "FLOWER_BASIC_AUTH"}
    others |= {"PROMPTFLEET_API_HOST", "PROMPTFLEET_API_PORT", "PROMPTFLEET_API_WORKERS"}
    for name in RUNNING:
        assert environment(name).keys() <= settings | others
        service = SERVICES[name.replace("-", "_")]["environment"]
        fixed = {k: v for k, v in environment(name).items() if isinstance(v, str)}
        assert fixed == {k: str(service[k]) for k in fixed}


def test_probes_ask_the_pages_that_are_served() -> None:
    api = create_app(Settings()).openapi()["paths"]
    for name in [*WORKERS, "api", "flower"]:
        ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
        asked = {k: container(name)[k]["httpGet"] for k in container(name) if k.endswith("Probe")}
        assert asked.keys() == {"startupProbe", "livenessProbe", "readinessProbe"}
        own = {str(value) for value in environment(name).values()}
        assert all(str(ports[probe["port"]]) in own for probe in asked.values())
        live, ready = asked["livenessProbe"]["path"], asked["readinessProbe"]["path"]
        if name == "flower":
            assert live == ready == "/healthcheck"
            assert f"{live}'" in str(SERVICES["flower"]["healthcheck"]["test"])
            continue
        assert (live, ready) == ("/healthz", "/readyz")
        assert {live, ready} <= api.keys()  # and a worker's own are those, too: test_health
        scraped = RUNNING[name]["spec"]["template"]["metadata"]["annotations"]
        assert int(scraped["prometheus.io/port"]) in ports.values()


def test_pods_get_more_time_to_stop_than_they_drain() -> None:
    fields = Settings.model_fields
    for name in WORKERS:
        assert pod(name)["terminationGracePeriodSeconds"] > fields["drain_s"].default + 10
    pause_s = container("api")["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = fields["api_drain_s"].default + pause_s
    assert pod("api")["terminationGracePeriodSeconds"] > drain_s + 10


def test_selectors_find_their_pods() -> None:
    for manifest in MANIFESTS:
        if manifest["kind"] in {"Deployment", "Service", "PodDisruptionBudget"}:
            selector = manifest["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            found = [
                n
                for n, m in RUNNING.items()
                if m["spec"]["template"]["metadata"]["labels"] == wanted
            ]
            assert [f"promptfleet-{name}" for name in found] == [manifest["metadata"]["name"]]
        if manifest["kind"] == "PodDisruptionBudget":  # else a single pod keeps its node for ever
            assert manifest["spec"]["maxUnavailable"] == 1
    for name in [*WORKERS, "api"]:
        assert ("PodDisruptionBudget", f"promptfleet-{name}") in BY_NAME


def test_keda_scales_by_what_a_worker_holds() -> None:
    least = {tier: scaled(tier)["minReplicaCount"] for tier in DEFAULT_TIERS}
    assert max(least.values()) > 0  # somebody sweeps
    for name, tier in WORKERS.items():
        assert scaled(tier)["scaleTargetRef"]["name"] == RUNNING[name]["metadata"]["name"]
        assert "replicas" not in RUNNING[name]["spec"]  # it would undo what KEDA said
        metadata = scaled(tier)["triggers"][0]["metadata"]
        assert isinstance(environment(name)[metadata["connectionFromEnv"]], dict)
        calls = FLEET.batch_options(tier).max_concurrent_calls
        assert int(metadata["targetQueryValue"]) == calls
        assert f"LIMIT {calls * scaled(tier)['maxReplicaCount']})" in metadata["query"]


def test_kedas_query_counts_the_work_of_its_tier(database: sa.Engine) -> None:
    waiting = [spec("a"), spec("b")]
    later, taken, lost, handed_in, ended = (spec(text) for text in "cdefg")
    other = spec("h", tier="standard")
    insert(database, *waiting, later, taken, lost, handed_in, ended, other)
    change(database, later.id, run_at=ago(-3600))
    claim_one(database, taken.id)
    claim_one(database, lost.id)
    change(database, lost.id, lease_until=ago(1))
    change(database, handed_in.id, state="'submitted'")
    with database.begin() as connection:
        finish(connection, [outcome(claim_one(database, ended.id))])

    counted = {}
    for tier in DEFAULT_TIERS:
        query = scaled(tier)["triggers"][0]["metadata"]["query"]
        with database.connect() as connection:
            counted[tier] = connection.exec_driver_sql(query).scalar_one()
    assert counted == {"basic": 4, "standard": 1, "advanced": 0}
