"""What tests start ends with pytest (tests/leftovers.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flatshare.local.processes import wait_until_ended

ROOT = Path(__file__).parents[2]

TESTS = """
import signal
import subprocess
import sys

import pytest

PAUSE = "import signal; signal.pause()"
DETACHED = (
    "import subprocess, sys;"
    f"print(subprocess.Popen([sys.executable, '-c', {PAUSE!r}], start_new_session=True, stdout=2).pid)"
)


@pytest.fixture
def noted(request):
    yield
    (request.config.rootpath / "torn-down").touch()


def test_endless(noted):
    child = subprocess.Popen([sys.executable, "-c", PAUSE])
    orphan = subprocess.run([sys.executable, "-c", DETACHED], stdout=subprocess.PIPE, text=True, check=True)
    print("\\nstarted", child.pid, int(orphan.stdout), flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_pytest_that_is_ended_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """Also one that its parent let go long ago, in a session of its own, as a detached ``up`` is."""
    # A shell starts what it starts in the background with SIGINT ignored, and that is inherited.
    (tmp_path / "conftest.py").write_text(
        "import signal\nfrom tests.leftovers import pytest_configure\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_endless.py").write_text(TESTS)
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as ran:
        assert ran.stdout is not None
        try:
            words = next(line for line in ran.stdout if line.startswith("started ")).split()
            started = [psutil.Process(int(pid)) for pid in words[1:]]
            assert len(started) == 2
            ran.send_signal(number)
            assert ran.wait(30) == (
                -signal.SIGKILL if number == signal.SIGKILL else pytest.ExitCode.INTERRUPTED
            )
            assert wait_until_ended(started, 30) == []
        finally:
            ran.kill()  # nothing to wait for but its end
    assert (tmp_path / "torn-down").exists() == (number != signal.SIGKILL)
