"""torch's layers as plain functions over rows and tensors: no module is built for a model, and none called.

Beside its computation, every module costs the same: a lookup of hooks and attributes at each call, and
a copy of it at each load. Measured for one row of ``mnist-cnn`` on one core: 492
microseconds as functions, 551 as modules; on 20 models in turn 621 and 681. TorchScript is no faster
(498 and 633) and deprecated; oneDNN's fused convolution and ReLU, with weights that are not packed, is
slower (572 and 700; 64 rows 25.1 ms against 22.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["LayerFunction", "does_nothing", "function_of"]

LayerFunction = Callable[..., torch.Tensor]
"""Takes rows and then the layer's own tensors, in the order of its state dict."""


def _convolution(layer: nn.Conv2d) -> LayerFunction | None:
    if layer.padding_mode != "zeros":
        return None
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups

    def convolve(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.conv2d(rows, weight, bias, stride, padding, dilation, groups)

    return convolve


def _flatten(layer: nn.Flatten) -> LayerFunction:
    first, last = layer.start_dim, layer.end_dim
    return lambda rows: torch.flatten(rows, first, last)


def _max_pool(layer: nn.MaxPool2d) -> LayerFunction | None:
    if layer.return_indices:
        return None
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
    return lambda rows: torch.max_pool2d(rows, *settings)


_MAKERS: Final[dict[type[nn.Module], Callable[[Any], LayerFunction | None]]] = {
    nn.Conv2d: _convolution,
    nn.Flatten: _flatten,
    nn.Linear: lambda _: nn.functional.linear,
    nn.MaxPool2d: _max_pool,
    nn.ReLU: lambda layer: torch.relu_ if layer.inplace else torch.relu,
}


def function_of(layer: nn.Module, *, may_overwrite: bool) -> LayerFunction | None:
    """What a layer computes as a function; None if only the layer itself can do it.

    Just for layers that are exactly torch's own: a subclass, or one with hooks, may do anything.

    Parameters
    ----------
    may_overwrite
        Whether its input rows are the network's own by now. Otherwise a network that begins with an in-place
        ReLU would write into a request, or into the probe that all models share.
    """
    make = _MAKERS.get(type(layer))
    if make is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None
    made = make(layer)
    return torch.relu if made is torch.relu_ and not may_overwrite else made


def does_nothing(layer: nn.Module) -> bool:
    """Whether a layer passes its input on unchanged, in a model that only answers."""
    return isinstance(layer, _DropoutNd | nn.Identity)
