"""What a batch reads: an array file, Parquet, or a folder of images; here or in S3.

An input has rows, numbered from 0, in an order that does not depend on the reader: files by name, then rows
in file order. So a row's number identifies it while the files stay unchanged, and an interrupted batch goes
on where it was. A process holds the image column of one Parquet file, and a remote array, in memory.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flatshare.batch.core import Rows
from flatshare.errors import BadInput
from flatshare_registry.errors import InvalidInput

__all__ = ["Input", "open_input"]

IMAGE_ENDINGS: Final = (".png", ".jpg", ".jpeg")
MAX_KEPT: Final = 4
"""Files that one process keeps open at a time."""


class Input(Protocol):
    """Numbered rows; a plain value, which goes to other processes."""

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """Files in order, and how many rows each has."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when a file changes, or when the set of files does."""
        ...

    def names(self, file: int, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The file that each row is of, as results name it."""
        ...

    def models(self) -> NDArray[Any] | None:
        """The ref of each row, where a column names it."""
        ...

    def rows(self, file: int, numbers: NDArray[np.int64]) -> Rows:
        """Rows of one file, by their numbers in it, ascending. Raises ``BadInput``."""
        ...


def open_input(path: str, image_column: str = "image", model_column: str = "") -> Input:
    """An input by its path: ``file.npy``, ``file.parquet``, a folder of either or of images, or ``s3://...``.

    Parameters
    ----------
    image_column, model_column
        Of Parquet: what goes to the model, and which model it goes to.

    Raises
    ------
    InvalidInput
        There is nothing there that can be read.
    """
    found = _files(path)
    files = [name for name, _ in found]
    stamp = hashlib.sha256("\n".join(f"{name} {about}" for name, about in found).encode()).hexdigest()
    endings = {os.path.splitext(name)[1].lower() for name in files}
    if endings and endings <= set(IMAGE_ENDINGS):
        if model_column:
            return _Images(tuple(files), stamp, by_folder=True)
        return _Images(tuple(files), stamp, by_folder=False)
    if endings == {".npy"}:
        if model_column:
            raise InvalidInput(f"{path} has no columns: --model says which model all its rows are for")
        return _Arrays(tuple((name, len(_array(name))) for name in files), stamp)
    if endings == {".parquet"}:
        counted = tuple((name, _parquet(name).metadata.num_rows) for name in files)
        for column in filter(None, (image_column, model_column)):
            known = _parquet(files[0]).schema_arrow.names
            if column not in known:
                raise InvalidInput(f"{path} has no column {column}; it has {', '.join(known)}")
        return _Tables(counted, stamp, image_column, model_column)
    raise InvalidInput(
        f"{path} holds no .npy, .parquet, .png or .jpg files"
        if not endings
        else f"{path} holds files of several kinds, or of none that is read: {', '.join(sorted(endings))}"
    )


@dataclass(frozen=True, slots=True)
class _Arrays:
    files: tuple[tuple[str, int], ...]
    fingerprint: str

    def names(self, file: int, numbers: NDArray[np.int64]) -> NDArray[Any]:
        return np.full(len(numbers), self.files[file][0], object)

    def models(self) -> None:
        return None

    def rows(self, file: int, numbers: NDArray[np.int64]) -> Rows:
        array = _array(self.files[file][0])
        if len(numbers) and numbers[-1] - numbers[0] + 1 == len(numbers):
            return np.asarray(array[numbers[0] : numbers[-1] + 1])
        return np.asarray(array[numbers])


@dataclass(frozen=True, slots=True)
class _Tables:
    files: tuple[tuple[str, int], ...]
    fingerprint: str
    image_column: str
    model_column: str

    def names(self, file: int, numbers: NDArray[np.int64]) -> NDArray[Any]:
        return np.full(len(numbers), self.files[file][0], object)

    def models(self) -> NDArray[Any] | None:
        if not self.model_column:
            return None
        columns: list[NDArray[Any]] = []
        for name, _ in self.files:
            try:
                column = _parquet(name).read([self.model_column]).column(0).cast(pa.string())
            except pa.ArrowException as error:
                raise InvalidInput(f"column {self.model_column} of {name} holds no names: {error}") from error
            if column.null_count:
                raise InvalidInput(
                    f"column {self.model_column} of {name} names no model in {column.null_count} rows"
                )
            columns.append(column.to_numpy())
        return np.concatenate(columns)

    def rows(self, file: int, numbers: NDArray[np.int64]) -> Rows:
        column = _column(self.files[file][0], self.image_column).take(pa.array(numbers))
        return _rows_of_column(column, self.image_column)


@dataclass(frozen=True, slots=True)
class _Images:
    paths: tuple[str, ...]
    fingerprint: str
    by_folder: bool

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """All of them as one: an image is a row."""
        return (("images", len(self.paths)),)

    def names(self, file: int, numbers: NDArray[np.int64]) -> NDArray[Any]:
        return np.array([self.paths[number] for number in numbers.tolist()], object)

    def models(self) -> NDArray[Any] | None:
        """With a model column: the folder that an image lies in."""
        if not self.by_folder:
            return None
        return np.array([os.path.basename(os.path.dirname(path)) for path in self.paths], object)

    def rows(self, file: int, numbers: NDArray[np.int64]) -> Rows:
        return [_read(self.paths[number]) for number in numbers.tolist()]


def _rows_of_column(column: pa.Array, name: str) -> Rows:
    """Rows of a column of numbers in lists, of tensors, of raw pixels or of image files.

    Octets of one length are raw pixels. They cost next to nothing to read; lists of numbers are taken apart
    value by value, 20 microseconds for an image of MNIST in each process.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ExtensionArray):  # what Ray writes arrays as
        column = column.storage
    if column.null_count:
        raise BadInput(f"column {name} has {column.null_count} rows without a value")
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        start = column.offset * width
        octets = np.frombuffer(column.buffers()[1] or b"", np.uint8)[start : start + len(column) * width]
        pixels: NDArray[Any] = octets.reshape(len(column), width)
        return pixels
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [bytes(value) for value in column.to_pylist()]
    shape: list[int] = [len(column)]
    values: Any = column
    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type):
        lengths = set(pc.list_value_length(values).to_pylist())
        if len(lengths) != 1:
            raise BadInput(f"column {name} holds lists of different lengths")
        shape.append(int(lengths.pop() or 0))
        values = values.flatten()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise BadInput(f"column {name} holds {values.type}, and no numbers or images")
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(shape)
    return found


