"""The base install, in a venv of its own: registry verbs work without ray or torch, serving verbs say what to add."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from flatshare.mnist.cnn import ARCHITECTURE
from flatshare_registry.testing.files import encode_safetensors

ROOT = Path(__file__).parents[2]


class Light:
    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.store = folder / "store"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=120,
            env={
                "FLATSHARE_STORE": self.store.as_uri(),
                "PATH": "/usr/bin:/bin",
                "HOME": str(self.store.parent),
            },
        )


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Light:
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=True)
    subprocess.run(
        [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", str(ROOT)],
        check=True,
        timeout=280,
    )
    return Light(folder)


def test_it_is_light(light: Light) -> None:
    code = "import importlib.util as u; print([n for n in ('ray','torch','fastapi','safetensors') if u.find_spec(n)])"
    assert light.run("python", "-c", code).stdout.strip() == "[]"


def test_a_training_job_can_register_and_promote(light: Light, tmp_path: Path) -> None:
    def weights(seed: int) -> Path:
        random = np.random.default_rng(seed)
        tensors = {
            name: random.random(spec.shape, dtype=np.float32) for name, spec in ARCHITECTURE.tensors.items()
        }
        path = tmp_path / f"{seed}.safetensors"
        path.write_bytes(encode_safetensors(tensors))
        return path

    first = light.run("flatshare", "register", "acme", str(weights(1)), "--create", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["ref"] == "acme@1"
    assert light.run("flatshare", "register", "acme", str(weights(2))).returncode == 0
    promoted = light.run("flatshare", "promote", "acme@2")
    assert "acme:production is now version 2" in promoted.stdout
    assert "no platform runs here to be told" in promoted.stdout
    rolled_back = light.run("flatshare", "rollback", "acme")
    assert "version 1 again" in rolled_back.stdout
    listed = json.loads(light.run("flatshare", "tenants", "list", "--json").stdout)
    assert [(one["id"], one["production"], one["versions"]) for one in listed] == [("acme", 1, [1, 2])]
    assert light.run("flatshare", "gc").returncode == 0


def test_wrong_weights_are_refused_by_name(light: Light, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(encode_safetensors({"w": np.zeros(3, dtype=np.float32)}))
    refused = light.run("flatshare", "register", "acme", str(bad))
    assert refused.returncode == 2
    assert "not a mnist-cnn" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_plan_needs_nothing_more(light: Light) -> None:
    done = light.run("flatshare", "plan", "--tenants", "20", "--requests", "1000", "--target", "0.5")
    assert done.returncode == 0, done.stderr
    assert "needs" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["up"],
        ["edge"],
        ["bench"],
        ["plan", "--plot", "plan.png"],
        ["train", "base"],
        ["train", "handwritings"],
        ["train", "digits"],
        ["convert", "a", "b"],
    ],
)
def test_serving_verbs_say_which_extra_to_install(light: Light, command: list[str]) -> None:
    done = light.run("flatshare", *command)
    assert done.returncode == 2
    assert "flatshare[serve]" in done.stderr
    assert "Traceback" not in done.stderr


def test_client_verbs_work_and_say_when_nothing_answers(light: Light) -> None:
    done = light.run("flatshare", "replicas", "--url", "http://127.0.0.1:9")
    assert done.returncode == 5
    assert "nothing answers at http://127.0.0.1:9" in done.stderr


def test_what_runs_here_can_be_looked_at_and_ended(light: Light) -> None:
    status = light.run("flatshare", "status")
    assert status.returncode == 3
    assert "does not run here" in status.stdout
    down = light.run("flatshare", "down")
    assert down.returncode == 0, down.stderr
    assert "does not run here" in down.stdout


def test_the_local_s3_server_says_which_extra_to_install(light: Light) -> None:
    done = light.run("python", "-m", "flatshare_registry.testing.s3_server", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: the local S3 server needs moto: pip install 'flatshare[local]'"
    ]


def test_licences_of_all_that_is_in_it_are_stated(light: Light) -> None:
    code = (
        "from importlib.metadata import distribution as d; m = d('flatshare').metadata;"
        "print(m['License-Expression'], m.get_all('License-File'))"
    )
    said = light.run("python", "-c", code).stdout
    assert said.startswith("Apache-2.0 AND CC-BY-SA-3.0 ")
    assert "LICENSE" in said
    assert "SOURCE.md" in said


def test_the_packages_carry_what_they_need(light: Light) -> None:
    code = (
        "from importlib.resources import files; d = files('flatshare.mnist') / 'data';"
        "print(sorted(p.name for p in d.iterdir()))"
    )
    names = light.run("python", "-c", code).stdout
    assert "t10k-images-idx3-ubyte.gz" in names
    assert "SOURCE.md" in names
    assert sys.version_info >= (3, 11)
