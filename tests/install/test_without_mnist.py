"""The platform without its MNIST room, and with an operator's own architecture: everything else works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OWN = """
import numpy as np
from flatshare.models.architecture import Architecture, InputSpec
from flatshare_registry.weights import TensorSpec


def build():
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()


ARCHITECTURE = Architecture(
    name="own", input=InputSpec("image", (3, 2, 2)), classes=3, build=build,
    tensors={"1.weight": TensorSpec("F32", (3, 12)), "1.bias": TensorSpec("F32", (3,))},
    preprocess=lambda pixels: (pixels.astype(np.float32) / 255).transpose(0, 3, 1, 2),
)
"""

SERVE = """
import asyncio
import numpy as np
from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.models.architecture import architecture, architecture_names
from flatshare.models.probe import probe_logits
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import InvalidInput
from flatshare_registry.ids import ModelRef
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.files import encode_safetensors

try:
    import flatshare.mnist
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mnist is here: this shows nothing")
assert architecture_names() == ["broken", "own"], architecture_names()
try:
    architecture("broken")
except InvalidInput as error:
    assert "can't be loaded: ModuleNotFoundError" in error.message
store, network, acme = MemoryStore(), architecture("own"), TenantId("acme")
registry = Registry(store)
registry.create_tenant(acme)
weights = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
file = encode_safetensors({"1.weight": weights, "1.bias": np.zeros(3, np.float32)})
registry.register(acme, file, "own", network.tensors, probe=lambda data: probe_logits(network, data))


async def main():
    replica = Replica.build(Settings(host_dir="off"), store)
    ref, rows = ModelRef.parse("acme"), np.ones((2, 3, 2, 2), np.float32)
    with await replica.service.enter(LOCAL_OPERATOR, ref) as ticket:
        answer = await replica.service.predict(ticket, lambda network: rows)
    np.testing.assert_allclose(answer.logits, rows.reshape(2, 12) @ weights.T, rtol=1e-5)
    await replica.close()
    print("answered", answer.version.name)


asyncio.run(main())
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of both packages without ``mnist/``, and a plug-in of an operator's."""
    for folder in ("platform/flatshare", "registry/flatshare_registry"):
        shutil.copytree(
            ROOT / folder, tmp_path / Path(folder).name, ignore=shutil.ignore_patterns("mnist", "__pycache__")
        )
    (tmp_path / "own_network.py").write_text(OWN)
    info = tmp_path / "flatshare-99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flatshare\nVersion: 99\n")
    points = "own = own_network:ARCHITECTURE\nbroken = nowhere.to_be_found:ARCHITECTURE\n"
    (info / "entry_points.txt").write_text(f"[flatshare.architectures]\n{points}")
    return tmp_path


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S and a path of our own: the editable install would bring the room back.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{site}{os.pathsep}{packages}",
        "FLATSHARE_STORE": f"file://{site}/store",
    }
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_operators_own_architecture_is_registered_and_answered(site: Path) -> None:
    done = run(site, "-c", SERVE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "answered acme@1"


@pytest.mark.parametrize(
    "verb", [["--help"], ["tenants", "list"], ["gc"], ["quotas", "--help"]], ids=" ".join
)
def test_verbs_that_know_no_mnist_work(site: Path, verb: list[str]) -> None:
    done = run(site, "-m", "flatshare.cli.main", *verb)
    assert done.returncode == 0, done.stderr


def test_a_verb_that_needs_it_says_so_in_a_line(site: Path) -> None:
    done = run(site, "-m", "flatshare.cli.main", "train", "base")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "flatshare.mnist" in done.stderr
    assert "Traceback" not in done.stderr
