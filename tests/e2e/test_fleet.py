"""``scripts/bench-fleet``, short: from no replica to many and back; every replica replaced.

Homes through a kill are in ``tests/contract/test_haproxy_servers.py`` and ``test_ray_scaling.py``. The hit rate beside
one LRU is measured by the script alone: it takes minutes (``platform/DESIGN.md``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "fleet.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("fleet") / "fleet.json"
    command = [
        sys.executable, str(SCRIPT), "scale", "rollout", "--no-stock", "--json", str(out),
        "--replicas", "2", "--slots", "5", "--tenants", "20", "--requests", "300", "--seconds", "3", "--step-s", "8",
        "--trickle-s", "3",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert out.exists(), ran.stdout + ran.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    for name, part in document.items():
        assert (part["failed"], part["wrong"]) == (0, 0), (name, part)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return document


def test_from_no_replica_to_many_and_back_and_a_trickle_keeps_one(found: dict[str, Any]) -> None:
    scale = found["scale"]
    assert scale["to_most_after_s"] >= 0 and scale["back_to_none_after_s"] > 0, scale
    assert scale["fewest_replicas_under_the_trickle"] == 1, scale


def test_a_rollout_loses_little_of_the_hit_rate(found: dict[str, Any]) -> None:
    rollout = found["rollout"]
    assert rollout["hit_rate_during"] > 0.8 * rollout["hit_rate_before"], rollout
