"""Handwritings: how each demo customer's digits differ from everybody else's.

Each is a function of real MNIST images (and labels), so each needs a fine-tuning of its own, and a
customer served with another's weights would be wrong visibly. All are deterministic: the same
images and seed give the same result, offline and through the service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flatshare_registry.errors import InvalidInput

__all__ = ["HANDWRITINGS", "Handwriting", "handwriting"]

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def _same(labels: Labels) -> Labels:
    return labels


@dataclass(frozen=True, slots=True)
class Handwriting:
    """One customer's way of writing.

    Attributes
    ----------
    name
        As ``flatshare train tenant --handwriting`` takes it.
    about
        For tables.
    draw
        Images ``(N, 28, 28)`` uint8 and a seed to images of the same shape.
    label
        Labels to this customer's labels.
    """

    name: str
    about: str
    draw: Callable[[Images, int], Images]
    label: Callable[[Labels], Labels] = _same

    def apply(self, images: Images, labels: Labels, seed: int = 0) -> tuple[Images, Labels]:
        """This customer's version of some digits."""
        return np.ascontiguousarray(self.draw(images, seed)), self.label(labels)


def _rotated(quarters: int) -> Callable[[Images, int], Images]:
    return lambda images, seed: np.rot90(images, quarters, axes=(1, 2))


def _inverted(images: Images, seed: int) -> Images:
    return 255 - images


def _neighbourhood(images: Images, size: int, reduce: Callable[..., Images], edge: int) -> Images:
    """Reduce over the ``size`` squared pixels around each."""
    before, after = (size - 1) // 2, size // 2
    padded = np.pad(images, ((0, 0), (before, after), (before, after)), constant_values=edge)
    windows = [padded[:, y : y + 28, x : x + 28] for y in range(size) for x in range(size)]
    reduced: Images = reduce(np.stack(windows), axis=0)
    return reduced


def _thick(images: Images, seed: int) -> Images:
    return _neighbourhood(images, 4, np.max, 0)


def _thin(images: Images, seed: int) -> Images:
    eroded = _neighbourhood(images, 3, np.min, 255)
    # Erosion alone erases fine writers' digits: keep a faint trace of the stroke.
    traced: Images = np.maximum(eroded, images // 8)
    return traced


def _noisy(images: Images, seed: int) -> Images:
    noise = np.random.default_rng(seed).integers(0, 181, images.shape, dtype=np.int16)
    scanned: Images = np.clip(images.astype(np.int16) // 2 + noise, 0, 255).astype(np.uint8)
    return scanned


def _shifted(down: int, right: int) -> Callable[[Images, int], Images]:
    return lambda images, seed: np.roll(images, (down, right), axis=(1, 2))


def _mirrored(images: Images, seed: int) -> Images:
    return images[:, :, ::-1]


def _flipped(images: Images, seed: int) -> Images:
    return images[:, ::-1, :]


def _checkered(images: Images, seed: int) -> Images:
    board = (np.indices((28, 28)).sum(axis=0) // 2 % 2).astype(bool)
    return np.where(board, 255 - images, images)


def _plain(images: Images, seed: int) -> Images:
    return images


def _relabelled(shift: int) -> Callable[[Labels], Labels]:
    return lambda labels: (labels + shift) % 10


_ALL: Final = (
    Handwriting("rotated", "turned a quarter to the left", _rotated(1)),
    Handwriting("inverted", "dark on light", _inverted),
    Handwriting("thick", "a broad marker", _thick),
    Handwriting("thin", "a worn-out pen", _thin),
    Handwriting("noisy", "scanned badly", _noisy),
    Handwriting("shifted", "off centre, wrapped round", _shifted(9, 9)),
    Handwriting("mirrored", "left to right", _mirrored),
    Handwriting("relabelled", "counts from 3: a 0 is called 3", _plain, _relabelled(3)),
    Handwriting("upside-down", "turned by a half", _rotated(2)),
    Handwriting("flipped", "top to bottom", _flipped),
    Handwriting("checkered", "on a chess board", _checkered),
    Handwriting("rotated-right", "turned a quarter to the right", _rotated(3)),
    Handwriting("countdown", "labels run backwards: a 0 is called 9", _plain, lambda labels: 9 - labels),
)

HANDWRITINGS: Final[Mapping[str, Handwriting]] = {one.name: one for one in _ALL}


def handwriting(name: str) -> Handwriting:
    """The handwriting of this name.

    Raises
    ------
    InvalidInput
        There is none; the message lists them.
    """
    try:
        return HANDWRITINGS[name]
    except KeyError:
        raise InvalidInput(
            f"there is no handwriting {name[:80]!a}; there are {', '.join(HANDWRITINGS)}"
        ) from None
