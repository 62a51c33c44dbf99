"""What `local/cluster_probe.py` relies on: how Ray finds the cluster that an address means."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray._private import services


@pytest.mark.parametrize("wanted", ["auto", None])
def test_the_address_file_is_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)  # of whoever else uses this machine
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.1:6379\n")
    assert services.canonicalize_bootstrap_address(wanted) == "192.0.2.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.9:6379")
    assert services.canonicalize_bootstrap_address(wanted) == "192.0.2.9:6379", "the variable wins"


def test_auto_without_any_cluster_is_a_connection_error_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    (tmp_path / "ray").mkdir()
    try:
        found = services.canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    assert found is None


def test_what_is_no_address_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        services.canonicalize_bootstrap_address("nonsense")
