"""The transform of the MNIST architectures: the notebook's ToTensor, Normalize((0.5,), (0.5,)).

In numpy, so that serving an image costs no torch call; a test holds it bit-equal to torchvision's.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

MEAN: Final = np.float32(0.5)
STD: Final = np.float32(0.5)


def preprocess(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels ``(N, 28, 28)`` uint8, 0 black to 255 white, to ``(N, 1, 28, 28)`` float32 in [-1, 1]."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    normalised: NDArray[np.float32] = (scaled - MEAN) / STD
    return normalised[:, np.newaxis]
