"""Real MNIST digits: the t10k files that ship with flatshare, or the full set from a folder."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flatshare_registry.errors import InvalidInput

__all__ = ["Digits", "download", "load_digits"]

SPLIT_SEED: Final = 20260101
"""The shipped 10,000 are shuffled with this seed, then split: in the file's own order the first
half comes from other writers than the second."""

SHIPPED_TRAIN: Final = 8_000


@dataclass(frozen=True, slots=True)
class Digits:
    """Images and labels, split once and for all.

    Attributes
    ----------
    train_images, test_images
        uint8 ``(N, 28, 28)``, 0 background to 255 ink.
    train_labels, test_labels
        int64 ``(N,)``, 0 to 9.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load_digits(folder: Path | None = None) -> Digits:
    """The digits.

    Parameters
    ----------
    folder
        With the four MNIST files, gzipped or not: 60,000 to train on and 10,000 to test on.
        None: the shipped t10k files, split 8,000 to 2,000.

    Raises
    ------
    InvalidInput
        A file is missing or is not an MNIST file.
    """
    if folder is None:
        with as_file(files("flatshare.mnist") / "data") as shipped:
            images, labels = _read_pair(shipped, "t10k")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
        train, test = order[:SHIPPED_TRAIN], order[SHIPPED_TRAIN:]
        return Digits(images[train], labels[train], images[test], labels[test])
    return Digits(*_read_pair(folder, "train"), *_read_pair(folder, "t10k"))


def download(folder: Path) -> Path:
    """Fetch the full set with torchvision, which checks its digests; returns where the files are.

    Raises
    ------
    InvalidInput
        No mirror could be reached.
    """
    from torchvision.datasets import MNIST

    try:
        MNIST(str(folder), download=True)
    except (RuntimeError, OSError) as error:
        raise InvalidInput(
            "MNIST could not be downloaded (no mirror answered, or the folder can't be written); "
            "get the four files another way and give their folder with --data"
        ) from error
    return folder / "MNIST" / "raw"


def _read_pair(folder: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = _read_idx(folder, f"{name}-images-idx3-ubyte")
    labels = _read_idx(folder, f"{name}-labels-idx1-ubyte").astype(np.int64)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise InvalidInput(f"the MNIST {name} files in {folder} do not belong together")
    return images, labels


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist)."""
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except (OSError, EOFError) as error:
        raise InvalidInput(f"{plain} (or {packed.name}) can't be read: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise InvalidInput(f"{plain} is not an IDX file of unsigned bytes")
    shape = tuple(np.frombuffer(data, dtype=">u4", count=data[3], offset=4).tolist())
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if values.size != int(np.prod(shape)):
        raise InvalidInput(f"{plain} is truncated")
    return values.reshape(shape)
