"""``flatshare train digits``: files that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flatshare.cli.main import app
from flatshare.mnist.digits import load_digits
from flatshare_registry.errors import InvalidInput


def test_digits_are_files_of_what_nothing_was_trained_on(tmp_path: Path) -> None:
    digits = load_digits()
    made = CliRunner().invoke(
        app, ["train", "digits", "--count", "12", "--out", str(tmp_path / "as"), "--json"]
    )
    files = json.loads(made.stdout)["files"]
    assert list(files.values()) == [*range(10), 0, 1], "a zero, a one, and so on"
    shown = [np.asarray(Image.open(name)) for name in files]
    for image, label in zip(shown, files.values(), strict=True):
        same = np.flatnonzero((digits.test_images == image).all(axis=(1, 2)))
        assert label in digits.test_labels[same]
    assert not np.array_equal(shown[0], shown[10])
    options = ["--out", str(tmp_path / "turned"), "-w", "rotated"]
    assert CliRunner().invoke(app, ["train", "digits", *options]).exit_code == 0
    turned = np.asarray(Image.open(tmp_path / "turned/0.png"))
    assert np.array_equal(turned, np.rot90(shown[0]))


def test_a_folder_that_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = CliRunner().invoke(app, ["train", "digits", "--out", str(tmp_path / "file/digits")])
    assert isinstance(made.exception, InvalidInput)
    assert "can't be written" in made.exception.message


@pytest.mark.parametrize("count", ["0", "2001"])
def test_no_more_than_there_are(count: str) -> None:
    assert CliRunner().invoke(app, ["train", "digits", "--count", count]).exit_code == 2
