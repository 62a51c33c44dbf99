"""Which Ray cluster is joined: one that lets us in; what a dead one left behind is not waited for."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import pytest

from flatshare.errors import LocalError
from flatshare.local.cluster import reachable_cluster


@pytest.fixture(autouse=True)
def ray_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback stays loopback
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


def test_a_stale_address_file_is_no_cluster(ray_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    if any("gcs_server" in (one.info["name"] or "") for one in psutil.process_iter(["name"])):
        pytest.skip("a Ray cluster runs on this machine: auto finds that one")
    (ray_folder / "ray_current_cluster").write_text("127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "flatshare.local"):
        assert reachable_cluster("auto") is None
    assert "127.0.0.1:9" in caplog.text
    (ray_folder / "ray_current_cluster").unlink()
    assert reachable_cluster("auto") is None


def test_a_stale_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(LocalError, match=r"127\.0\.0\.1:9.*nobody listens"):
        reachable_cluster("auto")