def _filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" in path:
        found: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(path)
        return found
    return pafs.LocalFileSystem(), os.path.abspath(path)


def _files(path: str) -> list[tuple[str, str]]:
    """Paths below a folder, or the one file, by name; and size and time of each."""
    try:
        system, inner = _filesystem(path)
        info = system.get_file_info(inner)
        if info.type == pafs.FileType.File:
            return [(path, _about(info))]
        if info.type != pafs.FileType.Directory:
            raise InvalidInput(f"there is no {path}")
        scheme = path.partition("://")[0] + "://" if "://" in path else ""
        found = system.get_file_info(pafs.FileSelector(inner, recursive=True))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InvalidInput(f"{path} can't be read: {error}") from error
    names = [(scheme + one.path, _about(one)) for one in found if one.type == pafs.FileType.File]
    return sorted(one for one in names if not os.path.basename(one[0]).startswith((".", "_")))


def _about(info: pafs.FileInfo) -> str:
    return f"{info.size} {info.mtime_ns}"


@functools.lru_cache(MAX_KEPT)
def _array(path: str) -> NDArray[Any]:
    """Mapped if it is a file of this machine, so that reading some rows reads only those."""
    try:
        if "://" in path:
            system, inner = _filesystem(path)
            with system.open_input_file(inner) as file:
                remote: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return remote
        mapped: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")  # takes no objects
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} can't be read as an array: {error}") from error
    if mapped.ndim < 2:
        raise InvalidInput(f"{path} holds an array of shape {mapped.shape}: no rows of images")
    return mapped


@functools.lru_cache(MAX_KEPT)
def _parquet(path: str) -> pq.ParquetFile:
    system, inner = _filesystem(path)
    try:
        return pq.ParquetFile(inner, filesystem=system)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInput(f"{path} can't be read as Parquet: {error}") from error


@functools.lru_cache(1)
def _column(path: str, name: str) -> pa.ChunkedArray:
    return _parquet(path).read([name]).column(0)


def _read(path: str) -> bytes:
    system, inner = _filesystem(path)
    with system.open_input_file(inner) as file:
        data: bytes = file.read()
        return data
