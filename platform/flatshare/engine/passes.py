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

from collections.abc import Sequence
from itertools import groupby

import torch

from flatshare.models.stages import Model

__all__ = ["forward"]


def forward(models: Sequence[Model], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each model for its rows.

    Parameters
    ----------
    models, rows
        As long as each other; rows ``(N_i, *input.shape)`` on the models' device.

    Returns
    -------
    list of Tensor
        ``(N_i, classes)``, in the order of the models.
    """
    if len(models) == 1:
        return [models[0](rows[0])]
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
        while depth < len(first) and first[depth] is last[depth]:  # sorted: if the ends agree, so do all
            inputs = first[depth](inputs)
            depth += 1
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
