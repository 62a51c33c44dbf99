"""Folders that only this user can enter: made, believed, or refused."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from flatshare.errors import LocalError
from flatshare.local.private_file import private_folder


def test_a_folder_is_made_and_found_again(tmp_path: Path) -> None:
    for _ in range(2):
        made = private_folder(tmp_path / "a" / "b")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(LocalError, match="not this user's alone"):
        private_folder(folder)


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    """Somebody else's link, in a folder where everybody writes, may lead anywhere."""
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(LocalError, match="not this user's alone"):
        private_folder(tmp_path / "link")
