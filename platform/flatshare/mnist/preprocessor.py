"""The pipeline ``images``: the notebook's preprocessor (ToTensor, Normalize) before the classifier.

The notebook's class calls torchvision's transforms image by image. This one calls the same transform, in
numpy, for all of them at once; a test holds the two bit-equal.
"""

from __future__ import annotations

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
        try:
            values = np.asarray(batch["image"])
        except ValueError:
            raise BadInput('"image" is not a rectangular array of numbers') from None
        if values.dtype.kind not in "iu" or values.ndim not in (2, 3) or values.shape[-2:] != (SIDE, SIDE):
            raise BadInput(
                f'"image" must be whole numbers of shape (N, {SIDE}, {SIDE}): raw pixels; it has shape '
                f"{values.shape if values.ndim <= 8 else '(...)'} and type {values.dtype}"
            )
        if values.size and not 0 <= values.min() <= values.max() <= 255:
            raise BadInput('"image" holds numbers beyond 0 to 255')
        return {"image": preprocess(values.astype(np.uint8).reshape(-1, SIDE, SIDE))}
