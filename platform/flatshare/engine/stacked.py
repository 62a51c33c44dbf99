"""Models of one architecture that share nothing, in one pass: their weights stacked, layer by layer.

Small networks are bound by launches on a GPU: 16 models of five layers are 80 kernels for work that fits into
five. Here a layer of K models runs once, over rows ``(K, N, …)`` and weights ``(K, …)`` (``torch.vmap``: a
linear layer becomes one batched product, a convolution one with groups). What it costs is a copy of the
weights into the stack, at memory bandwidth, and rows that are padded to the longest.

Off by default (``stack_models``): on a GPU it is faster where many models meet, and slower where few do.
Each stacked pass checks the stored probe of one of its models. If that answer is wrong or the pass raises,
and each model is right alone, its architecture is not stacked again (``runner.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

from flatshare.models.architecture import Architecture
from flatshare.models.stages import Model, Plan, Stage, plan_of

__all__ = ["MOST_MODELS", "Stacks"]

logger = logging.getLogger("flatshare.engine")

MOST_MODELS: Final = 16
"""Models of one stack. Each architecture's slabs grow to the largest stack that it had, and stay: they come
out of the headroom, not out of the models' budget."""


class Stacks:
    """The stacks of one device: slabs ``(K, …)`` for each tensor of an architecture.

    Used by the thread of the passes alone. A slab is written and read on one stream, so nothing waits. It is
    overwritten after each pass: a stack keeps nothing of a tenant.

    Parameters
    ----------
    networks
        Architecture by name; raises for one that is not installed.
    padded
        From a number of rows to the number that is computed.
    """

    def __init__(
        self, networks: Callable[[str], Architecture], padded: Callable[[int], int] = lambda count: count
    ) -> None:
        self._networks = networks
        self._padded = padded
        self._stacks: dict[str, _Stack | None] = {}
        self.passes = 0

    def disable(self, architecture: str) -> None:
        """Run an architecture by the plain path alone from now on: its stack was wrong."""
        logger.error("%s gives other logits in a stack than alone: it is not stacked again", architecture)
        self._stacks[architecture] = None

    def takes(self, architecture: str) -> bool:
        """Whether models of an architecture can be stacked, as far as is known."""
        return self._stacks.get(architecture, False) is not None

    def run(
        self, models: Sequence[Model], rows: Sequence[torch.Tensor], depth: int
    ) -> list[torch.Tensor] | None:
        """Logits of models of one architecture, from a stage on; None where they can't be stacked.

        Parameters
        ----------
        rows
            ``(N_i, …)``, what each model's stage ``depth`` takes.
        """
        if not all(isinstance(stage, Stage) for model in models for stage in model.stages):
            return None  # not made by a plan: nobody knows its layers
        name = models[0].architecture
        if name not in self._stacks:
            self._stacks[name] = _Stack(plan_of(self._networks(name)), self._padded)
        stack = self._stacks[name]
        if stack is None:
            return None
        logits: list[torch.Tensor] = []
        for start in range(0, len(models), MOST_MODELS):
            some = slice(start, start + MOST_MODELS)
            logits += stack.run(models[some], rows[some], depth)
            self.passes += 1
        return logits


class _Stack:
    """An architecture's layers as functions of stacked tensors."""

    def __init__(self, plan: Plan, padded: Callable[[int], int]) -> None:
        self._stages = [[_StackedLayer(run, module) for run, module in stage] for stage in plan.layers()]
        self._padded = padded

    def run(self, models: Sequence[Model], rows: Sequence[torch.Tensor], depth: int) -> list[torch.Tensor]:
        most = self._padded(max(map(len, rows)))
        together = rows[0].new_zeros(len(models), most, *rows[0].shape[1:])
        for index, one in enumerate(rows):
            together[index, : len(one)] = one
        for number in range(depth, len(self._stages)):
            for position, layer in enumerate(self._stages[number]):
                together = layer([model.layer_tensors(number, position) for model in models], together)
        return [together[index, : len(one)] for index, one in enumerate(rows)]


class _StackedLayer:
    """One layer over the rows of several models."""

    def __init__(self, run: Callable[..., torch.Tensor] | None, module: nn.Module) -> None:
        self._slabs: list[torch.Tensor] = []
        if run is not None:
            self._run = torch.vmap(run)
        else:
            names = list(module.state_dict(keep_vars=True))

            def call(rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
                given = dict(zip(names, tensors, strict=True))
                found: torch.Tensor = torch.func.functional_call(module, given, (rows,))
                return found

            self._run = torch.vmap(call)

    def __call__(self, tensors: Sequence[Sequence[torch.Tensor]], rows: torch.Tensor) -> torch.Tensor:
        """Rows ``(K, N, …)`` through K models' layers, whose tensors are given one model after the other."""
        count = len(tensors)
        if not self._slabs or len(self._slabs[0]) < count:
            places = min(1 << (count - 1).bit_length(), MOST_MODELS)
            self._slabs = [one.new_zeros(places, *one.shape) for one in tensors[0]]
        stacked = [slab[:count] for slab in self._slabs]
        try:
            for position, slab in enumerate(stacked):
                torch.stack([one[position] for one in tensors], out=slab)
            return self._run(rows, *stacked)
        finally:
            for slab in stacked:
                slab.zero_()
