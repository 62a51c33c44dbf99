"""``mnist-resnet18``: torchvision's resnet18 with one input channel and 10 classes (45 MB)."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from flatshare.mnist.pixels import preprocess
from flatshare.models.architecture import Architecture, InputSpec
from flatshare_registry.weights import TensorSpec

if TYPE_CHECKING:
    from torch import nn


def build() -> nn.Module:
    """The network, in eval mode: torchvision's blocks and names in a Sequential, so that they are stages."""
    from torch import nn
    from torchvision.models import resnet18

    parts = dict(resnet18(num_classes=10).named_children())
    parts["conv1"] = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    order = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    network = nn.Sequential(OrderedDict((name, parts[name]) for name in order))
    network.append(nn.Flatten(1))
    network.add_module("fc", parts["fc"])
    return network.eval()


def _tensors() -> dict[str, TensorSpec]:
    """The tensors of resnet18, spelled out so that checking weights needs no torch."""
    specs: dict[str, TensorSpec] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            specs[f"{name}.{part}"] = TensorSpec("F32", (channels,))
        specs[f"{name}.num_batches_tracked"] = TensorSpec("I64", ())

    specs["conv1.weight"] = TensorSpec("F32", (64, 1, 7, 7))
    norm("bn1", 64)
    channels_in = 64
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            specs[f"{name}.conv1.weight"] = TensorSpec("F32", (channels, channels_in, 3, 3))
            norm(f"{name}.bn1", channels)
            specs[f"{name}.conv2.weight"] = TensorSpec("F32", (channels, channels, 3, 3))
            norm(f"{name}.bn2", channels)
            if channels_in != channels:
                specs[f"{name}.downsample.0.weight"] = TensorSpec("F32", (channels, channels_in, 1, 1))
                norm(f"{name}.downsample.1", channels)
            channels_in = channels
    specs["fc.weight"] = TensorSpec("F32", (10, 512))
    specs["fc.bias"] = TensorSpec("F32", (10,))
    return specs


ARCHITECTURE = Architecture(
    name="mnist-resnet18",
    input=InputSpec("image", (1, 28, 28)),
    classes=10,
    tensors=_tensors(),
    build=build,
    preprocess=preprocess,
    # One core, torch 2.14: channels-last is faster for one row (3.4 ms against 4.1) and slower for many
    # (64 rows: 41.4 ms against 38.7), and would give each replica a copy of all 45 MB of its own.
    channels_last=False,
)
