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
from importlib.metadata import entry_points
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
        Exactly the tensors that a weights file must hold.
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
def _found() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for point in entry_points(group=GROUP):
        loaded = point.load()
        if not isinstance(loaded, Architecture):
            raise InvalidInput(f"entry point {point.name} of {GROUP} is not an Architecture")
        if loaded.name != point.name or loaded.name in found:
            raise InvalidInput(f"entry point {point.name} of {GROUP} clashes with architecture {loaded.name}")
        found[loaded.name] = loaded
    return found


def architecture_names() -> list[str]:
    """Names of all installed architectures, sorted."""
    return sorted(_found())


def architecture(name: str) -> Architecture:
    """The architecture of this name.

    Raises
    ------
    InvalidInput
        None of this name is installed; the message lists those that are.
    """
    try:
        return _found()[name]
    except KeyError:
        raise InvalidInput(
            f"there is no architecture {name[:80]!a}; installed are {', '.join(architecture_names())}"
        ) from None
