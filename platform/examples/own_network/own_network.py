"""A network of one's own: what flatshare must know to check, build and feed it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flatshare.models.architecture import Architecture, InputSpec
from flatshare_registry.weights import TensorSpec

if TYPE_CHECKING:
    from torch import nn


def build() -> nn.Module:
    """The network without weights. Tenants that share the first layers share their memory."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def preprocess(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels ``(N, 28, 28)`` to what the weights were trained on."""
    return (pixels.astype(np.float32) / 255)[:, None]


ARCHITECTURE = Architecture(
    name="tiny-mlp",
    input=InputSpec("image", (1, 28, 28)),
    classes=10,
    tensors={
        "1.weight": TensorSpec("F32", (32, 784)),
        "1.bias": TensorSpec("F32", (32,)),
        "3.weight": TensorSpec("F32", (10, 32)),
        "3.bias": TensorSpec("F32", (10,)),
    },
    build=build,
    preprocess=preprocess,
)
