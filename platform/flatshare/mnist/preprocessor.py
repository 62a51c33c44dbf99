"""The pipeline ``images``: the notebook's preprocessor (ToTensor, Normalize) before the classifier.

The notebook's class calls torchvision's transforms image by image. This one calls the same transform, in
numpy, for all of them at once; a test holds the two bit-equal.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flatshare.errors import BadInput
from flatshare.mnist.pixels import preprocess

__all__ = ["Preprocessor"]

SIDE: Final = 28


class Preprocessor:
    """Raw pixels to what the MNIST architectures take."""

    def run(self, batch: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Make rows of pixels.

        Parameters
        ----------
        batch
            ``{"image": [...]}``: whole numbers of 0 to 255, ``(N, 28, 28)``, or one image ``(28, 28)``.

        Returns
        -------
        dict
            ``{"image": array}``, float32 ``(N, 1, 28, 28)``.

        Raises
        ------
        BadInput
            They are not that.
        """
        if "image" not in batch:
            raise BadInput('the body must be an object with the key "image"')
        return {"image": preprocess(_pixels(batch["image"]))}


def _pixels(value: Any) -> NDArray[np.uint8]:
    """Pixels ``(N, 28, 28)`` of nested lists, or of an array.

    Leaves are checked before an array is made of them: numpy would make texts into an array as wide as the
    longest, and a small body could ask for gigabytes.
    """
    wrong = BadInput(f'"image" must be raw pixels: whole numbers of 0 to 255 of shape (N, {SIDE}, {SIDE})')
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or value.ndim not in (2, 3) or value.shape[-2:] != (SIDE, SIDE):
            raise wrong
        if value.size and not 0 <= value.min() <= value.max() <= 255:
            raise wrong
        return value.astype(np.uint8).reshape(-1, SIDE, SIDE)
    images = value
    if isinstance(value, list) and value and isinstance(value[0], list) and value[0]:
        images = value if isinstance(value[0][0], list) else [value]
    leaves = images
    for size in (None, SIDE, SIDE):
        if not isinstance(leaves, list) or not leaves:
            raise wrong
        if size is not None:
            if any(type(part) is not list or len(part) != size for part in leaves):
                raise wrong
            leaves = list(itertools.chain.from_iterable(leaves))
    if set(map(type, leaves)) != {int}:
        raise wrong
    try:
        return np.frombuffer(bytes(leaves), np.uint8).reshape(-1, SIDE, SIDE)
    except ValueError:
        raise wrong from None
