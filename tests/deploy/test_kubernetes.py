"""The manifests say what the service understands: its addresses, settings and metrics, and the time it takes to end."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mithridate.errors import OptionError
from service.app import create_app
from service.metrics import Metrics
from service.settings import Settings, load_settings

yaml = pytest.importorskip("yaml", reason="reading the manifests needs PyYAML")

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
CUSTOM = {"ServiceMonitor"}  # the Prometheus operator's: Kubernetes itself has no schema for it
VERSIONS = ("1.32", "1.37")


def _documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def _kustomizations() -> dict[str, dict[str, Any]]:
    files = sorted(KUBERNETES.glob("*/kustomization.yaml"))
    return {file.parent.name: yaml.safe_load(file.read_text()) for file in files}


@cache
def _objects() -> dict[tuple[str, str], dict[str, Any]]:
    """Every object of every kustomization by its folder and kind, as it stands in its file."""
    named = [(name, KUBERNETES / name / file) for name, made in _kustomizations().items() for file in made["resources"]]
    read = [(name, found) for name, file in named if file.is_file() for found in _documents(file.read_text())]
    return {(name, found["kind"]): found for name, found in read}


def _pod(folder: str, kind: str) -> dict[str, Any]:
    pod: dict[str, Any] = _objects()[folder, kind]["spec"]["template"]
    return pod


def _container() -> dict[str, Any]:
    (container,) = _pod("base", "Deployment")["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def _environment() -> dict[str, str]:
    return {item["name"]: item.get("value", "2") for item in _container()["env"]}


def _labels(of: dict[str, Any]) -> set[tuple[str, str]]:
    return set(of["metadata"]["labels"].items())


def test_every_file_is_part_of_a_kustomization_and_every_part_is_there() -> None:
    for folder, made in _kustomizations().items():
        patches = [patch["path"] for patch in made.get("patches", ())]
        parts = {(KUBERNETES / folder / part).resolve() for part in [*made["resources"], *patches]}
        assert all(part.exists() for part in parts), parts
        rest = {file.resolve() for file in (KUBERNETES / folder).glob("*.yaml")} - parts
        assert {file.name for file in rest} <= {"kustomization.yaml", "adapter-rule.yaml"}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_own_schemas_accept_every_object(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="it carries the schemas")
    checked = [found for found in _objects().values() if found["kind"] not in CUSTOM]
    assert len(checked) >= 8
    for found in checked:
        validator.validate(found, version, strict=True)


@pytest.mark.parametrize("folder", ["base", "cuda", "bundle", "monitoring"])
def test_kustomize_builds_it(folder: str) -> None:
    command = [program for program in ("kustomize", "kubectl") if shutil.which(program)][:1]
    if not command:
        pytest.skip("neither kustomize nor kubectl is installed")
    verb = "build" if command == ["kustomize"] else "kustomize"
    ran = subprocess.run([*command, verb, str(KUBERNETES / folder)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    validator = pytest.importorskip("kubernetes_validate", reason="it carries the schemas")
    built = _documents(ran.stdout)
    for found in built:
        assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "mithridate"
        if found["kind"] not in CUSTOM:
            validator.validate(found, VERSIONS[0], strict=True)
    if folder == "cuda":
        (deployment,) = (found for found in built if found["kind"] == "Deployment")
        spec = deployment["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert container["image"] == "mithridate:cuda"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert {"name": "MITHRIDATE_DEVICE", "value": "cuda"} in container["env"]
        assert {item["name"] for item in container["env"]} > set(_environment()), (
            "the patch adds, it takes nothing away"
        )
        assert spec["runtimeClassName"] == "nvidia"


def test_whatever_selects_pods_finds_those_of_the_service_and_not_the_job() -> None:
    service, job = _labels(_pod("base", "Deployment")), _labels(_pod("bundle", "Job"))
    selectors = [
        _objects()["base", "Service"]["spec"]["selector"],
        _objects()["base", "Deployment"]["spec"]["selector"]["matchLabels"],
        _objects()["base", "PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        _objects()["base", "NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert set(selector.items()) <= service
        assert not set(selector.items()) <= job
    # The monitor selects Services, whose labels the kustomization gives.
    monitor = _objects()["monitoring", "ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert set(monitor.items()) <= set(_kustomizations()["base"]["labels"][0]["pairs"].items())
    target = _objects()["base", "HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "mithridate"}


def test_probes_and_the_monitor_ask_addresses_that_the_service_has() -> None:
    app = create_app(load_settings(bundle="not-opened"))
    addresses = {getattr(route, "path", None) for route in app.routes}
    container = _container()
    (port,) = container["ports"]
    assert port["containerPort"] == int(re.findall(r"MITHRIDATE_PORT=(\d+)", (ROOT / "Dockerfile").read_text())[0])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
        assert container[probe]["httpGet"]["path"] in addresses
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    (service_port,) = _objects()["base", "Service"]["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    (endpoint,) = _objects()["monitoring", "ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == service_port["name"]
    assert endpoint["path"] in addresses
    (rule,) = _objects()["base", "NetworkPolicy"]["spec"]["ingress"]
    assert [item["port"] for item in rule["ports"]] == [port["name"]]


def _names_in(file: str) -> set[str]:
    return set(re.findall(r"\bMITHRIDATE_[A-Z_]+", (ROOT / file).read_text()))


def test_every_setting_that_is_set_exists() -> None:
    known = {f"MITHRIDATE_{name.upper()}" for name in Settings.model_fields}
    for file in ("Dockerfile", "docker-compose.yml", "deploy/kubernetes/base/deployment.yaml", "deploy/README.md"):
        assert _names_in(file) <= known, file
    assert set(_environment()) <= known


def test_the_service_takes_these_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert str(settings.bundle) == "/data/bundle"
    monkeypatch.setenv("MITHRIDATE_DRAIN_SECONDS", "soon")
    with pytest.raises(OptionError, match="drain_seconds"):
        load_settings()


def test_a_pod_is_given_longer_to_end_than_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    allowed = _pod("base", "Deployment")["spec"]["terminationGracePeriodSeconds"]
    assert settings.drain_seconds + settings.drain_timeout_s + 10 <= allowed, "10 s for the engine to end"
    assert settings.drain_timeout_s >= settings.deadline_ms / 1000, "an admitted request may take its deadline"
    readiness = _container()["readinessProbe"]
    unready = readiness["periodSeconds"] * readiness["failureThreshold"] + readiness["timeoutSeconds"]
    assert unready < settings.drain_seconds, "whoever asks must have seen that it is not ready"


@pytest.mark.parametrize(("folder", "kind"), [("base", "Deployment"), ("bundle", "Job")])
def test_pods_may_do_nothing_but_their_work(folder: str, kind: str) -> None:
    spec = _pod(folder, kind)["spec"]
    user = int(re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0])
    pod = spec["securityContext"]
    assert (pod["runAsNonRoot"], pod["runAsUser"], pod["runAsGroup"]) == (True, user, user)
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False, "a Service named mithridate would set MITHRIDATE_PORT to tcp://..."
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in spec["volumes"]}
    writable = {mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")}
    assert writable == ({"/tmp"} if kind == "Deployment" else {"/tmp", "/data"})
    assert "emptyDir" in next(volume for volume in spec["volumes"] if volume["name"] == "tmp")
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume
    }
    assert claims == {_objects()["bundle", "PersistentVolumeClaim"]["metadata"]["name"]}


def test_nothing_goes_out_and_only_two_namespaces_come_in() -> None:
    policy = _objects()["base", "NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    assert all(set(source) == {"namespaceSelector"} and source["namespaceSelector"] for source in rule["from"])


def test_it_is_scaled_by_a_metric_that_the_service_exports() -> None:
    spec = _objects()["base", "HorizontalPodAutoscaler"]["spec"]
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    exported = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    assert name in exported
    (rule,) = yaml.safe_load((KUBERNETES / "monitoring/adapter-rule.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert spec["minReplicas"] > _objects()["base", "PodDisruptionBudget"]["spec"]["minAvailable"]
