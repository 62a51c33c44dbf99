"""``scripts/gpu-checks``: says so without a GPU, and its checks work on the simulated CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def checks(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/gpu/checks.py", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done = checks("--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["card"] == "no GPU"
    assert {one["number"]: one["result"] for one in found["checks"]} == {
        number: "ok" if number == 14 else "skipped" for number in range(1, 16)
    }


def test_what_can_be_simulated_passes_there(tmp_path: Path) -> None:
    done = checks(
        "--simulated",
        "--models",
        "8",
        "--seconds",
        "1",
        "--repeats",
        "24",
        "--json",
        str(tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["number"] for one in found["checks"] if one["result"] == "ok"] == [3, 4, 5, 7, 10, 11, 14]
