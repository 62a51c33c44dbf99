"""What `up` writes down: found again, never mistaken for another process, cleaned up after a death."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flatshare.errors import LocalError
from flatshare.local.state import PlatformState, find_states, known_states
from flatshare.settings import load_settings


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
    assert child.wait(0) != 0, "it has ended when the call returns"
    assert PlatformState.read(8000) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', '{"family": 3}'])
def test_a_damaged_file_is_a_clear_error(text: str) -> None:
    state(*me()).save()
    PlatformState.path(8000).write_text(text)
    with pytest.raises(LocalError, match="damaged"):
        PlatformState.read(8000)


CLAIM = """
import sys
from flatshare.errors import LocalError
from flatshare.local.state import PlatformState
from flatshare.settings import load_settings
state = PlatformState.starting(load_settings(store="file:///s"), log="")
sys.stdin.readline()
try:
    state.claim()
    print("has it", flush=True)
except LocalError as error:
    print(error.message, flush=True)
sys.stdin.read()
"""


def test_of_several_that_start_at_a_time_one_has_the_port() -> None:
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        said = []
        for one in claimers:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        for one in claimers:
            assert one.stdout is not None
            said.append(one.stdout.readline().strip())
        assert said.count("has it") == 1
        winner = claimers[said.index("has it")]
        assert all(f"pid {winner.pid}" in line for line in said if line != "has it")
        assert all("flatshare down --port 8000" in line for line in said if line != "has it")
        (known,) = known_states()
        assert (known.phase, known.pid) == ("starting", winner.pid)
        assert find_states() == [], "clients do not talk to what only starts"
    finally:
        for one in claimers:
            one.communicate("")


def test_a_dead_one_makes_way() -> None:
    state(2**22 - 1, 1.0).save()
    mine = PlatformState.starting(load_settings(store="file:///s"), log="")
    mine.claim()
    assert PlatformState.read(8000) == mine
    mine.remove()
    assert known_states() == []


def test_nobody_forgets_what_another_wrote() -> None:
    theirs = state(*me())
    theirs.save()
    state(2**22 - 1, 1.0).remove()
    assert PlatformState.read(8000) == theirs
