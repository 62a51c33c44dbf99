"""The cluster's token: a file of this user's alone, made before Ray looks for one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from flatshare.errors import LocalError
from flatshare.local.ray_token import cluster_token_file, joins_a_cluster


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def ray_s_own(tmp_path: Path) -> Path:
    path = tmp_path / "home" / ".ray" / "auth_token"
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    return path


def test_our_own_cluster_has_a_token_of_its_own(tmp_path: Path) -> None:
    ray_s_own(tmp_path)
    path = cluster_token_file("local")
    assert path == tmp_path / "state" / "flatshare" / "ray.token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text().strip()
    assert len(token) == 64
    assert cluster_token_file("local").read_text().strip() == token


def test_a_token_that_others_can_read_is_refused() -> None:
    cluster_token_file("local").chmod(0o644)
    with pytest.raises(LocalError, match="can be read by others"):
        cluster_token_file("local")


def test_somebody_s_cluster_is_shown_rays_own_token(tmp_path: Path) -> None:
    assert cluster_token_file("10.0.0.7:6379").name == "ray.token"
    theirs = ray_s_own(tmp_path)
    assert cluster_token_file("10.0.0.7:6379") == theirs
    assert cluster_token_file("auto").name == "ray.token", "no cluster runs: one of ours is started"


def test_a_running_cluster_is_found_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not joins_a_cluster("auto")
    assert joins_a_cluster("10.0.0.7:6379")
    (tmp_path / "tmp" / "ray").mkdir(parents=True)
    (tmp_path / "tmp" / "ray" / "ray_current_cluster").write_text("10.0.0.7:6379")
    assert joins_a_cluster("auto")
    assert not joins_a_cluster("local")
    theirs = ray_s_own(tmp_path)
    assert cluster_token_file("auto") == theirs
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    assert joins_a_cluster("auto")
