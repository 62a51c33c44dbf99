"""``mnist-cnn``: the two-conv, two-linear network of PyTorch's MNIST example (1,199,882 parameters).

Source: github.com/pytorch/examples, mnist/main.py. It returns logits: the example's log_softmax
does not change which is largest, and dropout does nothing in eval mode.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from flatshare.mnist.pixels import preprocess
from flatshare.models.architecture import Architecture, InputSpec
from flatshare_registry.weights import TensorSpec

if TYPE_CHECKING:
    from torch import nn


def build() -> nn.Module:
    """The network, in eval mode."""
    from torch import nn

    # A plain Sequential with the example's names for the layers that have weights. In place: a row's
    # activations are 232 kB, and writing them twice is a tenth of a pass of one row.
    return nn.Sequential(
        OrderedDict(
            [
                ("conv1", nn.Conv2d(1, 32, 3)),
                ("relu1", nn.ReLU(inplace=True)),
                ("conv2", nn.Conv2d(32, 64, 3)),
                ("relu2", nn.ReLU(inplace=True)),
                ("pool", nn.MaxPool2d(2)),
                ("dropout1", nn.Dropout(0.25)),
                ("flatten", nn.Flatten()),
                ("fc1", nn.Linear(9216, 128)),
                ("relu3", nn.ReLU(inplace=True)),
                ("dropout2", nn.Dropout(0.5)),
                ("fc2", nn.Linear(128, 10)),
            ]
        )
    ).eval()


ARCHITECTURE = Architecture(
    name="mnist-cnn",
    input=InputSpec("image", (1, 28, 28)),
    classes=10,
    tensors={
        "conv1.weight": TensorSpec("F32", (32, 1, 3, 3)),
        "conv1.bias": TensorSpec("F32", (32,)),
        "conv2.weight": TensorSpec("F32", (64, 32, 3, 3)),
        "conv2.bias": TensorSpec("F32", (64,)),
        "fc1.weight": TensorSpec("F32", (128, 9216)),
        "fc1.bias": TensorSpec("F32", (128,)),
        "fc2.weight": TensorSpec("F32", (10, 128)),
        "fc2.bias": TensorSpec("F32", (10,)),
    },
    build=build,
    preprocess=preprocess,
    # One core, torch 2.14: 1 row 0.53 ms against 0.70, 16 rows 3.7 against 7.9, 64 rows 12.7
    # against 32.7. What it costs is a copy of 74 kB of 4.8 MB; the dense layers stay views.
    channels_last=True,
)
