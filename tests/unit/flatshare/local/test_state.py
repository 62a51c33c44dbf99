"""What `up` writes down: found again, never mistaken for another process, cleaned up after a death."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flatshare.errors import LocalError
from flatshare.local.state import PlatformState, find_states


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def state(pid: int, started_at: float, family: tuple[tuple[int, float], ...] = ()) -> PlatformState:
    return PlatformState(
        pid=pid, started_at=started_at, url="http://127.0.0.1:8000", port=8000, edge="haproxy", store="file:///s",
        replicas=2, slots=3, log="", ray_address="127.0.0.1:6379", family=family,
    )  # fmt: skip


def me() -> tuple[int, float]:
    return os.getpid(), psutil.Process().create_time()


def test_it_comes_back_as_it_was_saved() -> None:
    saved = state(*me(), family=((1, 2.5), (3, 4.5)))
    saved.save()
    assert PlatformState.load(8000) == saved
    assert find_states() == [saved]
    assert PlatformState.parse(saved.text()) == saved
    saved.remove()
    assert PlatformState.read(8000) is None


def test_another_process_with_the_same_id_is_not_it() -> None:
    pid, started_at = me()
    state(pid, started_at - 100).save()
    assert PlatformState.load(8000) is None
    assert PlatformState.read(8000) is not None, "what a dead platform left must still be found"
    assert find_states() == []


def test_leftovers_are_ended_by_id_and_start_time() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    started_at = psutil.Process(child.pid).create_time()
    spared = state(2**22 - 1, 1.0, family=((child.pid, started_at - 100),))
    spared.save()
    assert spared.end_leftovers() == []
    assert child.poll() is None
    dead = state(2**22 - 1, 1.0, family=((child.pid, started_at), (2**22 - 2, 1.0)))
    dead.save()
    assert len(dead.end_leftovers()) == 1
    assert not psutil.pid_exists(child.pid)
    assert PlatformState.read(8000) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', '{"family": 3}'])
def test_a_damaged_file_is_a_clear_error(text: str) -> None:
    state(*me()).save()
    PlatformState.path(8000).write_text(text)
    with pytest.raises(LocalError, match="damaged"):
        PlatformState.read(8000)
