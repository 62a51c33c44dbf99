"""scripts/test: three groups of tests, and what Ctrl-C makes of them. Stand-ins take the place of pytest."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from flatshare.local.processes import wait_until_ended

SCRIPTS = Path(__file__).parents[3] / "scripts"

PYTHON = f"""#!{sys.executable} -I
import os, signal, sys
try:
    with open(os.environ["STARTED"], "w") as started:
        print(os.getpid(), *sys.argv[1:], file=started)
    if os.environ["STAND_IN"] == "waits":
        signal.pause()
    sys.exit("tests/unit" in sys.argv)  # that group fails
except KeyboardInterrupt:
    sys.exit(2)  # as pytest
"""


class Groups:
    """A tree with the script, and a pipe in which each stand-in says that it has started."""

    def __init__(self, root: Path) -> None:
        self.root, self._pipe = root, root / "started"
        (root / "scripts").mkdir()
        shutil.copy(SCRIPTS / "test", root / "scripts/test")
        for name, text in {"scripts/install": "#!/bin/sh\n", ".venv/bin/python": PYTHON}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        os.mkfifo(self._pipe)
        # For reading and writing: opens at once, and has no end while nobody writes.
        self.started: IO[str] = os.fdopen(os.open(self._pipe, os.O_RDWR), "r")

    @contextlib.contextmanager
    def run(self, stand_in: str) -> Iterator[subprocess.Popen[bytes]]:
        """The script, in a process group of its own, of which nothing is left after the block."""
        script = subprocess.Popen(
            [self.root / "scripts/test"],
            env={**os.environ, "STARTED": str(self._pipe), "STAND_IN": stand_in},
            start_new_session=True,
        )
        try:
            yield script
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
            script.wait()

    def next_started(self) -> tuple[psutil.Process, str]:
        """Waits for it; and the last of its arguments."""
        pid, *arguments = self.started.readline().split()
        return psutil.Process(int(pid)), arguments[-1]

    def more_started(self) -> bool:
        os.set_blocking(self.started.fileno(), False)
        return self.started.readline() != ""


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[Groups]:
    made = Groups(tmp_path)
    yield made
    made.started.close()


def test_ctrl_c_ends_both_groups_and_starts_no_third(groups: Groups) -> None:
    with groups.run("waits") as script:
        running = [groups.next_started()[0] for _ in range(2)]
        os.killpg(script.pid, signal.SIGINT)  # what a terminal does: the whole group
        assert script.wait(30) == 130
        assert wait_until_ended(running, 30) == [], "one takes no Ctrl-C, as it runs in the background"
    assert not groups.more_started()


def test_the_third_group_runs_after_one_that_failed(groups: Groups) -> None:
    with groups.run("ends") as script:
        assert script.wait(30) == 1
    lines = os.read(groups.started.fileno(), 1 << 16).decode().splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("tests/e2e")
