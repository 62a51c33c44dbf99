"""``scripts/kills``, short: no request that the edge may send again fails, is cut or gets a wrong answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "kills.py"


def test_replicas_killed_under_load_cost_no_request(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "3", "--json", str(out)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert out.exists(), ran.stdout + ran.stderr
    found = json.loads(out.read_text())
    assert (found["kills"], found["failed"], found["cut"], found["wrong"]) == (3, 0, 0, 0), found
    assert all(found["bodies"][name]["ok"] > 50 for name in ("3kb", "40kb")), found
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # One that HAProxy closes without an answer, so that the client sends it again, it does not log.
    closed = sum(one["closed"] for one in found["bodies"].values())
    assert found["lines"] == found["ids"] == found["requests"] - closed, "one line each, and an id of its own"
    assert found["answered_lines"] == sum(one["ok"] for one in found["bodies"].values()), (
        "with the tier that answered"
    )
