"""Inputs: rows keep their numbers whoever reads them, and what can't be read says so."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flatshare.batch.inputs import open_input
from flatshare.errors import BadInput
from flatshare_registry.errors import InvalidInput

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)


def numbers(*rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(rows, np.int64)


def table(image: pa.Array, tenants: list[str] | None = None) -> pa.Table:
    return pa.table({"image": image, "tenant": tenants or ["acme"] * len(image)})


def test_an_array_file_is_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    source = open_input(str(tmp_path / "x.npy"))
    assert [count for _, count in source.files] == [6]
    assert source.models() is None
    assert (np.asarray(source.rows(0, numbers(1, 2, 3))) == PIXELS[1:4]).all()
    assert (np.asarray(source.rows(0, numbers(0, 5))) == PIXELS[[0, 5]]).all()


@pytest.mark.parametrize("kind", ["nested", "fixed", "tensor", "flat", "octets"])
def test_parquet_holds_arrays_in_several_ways(tmp_path: Path, kind: str) -> None:
    flat = pa.array(PIXELS.reshape(-1))
    image: pa.Array
    if kind == "nested":
        image = pa.array(PIXELS.tolist(), pa.list_(pa.list_(pa.uint8())))
    elif kind == "fixed":
        image = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 28), 28)
    elif kind == "tensor":
        image = pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.uint8(), (28, 28)), pa.FixedSizeListArray.from_arrays(flat, 784)
        )
    elif kind == "octets":
        image = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(784), len(PIXELS), [None, pa.py_buffer(PIXELS)]
        )
    else:
        image = pa.FixedSizeListArray.from_arrays(flat, 784)
    pq.write_table(table(image), tmp_path / "x.parquet", row_group_size=2)
    source = open_input(str(tmp_path / "x.parquet"))
    rows = np.asarray(source.rows(0, numbers(1, 4)))
    assert rows.dtype == np.uint8
    assert (rows.reshape(2, 28, 28) == PIXELS[[1, 4]]).all()


def test_a_folder_of_parquet_is_in_the_order_of_names_and_names_models(tmp_path: Path) -> None:
    for name, start in (("b", 3), ("a", 0)):
        part = pa.FixedSizeListArray.from_arrays(pa.array(PIXELS[start : start + 3].reshape(-1)), 784)
        pq.write_table(table(part, [f"t{start + n}" for n in range(3)]), tmp_path / f"{name}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    source = open_input(str(tmp_path), model_column="tenant")
    models = source.models()
    assert models is not None and models.tolist() == [f"t{n}" for n in range(6)]
    assert (np.asarray(source.rows(1, numbers(2))).reshape(28, 28) == PIXELS[5]).all()


def test_images_lie_in_folders_that_may_name_models(tmp_path: Path) -> None:
    for index in range(4):
        folder = tmp_path / f"t{index % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(PIXELS[index]).save(folder / f"{index}.png")
    source = open_input(str(tmp_path), model_column="folder")
    models = source.models()
    assert models is not None and models.tolist() == ["t0", "t0", "t1", "t1"]
    files = source.rows(0, numbers(1, 3))
    assert isinstance(files, list)
    for data, index in zip(files, (2, 3), strict=True):
        assert (np.asarray(Image.open(io.BytesIO(data))) == PIXELS[index]).all()
    assert open_input(str(tmp_path)).models() is None


def test_what_can_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"no array")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.save(tmp_path / "pickled.npy", np.array([{}], object))
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    for folder in (empty, mixed):
        folder.mkdir()
    (mixed / "a.npy").touch()
    (mixed / "b.txt").touch()
    pq.write_table(table(pa.array([[1]])), tmp_path / "t.parquet")
    for path, message in (
        (tmp_path / "x.npy", "can't be read as an array"), (tmp_path / "x.parquet", "can't be read as Parquet"),
        (tmp_path / "one.npy", "no rows of images"), (tmp_path / "pickled.npy", "can't be read as an array"),
        (empty, "holds no"), (mixed, "several kinds"), (tmp_path / "none", "there is no"),
        ("ftp://x/y", "can't be read"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            open_input(str(path))
    with pytest.raises(InvalidInput, match="no column picture; it has image, tenant"):
        open_input(str(tmp_path / "t.parquet"), image_column="picture")
    with pytest.raises(InvalidInput, match="has no columns"):
        np.save(tmp_path / "x.npy", PIXELS)
        open_input(str(tmp_path / "x.npy"), model_column="tenant")


@pytest.mark.parametrize(
    "image", [pa.array([[1], [1, 2]]), pa.array(["a", "b"]), pa.array([[1], None]), pa.array([{"a": 1}] * 2)]
)
def test_a_column_that_is_no_images_is_the_rows_own_fault(tmp_path: Path, image: pa.Array) -> None:
    pq.write_table(table(image), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match="column image"):
        open_input(str(tmp_path / "x.parquet")).rows(0, numbers(0, 1))


def test_a_file_that_changes_is_another_input(tmp_path: Path) -> None:
    """Rows are numbered: labels of what was there before must not stand beside what is there now."""
    for index in range(2):
        Image.fromarray(PIXELS[index]).save(tmp_path / f"{index}.png")
    before = open_input(str(tmp_path))
    assert before.names(0, numbers(1)).tolist() == [str(tmp_path / "1.png")]
    (tmp_path / "0.png").rename(tmp_path / "2.png")
    assert open_input(str(tmp_path)).fingerprint != before.fingerprint
    np.save(tmp_path / "x.npy", PIXELS)
    array = open_input(str(tmp_path / "x.npy")).fingerprint
    assert open_input(str(tmp_path / "x.npy")).fingerprint == array
    np.save(tmp_path / "x.npy", PIXELS[:5])
    assert open_input(str(tmp_path / "x.npy")).fingerprint != array


def test_a_row_that_names_no_model_is_refused_before_anything_begins(tmp_path: Path) -> None:
    image = pa.FixedSizeListArray.from_arrays(pa.array(PIXELS[:2].reshape(-1)), 784)
    pq.write_table(pa.table({"image": image, "tenant": ["acme", None]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInput, match="names no model in 1 rows"):
        open_input(str(tmp_path / "x.parquet"), model_column="tenant").models()
