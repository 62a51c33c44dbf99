"""``scripts/bench-fleet``, short: homes through a kill, no replica to many and back, every replica replaced."""

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
        sys.executable, str(SCRIPT), "hits", "kill", "scale", "rollout", "--no-stock", "--json", str(out),
        "--replicas", "3", "--slots", "5", "--tenants", "40", "--requests", "1500", "--seconds", "4", "--trickle-s", "8",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert out.exists(), ran.stdout + ran.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    for name, part in document.items():
        assert (part["failed"], part["wrong"]) == (0, 0), (name, part)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return document


def test_the_fleet_is_as_good_as_one_cache(found: dict[str, Any]) -> None:
    """Of so few slots an uneven share of tenants costs more than of many; long runs: DESIGN.md."""
    assert found["hits"]["hit_rate_of_one_lru"] > 0.9, found["hits"]
    assert found["hits"]["duplicate_factor"] <= 1.1, found["hits"]


def test_a_killed_replica_moves_nobody_elses_models(found: dict[str, Any]) -> None:
    kill = found["kill"]
    assert kill["survivors_kept_home"] >= 0.9 and kill["kept_home_after_replacement"] >= 0.9, kill
    assert kill["came_back_to_the_replacement"] >= 0.9 and kill["reloads_of_haproxy"] == 0, kill


def test_from_no_replica_to_many_and_back_and_a_trickle_keeps_one(found: dict[str, Any]) -> None:
    scale = found["scale"]
    assert scale["to_most_after_s"] >= 0 and scale["back_to_none_after_s"] > 0, scale
    assert scale["fewest_replicas_under_the_trickle"] == 1, scale


def test_a_rollout_loses_little_of_the_hit_rate(found: dict[str, Any]) -> None:
    rollout = found["rollout"]
    assert rollout["hit_rate_during"] > 0.8 * rollout["hit_rate_before"], rollout
