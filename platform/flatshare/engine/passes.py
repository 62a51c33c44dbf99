"""Forward passes for rows of several models: what they share runs once.

Models are chains of stages, and equal stages are the same object (``models/stages.py``). Rows whose
models begin with the same stages go through these together and part where their models differ. The
plain path, each model alone, is :class:`~flatshare.models.stages.Model` itself; both give the same
logits to 1e-5 (``tests/unit/flatshare/engine/test_passes.py``).

Models of one architecture that share nothing can come in one pass too, and run one after the other, or
together with their weights stacked (``stacked.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from flatshare.engine.stacked import Stacks
from flatshare.errors import ModelFailed
from flatshare.models.stages import Model

__all__ = ["forward"]


def forward(
    models: Sequence[Model],
    rows: Sequence[torch.Tensor],
    padded: Callable[[int], int] = lambda count: count,
    stacks: Stacks | None = None,
) -> list[torch.Tensor]:
    """Logits of each model for its rows.

    Parameters
    ----------
    models, rows
        As long as each other; rows ``(N_i, *input.shape)`` on the models' device.
    padded
        From a number of rows to the number that is computed: zeros are added, and their results are dropped.

    stacks
        Runs models of one architecture together from the first stage on that they do not share; None to run
        each apart.

    Returns
    -------
    list of Tensor
        ``(N_i, classes)``, in the order of the models.
    """
    rows = [_ordered(one, model) for one, model in zip(rows, models, strict=True)]
    if len(models) == 1:
        count = len(rows[0])
        return [_cut(models[0](_filled(rows[0], padded(count))), count, padded(count))]
    logits: list[torch.Tensor] = [torch.empty(0)] * len(models)
    # Neighbours share the longest prefix; the sort is stable, so equal models keep their order.
    order = sorted(range(len(models)), key=lambda index: tuple(map(id, models[index].stages)))
    todo: list[tuple[list[int], torch.Tensor, int]] = []
    for _, group in groupby(order, key=lambda index: id(models[index].stages[0])):
        indices = list(group)  # a model that shares nothing with others has nothing to join, or to split
        parts = [rows[index] for index in indices]
        todo.append((indices, parts[0] if len(parts) == 1 else torch.cat(parts), 0))
    alone: dict[tuple[str, int], list[tuple[int, torch.Tensor]]] = {}
    # A loop, not a nested function that calls itself: that would be a reference cycle, and would keep every
    # model that ever ran alive until the garbage collector runs.
    while todo:
        indices, inputs, depth = todo.pop()
        if stacks is not None and len(indices) == 1 and stacks.takes(models[indices[0]].architecture):
            alone.setdefault((models[indices[0]].architecture, depth), []).append((indices[0], inputs))
            continue
        first, last = models[indices[0]].stages, models[indices[-1]].stages
        count = len(inputs)
        inputs = _filled(inputs, padded(count))
        while depth < len(first) and first[depth] is last[depth]:  # sorted: if the ends agree, so do all
            inputs = first[depth](inputs)
            depth += 1
        inputs = _cut(inputs, count, padded(count))
        if depth == len(first):
            sizes = [len(rows[index]) for index in indices]
            for index, part in zip(indices, torch.split(inputs, sizes), strict=True):
                logits[index] = part
            continue
        start = 0
        for _, group in groupby(indices, key=lambda index: id(models[index].stages[depth])):
            together = list(group)
            size = sum(len(rows[index]) for index in together)
            todo.append((together, inputs[start : start + size], depth))
            start += size
    for (_, depth), some in alone.items():
        assert stacks is not None, "they were set aside for it"
        given = [inputs for _, inputs in some]
        stacked = stacks.run([models[index] for index, _ in some], given, depth) if len(some) > 1 else None
        if stacked is None:  # nobody to run with
            stacked = [_onward(models[index], inputs, depth, padded) for index, inputs in some]
        for (index, _), found in zip(some, stacked, strict=True):
            logits[index] = found
    return logits


def _onward(model: Model, inputs: torch.Tensor, depth: int, padded: Callable[[int], int]) -> torch.Tensor:
    """The output of a model from its stage ``depth`` on, for that stage's inputs."""
    count = len(inputs)
    found = _filled(inputs, padded(count))
    for stage in model.stages[depth:]:
        found = stage(found)
    return _cut(found, count, padded(count))


def _ordered(rows: torch.Tensor, model: Model) -> torch.Tensor:
    """Rows in the memory order in which a model computes.

    Not ``contiguous``: it takes rows of one channel to be in both orders, so they keep the other's strides,
    and their convolutions are then an eighth slower (16 rows of ``mnist-cnn``, oneDNN).
    """
    if model.channels_last and rows.dim() == 4:
        return rows.to(rows.device, memory_format=torch.channels_last)
    return rows


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows, filled up with zeros to ``count``; the padding holds nobody's data."""
    missing = count - len(rows)
    if missing <= 0:
        return rows
    zeros = rows.new_zeros(missing, *rows.shape[1:])
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        zeros = zeros.to(rows.device, memory_format=torch.channels_last)  # or cat would undo the order
    return torch.cat([rows, zeros])


def _cut(found: torch.Tensor, count: int, computed: int) -> torch.Tensor:
    """The results of the rows, without those of the added zeros."""
    if computed == count:
        return found
    if len(found) != computed:
        raise ModelFailed(f"a network gave {len(found)} rows for {computed}")
    return found[:count]
