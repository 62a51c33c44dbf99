"""The files of ``platform/deploy``: valid by their schemas and linters, and in step with the code."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from flatshare.local.serve_config import cluster_environment
from flatshare.pool.app_arguments import AppArguments
from flatshare.settings import Settings

FOLDER = Path(__file__).parents[2] / "platform" / "deploy"
SCHEMA = json.loads((Path(__file__).parent / "data" / "rayservice-v1.json").read_text())
KUBERNETES = "1.31"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def rayservice() -> dict[str, Any]:
    (found,) = documents("rayservice.yaml")
    return found


def check_rayservice(document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMA)
    config = document["spec"]["rayClusterConfig"]
    for group in (config["headGroupSpec"], *config["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_rayservice_is_what_kuberay_takes() -> None:
    check_rayservice(rayservice())


@pytest.mark.parametrize("broken", ["no template", "unknown field", "wrong type", "bad pod", "bad upgrade"])
def test_a_broken_one_is_found(broken: str) -> None:
    document = rayservice()
    config = document["spec"]["rayClusterConfig"]
    if broken == "no template":
        del config["headGroupSpec"]["template"]
    elif broken == "unknown field":
        config["workerGroupSpec"] = []
    elif broken == "wrong type":
        config["workerGroupSpecs"][0]["minReplicas"] = "two"
    elif broken == "bad pod":
        config["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    else:
        document["spec"]["upgradeStrategy"] = "None"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_rayservice(document)


@pytest.mark.parametrize("name", ["edge.yaml", "protection.yaml"])
def test_the_others_are_what_kubernetes_takes(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        broken = copy.deepcopy(document)
        broken["spec"]["podSelektor"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_every_node_has_the_environment_that_serve_reads() -> None:
    config = rayservice()["spec"]["rayClusterConfig"]
    wanted = cluster_environment(Settings())
    for group in (config["headGroupSpec"], *config["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        given = {one["name"]: one["value"] for one in container["env"]}
        assert given.items() >= wanted.items()


def test_its_serve_config_is_for_our_builders_and_names_its_keys_by_file() -> None:
    found = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])
    for app in found["applications"]:
        arguments = AppArguments.model_validate(app["args"])
        assert set(arguments.settings) <= set(Settings.model_fields) and arguments.admin_key_file
    assert [app["external_scaler_enabled"] for app in found["applications"]] == [True, False]


def test_workers_have_a_probe_of_their_own() -> None:
    (group,) = rayservice()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    ray, edge = group["template"]["spec"]["containers"]
    sockets = {"name": "ray", "mountPath": "/tmp/ray"}
    assert sockets in ray["volumeMounts"] and sockets in edge["volumeMounts"], (
        "the edge joins through the pod's raylet"
    )
    config = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])
    assert config["applications"][0]["args"]["settings"]["nodes"] == "several", (
        "else no other pod reaches a replica"
    )
    assert "readinessProbe" in group["template"]["spec"]["containers"][0], "else they never become ready"


def test_the_dockerfile_passes_its_linter_and_a_broken_one_does_not(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install curl\n")
    assert subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True).returncode == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("name", ["flatshare.service", "flatshare-edge.service"])
def test_units_are_what_systemd_takes(name: str, tmp_path: Path) -> None:
    text = (FOLDER / name).read_text().replace("/opt/flatshare/bin/flatshare", "/bin/true")
    (tmp_path / name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (tmp_path / name).write_text(text.replace("Type=notify", "Typ=notify"))
    assert (
        "Typ"
        in subprocess.run(
            ["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True
        ).stderr
    )
