"""``platform/examples``, as their page has them: installed, run, and served by a replica."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "platform" / "examples"

SERVE = """
import asyncio, sys
import numpy as np
from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.mnist.digits import load_digits
from flatshare.models.architecture import architecture
from flatshare.replica.build import Replica
from flatshare.settings import load_settings
from flatshare_registry.ids import ModelRef

async def main():
    settings = load_settings(host_dir=sys.argv[1], usage_interval_s=0)
    replica = Replica.build(settings, settings.open_store())
    digits = load_digits()
    rows = architecture("tiny-mlp").preprocess(digits.test_images[:64])
    with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse("acme")) as ticket:
        prediction = await replica.service.predict(ticket, lambda network: rows)
    await replica.close()
    assert prediction.version.probe_logits
    print((prediction.labels == digits.test_labels[:64]).mean())

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("examples")
    installed = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check",
            "--target", str(folder / "site"), str(EXAMPLES / "own_network"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
        "FLATSHARE_STORE": (folder / "store").as_uri(),
    }


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_network_of_ones_own_is_trained_registered_and_served(
    environment: dict[str, str], tmp_path: Path
) -> None:
    trained = run(environment, str(EXAMPLES / "own_network/nightly.py"), "acme")
    assert trained.startswith("acme@1 is in production: 9")
    assert float(run(environment, "-c", SERVE, str(tmp_path / "host")).split()[-1]) > 0.8
    again = run(environment, str(EXAMPLES / "own_network/nightly.py"), "acme")
    assert again.startswith("acme@1 is in production"), "equal weights are no new version"


def test_without_its_package_it_is_no_architecture(environment: dict[str, str]) -> None:
    bare = {**environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_network/nightly.py"), "acme"],
        env=bare,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "there is no architecture 'tiny-mlp'" in done.stderr
