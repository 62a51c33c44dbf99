"""What an architecture is, and how it is found by name.

An operator adds one with an entry point of the group ``flatshare.architectures`` whose object is
an :class:`Architecture`. This module needs no torch: a light install can check weights against an
architecture's tensors, and only :meth:`Architecture.build` imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from flatshare_registry.errors import InvalidInput
from flatshare_registry.weights import TensorSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Architecture", "InputSpec", "architecture", "architecture_names"]

GROUP: Final = "flatshare.architectures"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input tensor of a model.

    Attributes
    ----------
    name
        Its key in a JSON body.
    shape
        Of one row, channels first; batches are ``(N, *shape)`` float32.
    """

    name: str
    shape: tuple[int, int, int]

    @property
    def row_values(self) -> int:
        """Numbers in one row."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network without weights.

    Attributes
    ----------
    name
        As version records name it.
    input
        The input tensor.
    classes
        Logits in a row of the output, which is ``(N, classes)`` float32.
    tensors
        Exactly the tensors that its weights must hold.
    build
        Makes the module in eval mode; called under ``torch.device("meta")``, so it must allocate
        and initialise nothing by hand. May import torch; must not run at import time. The children
        of an ``nn.Sequential`` are stages: tenants that share the first ones share their memory and
        their passes (``models/stages.py``); any other module is one stage.
    preprocess
        uint8 pixels ``(N, H, W)`` or ``(N, H, W, C)`` to model-ready float32 ``(N, *input.shape)``;
        the same transform that its weights were trained with.
    channels_last
        Whether convolution weights are copied into channels-last order. A measured choice: faster
        convolutions against weights that stay views of files which all replicas share.
    threads
        Threads of one forward pass on CPU, where the operator sets no other number. A measured choice too.
    """

    name: str
    input: InputSpec
    classes: int
    tensors: Mapping[str, TensorSpec]
    build: Callable[[], nn.Module]
    preprocess: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    channels_last: bool = False
    threads: int = 1


@cache
def _points() -> dict[str, EntryPoint]:
    """Where each architecture is, by name. None is loaded: a broken one must not take the others along."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found and found[point.name].value != point.value:
            raise InvalidInput(f"two entry points of {GROUP} are called {point.name}")
        found[point.name] = point
    return found


def architecture_names() -> list[str]:
    """Names of all installed architectures, sorted."""
    return sorted(_points())


@cache
def architecture(name: str) -> Architecture:
    """The architecture of this name; loaded once a process.

    Raises
    ------
    InvalidInput
        None of this name is installed (the message lists those that are), or it can't be loaded.
    """
    point = _points().get(name)
    if point is None:
        raise InvalidInput(
            f"there is no architecture {name[:80]!a}; installed are {', '.join(architecture_names())}"
        )
    try:
        loaded = point.load()
    except Exception as error:  # whatever an operator's own package raises
        raise InvalidInput(f"architecture {name} can't be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, Architecture) or loaded.name != name:
        raise InvalidInput(f"entry point {name} of {GROUP} is not an Architecture of this name")
    return loaded
