"""The README's commands, in order, in an empty folder, as a newcomer runs them.

With the project's own environment; with ``FLATSHARE_TEST_README_INSTALL=1`` in a new one, made by the README's own
install line from a copy of what is committed (minutes, and 6 GB).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flatshare_registry.testing.ports import free_ports

ROOT = Path(__file__).parents[2]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Folder of the environment's programs."""
    if not os.environ.get("FLATSHARE_TEST_README_INSTALL"):
        return Path(sys.executable).parent
    (install,) = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    checkout, made = tmp_path / "checkout", tmp_path / "new"
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    path = f"{made / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", install], cwd=checkout, env={**os.environ, "PATH": path}, check=True)
    return made / "bin"


def test_every_command_of_the_readme_runs(programs: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python", "sh"]
    port, serve_port = free_ports(2)
    script = ["set -euo pipefail", "trap 'flatshare down >/dev/null 2>&1 || true' EXIT"]
    for number, (kind, block) in enumerate(blocks):
        if kind == "python":
            (tmp_path / f"{number}.py").write_text(block.replace("8000", str(port)))
            block = f"python {number}.py"
        # A newcomer's machine runs no other cluster; this one may, of another test.
        block = block.replace("flatshare up", "flatshare up --ray local")
        script += [f"echo '=== {number}'", block.replace("127.0.0.1:8000", f"127.0.0.1:{port}")]
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLATSHARE_", "RAY_", "AWS_"))
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={
            **plain, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path),
            "XDG_STATE_HOME": str(tmp_path / "state"), "FLATSHARE_HOST_DIR": str(tmp_path / "host"),
            "FLATSHARE_PORT": str(port), "FLATSHARE_SERVE_PORT": str(serve_port),
            "COLUMNS": "160",
        },
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    start, call, python, operate = re.split(r"=== \d\n", done.stdout)[1:]
    assert re.search(r'"predicted_label": \[\d, \d\]', start)
    assert "acme@1" in start and "answered by acme@1" in start + done.stderr
    assert call.startswith('{"predicted_label":[') and '"name":"acme"' in call
    assert re.fullmatch(r"\{'predicted_label': \[\d\]\} 1 device\n", python)
    assert "acme:production is now version 2" in operate
    assert "acme:production is version 1 again" in operate
