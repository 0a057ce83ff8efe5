"""deploy/kubernetes: against Kubernetes' schemas and what the services have. No cluster has seen it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.command.main import main

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
ROLES = ("index", "router", "engine", "gateway")
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    path.name: [*yaml.safe_load_all(path.read_text())] for path in sorted(FOLDER.glob("*.yaml"))
}


def of(role: str, *kinds: str) -> dict[str, Any]:
    (found,) = [each for each in DOCUMENTS[f"{role}.yaml"] if each["kind"] in kinds]
    return found


def pod_of(role: str) -> dict[str, Any]:
    spec: dict[str, Any] = of(role, "StatefulSet", "Deployment")["spec"]["template"]["spec"]
    return spec


def settings_of(role: str, directory: Path) -> Settings:
    """As its container has them, in a pod of one name and address."""
    (config,) = DOCUMENTS["config.yaml"]
    (directory / "microserve.toml").write_text(config["data"]["microserve.toml"])
    pod = {"$(POD_NAME)": "pod-0", "$(POD_IP)": "10.0.0.7"}
    environment = {}
    for each in pod_of(role)["containers"][0]["env"]:
        if "value" in each:
            text = each["value"]
            for name, value in pod.items():
                text = text.replace(name, value)
            environment[each["name"]] = text
    return load_settings(directory / "microserve.toml", environment=environment)


def validate(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_document_follows_its_schema_which_can_fail(tmp_path: Path) -> None:
    paths = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "kustomization.yaml"]
    done = validate(*paths)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "router.yaml").write_text(
        (FOLDER / "router.yaml").read_text().replace("readinessProbe", "ready")
    )
    assert validate(tmp_path / "router.yaml").returncode


def test_kustomization_names_every_file() -> None:
    (kustomization,) = DOCUMENTS["kustomization.yaml"]
    assert {*kustomization["resources"], "kustomization.yaml"} == set(DOCUMENTS)
    assert {c["image"] for role in ROLES for c in pod_of(role)["containers"]} == {
        image["name"] for image in kustomization["images"]
    }


@pytest.mark.parametrize("role", ROLES)
def test_ports_are_those_of_the_settings(role: str, tmp_path: Path) -> None:
    settings, container = settings_of(role, tmp_path), pod_of(role)["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    addresses = {
        "index": {"index": settings.index.address},
        "router": {"router": settings.router.address},
        "engine": {
            "actions": settings.engine.address,
            "events": settings.engine.events_address,
            "replay": settings.engine.replay_address,
            "door": settings.kvcache.door_address,
        },
        "gateway": {},
    }[role]
    expected = {name: int(address.rpartition(":")[2]) for name, address in addresses.items()}
    if role == "gateway":
        expected["http"] = settings.gateway.port
    else:
        expected["metrics"] = getattr(settings, role).metrics_port
    assert ports == expected
    service = of(role, "Service")["spec"]["ports"]
    assert {port["name"]: port["port"] for port in service} == ports
    probed = {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")}
    assert probed == {"http" if role == "gateway" else "metrics"}


def test_services_find_each_other_by_names_that_there_are(tmp_path: Path) -> None:
    settings = settings_of("gateway", tmp_path)
    routers = of("router", "StatefulSet")
    hosts = [
        f"tcp://microserve-router-{n}.microserve-router:7101" for n in range(routers["spec"]["replicas"])
    ]
    assert settings.gateway.routers == hosts
    assert routers["metadata"]["name"] == routers["spec"]["serviceName"] == "microserve-router"
    assert of("router", "Service")["spec"]["clusterIP"] == "None"
    assert settings.index.address == f"tcp://{of('index', 'Service')['metadata']['name']}:7100"
    engine = settings_of("engine", tmp_path)
    assert engine.heaps == ["tcp"], "pods share no memory"
    assert (engine.engine.advertise, engine.kvcache.door_address) == ("10.0.0.7", "tcp://10.0.0.7:7113")


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_ends_after_its_drain_and_may_do_nothing(role: str, tmp_path: Path) -> None:
    settings, pod = settings_of(role, tmp_path), pod_of(role)
    container = pod["containers"][0]
    command, *words = container["args"]
    assert command == role and main.get_command(click.Context(main), command) is not None
    assert words == ["--config", "/config/microserve.toml"]
    drain_s = getattr(settings, role).drain_s if role in ("engine", "gateway") else 0.0
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert pod["terminationGracePeriodSeconds"] > drain_s + float(hook[1])
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    for each in [*pod["initContainers"], container]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} == set(each["resources"])
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {m["name"] for each in [*pod["initContainers"], container] for m in each["volumeMounts"]}
    claims = of(role, "StatefulSet", "Deployment")["spec"].get("volumeClaimTemplates", [])
    assert mounts == volumes | {claim["metadata"]["name"] for claim in claims}
    (secret,) = [v["secret"]["secretName"] for v in pod["volumes"] if v["name"] == "secret"]
    assert secret == f"microserve-keys-{role}"
    assert settings.bus.curve_dir in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("role", ROLES)
def test_selectors_are_the_pods_labels_and_several_are_never_all_away(role: str) -> None:
    workload = of(role, "StatefulSet", "Deployment")
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels == of(role, "Service")["spec"]["selector"]
    if workload["spec"]["replicas"] > 1:
        budget = of(role, "PodDisruptionBudget")["spec"]
        assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
