"""Forward passes for rows of several models: what they share runs once.

Models are chains of stages, and equal stages are the same object (``models/stages.py``). Rows whose
models begin with the same stages go through these together and part where their models differ. The
plain path, each model alone, is :class:`~flatshare.models.stages.Model` itself; both give the same
logits to 1e-5 (``tests/unit/flatshare/engine/test_passes.py``).

Models of one architecture that share nothing can come in one pass too (``Inference(meet=True)``), and run one
after the other. On CUDA they could run together with stacked weights (``torch.func`` or ``bmm``), which may
win for small networks. That wants a GPU to measure; its place is where :func:`forward` parts groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from flatshare.errors import ModelFailed
from flatshare.models.stages import Model

__all__ = ["forward"]


def forward(
    models: Sequence[Model],
    rows: Sequence[torch.Tensor],
    padded: Callable[[int], int] = lambda count: count,
) -> list[torch.Tensor]:
    """Logits of each model for its rows.

    Parameters
    ----------
    models, rows
        As long as each other; rows ``(N_i, *input.shape)`` on the models' device.
    padded
        How many rows so many are computed as: zeros are added, and what becomes of them is left out again.

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
        indices = list(group)  # who shares nothing with others has nothing to put together, and to part
        parts = [rows[index] for index in indices]
        todo.append((indices, parts[0] if len(parts) == 1 else torch.cat(parts), 0))
    # A loop, not a nested function that calls itself: that would be a cycle, and keep every model that
    # ever ran alive until the cycle collector comes by.
    while todo:
        indices, inputs, depth = todo.pop()
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
    return logits


def _ordered(rows: torch.Tensor, model: Model) -> torch.Tensor:
    """Rows in the memory order in which a model computes."""
    if model.channels_last and rows.dim() == 4:
        return rows.contiguous(memory_format=torch.channels_last)
    return rows


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows, and as many zeros as are missing; nothing of anybody's."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing > 0 else rows


def _cut(found: torch.Tensor, count: int, computed: int) -> torch.Tensor:
    """What became of the rows, without what became of the zeros."""
    if computed == count:
        return found
    if len(found) != computed:
        raise ModelFailed(f"a network gave {len(found)} rows for {computed}")
    return found[:count]
