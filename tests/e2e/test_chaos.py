"""``scripts/chaos``, short: what is killed comes back, and nothing is answered wrongly, cut or lost meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "chaos.py"
FAULTS = ("control-killed", "store-down")  # replicas: test_kills.py


def test_faults_lose_nothing_and_pass(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    only = [argument for name in FAULTS for argument in ("--only", name)]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *only, "--seconds", "3", "--json", str(out)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert out.exists(), ran.stdout + ran.stderr
    rows = {row["fault"]: row for row in json.loads(out.read_text())}
    assert tuple(rows) == FAULTS
    for row in rows.values():
        assert (row["wrong"], row["cut"], row["lost"], row["left"]) == (0, 0, 0, 0), row
        assert row["whole_after_s"] is not None, row
        assert row["whole_after_s"] < 60, row
        assert row["requests"] > 0, row
    assert rows["control-killed"]["failed"] == 0, rows
    assert rows["store-down"]["met"] > 0, "no load came from the store meanwhile"
    assert ran.returncode == 0, ran.stdout + ran.stderr
