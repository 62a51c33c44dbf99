"""Results: parts are whole or not there, and what has a label is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from flatshare.batch.results import Manifest, Results
from flatshare_registry.errors import InvalidInput

MANIFEST = Manifest("x.npy", "f", "acme", "image/", {"acme": "acme@1"})


def columns(*rows: int, error: str = "") -> dict[str, NDArray[Any]]:
    count = len(rows)
    return {
        "row": np.array(rows), "file": np.full(count, "x.npy", object), "predicted_label": np.array(rows) % 10,
        "model": np.full(count, "acme@1", object), "digest": np.full(count, "d", object),
        "error": np.full(count, error, object),
    }  # fmt: skip


def test_what_has_a_label_is_done_and_what_failed_is_not(tmp_path: Path) -> None:
    results = Results(str(tmp_path / "out"))
    results.begin(MANIFEST)
    results.add([columns(0, 3), columns(1, error="the store is down")])
    results.add([])
    assert results.done(6).tolist() == [True, False, False, True, False, False]
    (part,) = results.parts()
    rows = {row["row"]: row for row in pq.read_table(part).to_pylist()}
    assert rows[3] == {
        "row": 3, "file": "x.npy", "predicted_label": 3, "model": "acme@1", "digest": "d", "error": None,
    }  # fmt: skip
    assert (rows[1]["predicted_label"], rows[1]["digest"], rows[1]["error"]) == (
        None,
        None,
        "the store is down",
    )
    with pytest.raises(InvalidInput, match="another batch writes"):
        Results(str(tmp_path / "out"))
    del results
    again = Results(str(tmp_path / "out"))
    assert again.manifest() == MANIFEST
    again.add([columns(1)])
    assert again.done(6).tolist()[:2] == [True, True]


def test_a_part_that_was_cut_off_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(str(tmp_path))
    results.begin(MANIFEST)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(InvalidInput, match="No space left"):
            results.add([columns(0)])
    assert results.parts() == [] and {one.name for one in tmp_path.iterdir()} == {"_batch.json", ".lock"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"thesis.txt"):
        Results(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="can't be made"):
        Results(str(tmp_path / "file" / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_batch.json").write_text("{")
    (tmp_path / "out" / "._batch.json.new").write_text("what a kill left")
    with pytest.raises(InvalidInput, match="damaged"):
        Results(str(tmp_path / "out")).manifest()
