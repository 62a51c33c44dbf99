"""``flatshare logs``: lines of the access log, those asked for, also while they come and the file is cut."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatshare.cli.logs_verb import lines_of
from flatshare.cli.main import app
from flatshare_registry.errors import InvalidInput

GOOD = {"time": 1795738876.9, "id": "i1", "method": "POST", "path": "/predict", "model": "acme", "tenant": "acme",
        "version": "7", "tier": "device", "replica": "r1", "status": 200, "ms": 5}  # fmt: skip
BAD = {**GOOD, "id": "i2", "tenant": "-", "version": "-", "model": "globex\x1b[2J", "status": 404}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "access.log"
    path.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, BAD)) + "no JSON\n[]\n" + '{"half')
    monkeypatch.setenv("FLATSHARE_ACCESS_LOG", str(path))
    return path


def ok(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["logs", *arguments], catch_exceptions=True)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout.splitlines()


def test_lines_are_shown_by_tenant_and_by_outcome(log: Path) -> None:
    first, second = ok()
    assert first.endswith("200 5 POST /predict acme@7 device i1")
    assert "globex\\x1b[2J" in second and second.endswith("i2"), "nothing moves the terminal's cursor"
    assert [one.rpartition(" ")[2] for one in ok("--tenant", "acme")] == ["i1"]
    assert [one.rpartition(" ")[2] for one in ok("--failed")] == ["i2"]
    assert ok("--tenant", "acme", "--failed") == []
    with log.open("a") as file:
        file.write('": 1}\n' + json.dumps({**BAD, "model": "acme:canary", "id": "i3"}) + "\n")
    assert [one.rpartition(" ")[2] for one in ok("--tenant", "acme", "--failed")] == ["i3"]
    assert json.loads(ok("--json", "--tenant", "acme")[0]) == GOOD


def test_what_comes_is_followed_also_after_the_file_was_cut_or_replaced(log: Path, tmp_path: Path) -> None:
    found = lines_of(log, follow=True)
    assert [next(found) for _ in range(4)][2] == "no JSON"
    got: list[str] = []

    def waiting() -> threading.Thread:
        thread = threading.Thread(target=lambda: got.append(next(found)))
        thread.start()
        return thread

    def write(mode: str, text: str) -> str:
        thread = waiting()
        with log.open(mode) as file:
            file.write(text)
        thread.join(10)
        return got[-1]

    assert write("a", ' a line"}\n') == '{"half a line"}'
    assert write("w", "cut\n") == "cut"
    (tmp_path / "new").write_text("replaced\n")
    thread = waiting()
    (tmp_path / "new").replace(log)
    thread.join(10)
    assert got[-1] == "replaced"


def test_without_a_log_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for value in ("off", "udp://127.0.0.1:514"):
        monkeypatch.setenv("FLATSHARE_ACCESS_LOG", value)
        assert isinstance(CliRunner().invoke(app, ["logs"]).exception, InvalidInput)
    missing = CliRunner().invoke(app, ["logs", "--file", str(tmp_path / "none")]).exception
    assert isinstance(missing, FileNotFoundError)
