"""The operator's key files: private, made once, whole or not at all; and nothing secret goes on to Ray."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatshare.api.identity import Role
from flatshare.errors import LocalError, SettingsError
from flatshare.local.keys import key_file, make_key, read_key
from flatshare.local.operators import operators_of
from flatshare.settings import load_settings
from flatshare_registry.keys import new_key, parse_key


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_key_is_made_once_and_only_its_owner_can_read_it() -> None:
    assert read_key("admin") is None
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(lambda _: _other_process(), range(4)))
    made.add(make_key("admin"))
    assert len(made) == 1
    assert parse_key(made.pop()).owner == "ADMIN"
    assert key_file("admin").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key_file("admin").parent.iterdir()] == ["admin.key"]


def _other_process() -> str:
    import subprocess
    import sys

    script = "from flatshare.local.keys import make_key; print(make_key('admin'))"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_file_that_others_can_read_is_refused() -> None:
    make_key("viewer")
    key_file("viewer").chmod(0o644)
    with pytest.raises(LocalError, match="chmod 600"):
        read_key("viewer")


def test_what_goes_on_to_ray_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    admin, viewer = new_key("ADMIN"), new_key("VIEWER")
    monkeypatch.setenv("FLATSHARE_ADMIN_KEY", admin.text)
    monkeypatch.setenv("FLATSHARE_API_KEY", viewer.text)
    bare, operators = operators_of(load_settings(viewer_key=viewer.text))
    assert operators is not None
    passed_on = pickle.dumps((bare, operators))
    for made in (admin, viewer):
        assert made.text.split("_", 2)[2].encode() not in passed_on
        assert not any(made.text in value for value in os.environ.values())
        caller = operators.caller(parse_key(made.text))
        assert caller is not None
        assert caller.role == Role[parse_key(made.text).owner]
    assert operators.caller(parse_key(new_key("ADMIN").text)) is None


def test_authentication_can_be_off_and_a_wrong_key_is_refused() -> None:
    assert operators_of(load_settings(auth="off"))[1] is None
    for key in ("secret", new_key("VIEWER").text):
        with pytest.raises(SettingsError, match="admin_key"):
            operators_of(load_settings(admin_key=key))
