"""The command as a process: one line and an exit code, whatever is wrong with what it was started with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = "http://127.0.0.1:9"


class Command:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "FLATSHARE_STORE": (folder / "store").as_uri(), "FLATSHARE_URL": NOBODY,
            "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"),
        }  # fmt: skip

    def __call__(
        self, *arguments: str, shell: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `flatshare`, with the shell's redirections after it."""
        script = f'exec "$0" -m flatshare.cli.main "$@" {shell}'
        return subprocess.run(
            ["/bin/sh", "-c", script, sys.executable, *arguments], capture_output=True, text=True, timeout=120,
            env={**self.environment, **variables},
        )  # fmt: skip


@pytest.fixture
def flatshare(tmp_path: Path) -> Command:
    return Command(tmp_path)


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


# -- what the environment says


def test_a_setting_that_is_no_json_is_named(flatshare: Command) -> None:
    one_line(flatshare("tenants", "list", FLATSHARE_PLANS="{"), 2, "FLATSHARE_PLANS is not JSON")
    one_line(
        flatshare("tenants", "list", FLATSHARE_PLANS='{"gold": {"speed": 3}}'), 2, "FLATSHARE_PLANS", "speed"
    )
    one_line(flatshare("tenants", "list", FLATSHARE_SLOTS="abc"), 2, "FLATSHARE_SLOTS", "integer")
    assert flatshare("tenants", "list", FLATSHARE_PLANS="").returncode == 0, "empty is unset"


def test_what_is_wrong_with_the_ways_to_s3_is_named(flatshare: Command, tmp_path: Path) -> None:
    broken = tmp_path / "config"
    broken.write_text("region = nowhere\n[unclosed\n")
    s3 = {"FLATSHARE_STORE": "s3://models/x"}
    one_line(flatshare("tenants", "list", **s3, AWS_PROFILE="nope"), 2, "AWS_PROFILE", "nope")
    one_line(flatshare("tenants", "list", **s3, AWS_CONFIG_FILE=str(broken)), 2, str(broken))
    for name in ("FLATSHARE_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        one_line(flatshare("tenants", "list", **s3, **{name: "localhost:9000"}), 2, name, "localhost:9000")


def test_a_proxy_that_can_not_be_used_is_named(flatshare: Command) -> None:
    done = flatshare(
        "replicas", "--url", "https://platform.invalid", ALL_PROXY="socks5://u:hunter2@127.0.0.1:9"
    )
    one_line(done, 2, "ALL_PROXY")
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("FLATSHARE_SLOT", "FLATSHARE_SLOTS"),
        ("flatshare_replica", "FLATSHARE_REPLICAS"),
        ("FLATSHARE_XYZZY", ""),
    ],
)
def test_a_variable_that_is_no_setting_is_said_once(flatshare: Command, name: str, near: str) -> None:
    done = flatshare("tenants", "list", "--json", **{name: "s3cret"})
    assert done.returncode == 0
    assert json.loads(done.stdout) == []
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("warning: ")
    assert done.stderr.count(name) == 1 + (name in near)
    assert near in done.stderr
    assert "s3cret" not in done.stderr


def test_settings_and_what_up_tells_its_child_are_no_surprise(flatshare: Command) -> None:
    done = flatshare("tenants", "list", FLATSHARE_SLOTS="3", FLATSHARE_READY_FD="9", FLATSHARE_UP_LOG="x")
    assert (done.returncode, done.stderr) == (0, "")


# -- what standard output is


def test_letters_that_an_encoding_lacks_end_nothing(flatshare: Command, tmp_path: Path) -> None:
    assert flatshare("tenants", "create", "acme").returncode == 0
    for encoding in ("ascii", "latin-1", "utf-8"):
        label = "Zürich 日本"
        made = flatshare("keys", "create", "acme", "--label", label, PYTHONIOENCODING=encoding)
        assert made.returncode == 0, made.stderr
        listed = flatshare("keys", "list", "acme", PYTHONIOENCODING="ascii")
        assert listed.returncode == 0, listed.stderr
        assert "Z\\xfcrich \\u65e5\\u672c" in listed.stdout
        refused = flatshare("promote", "日本@1", PYTHONIOENCODING=encoding)
        one_line(refused, 2)


def test_a_closed_stream_is_not_a_fault_of_ours(flatshare: Command) -> None:
    assert flatshare("tenants", "create", "acme", shell=">&-").returncode == 0
    for shell in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = flatshare("tenants", "list", shell=shell)
        assert (done.returncode, done.stderr) == (0, ""), shell
    refused = flatshare("tenants", "show", "nobody", shell="2>&-")
    assert refused.returncode == 3


def test_no_key_is_made_that_nobody_would_see(flatshare: Command) -> None:
    flatshare("tenants", "create", "acme")
    one_line(flatshare("keys", "create", "acme", shell=">&-"), 7, "standard output")
    assert json.loads(flatshare("keys", "list", "acme", "--json").stdout) == []
    made = json.loads(flatshare("keys", "create", "acme", "--json").stdout)
    one_line(flatshare("keys", "rotate", made["id"], shell=">&-"), 7, "standard output")
    assert len(json.loads(flatshare("keys", "list", "acme", "--json").stdout)) == 1


def test_what_the_machine_refuses_is_named_by_its_path(flatshare: Command, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, where a folder should be")
    done = flatshare("tenants", "create", "acme")
    assert done.returncode in (2, 5, 7)
    assert str(tmp_path / "store") in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_machine_has_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flatshare.cli import main

    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "/etc/\x1b[2Jshadow")

    monkeypatch.setattr(main, "app", refuse)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 7
    assert capsys.readouterr().err == "error: /etc/\\x1b[2Jshadow: Permission denied\n"
