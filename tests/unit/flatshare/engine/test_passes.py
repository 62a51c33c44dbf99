"""Passes across tenants: every path gives the same logits, and what is shared runs once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.engine.passes import forward
from flatshare.models.architecture import architecture
from flatshare.models.stages import Model, device_tensor, plan_of


class Tenants:
    """Models of one network that share the stages whose seeds are equal."""

    def __init__(self, name: str) -> None:
        self.network = architecture(name)
        self.plan = plan_of(self.network)
        self.depth = len(self.plan.names)
        self._made: dict[tuple[int, int], nn.Module] = {}

    def model(self, *seeds: int) -> Model:
        return Model(tuple(self._stage(index, seed) for index, seed in enumerate(seeds)))

    def _stage(self, index: int, seed: int) -> nn.Module:
        if (index, seed) not in self._made:
            torch.manual_seed(seed)
            state = self.network.build().state_dict()
            tensors = {
                name: device_tensor(state[name], channels_last=self.network.channels_last)
                for name in self.plan.names[index]
            }
            self._made[index, seed] = self.plan.stage(index, tensors)
        return self._made[index, seed]


@pytest.mark.parametrize("name", ["mnist-cnn", "mnist-resnet18"])
def test_every_path_gives_the_same_logits(name: str) -> None:
    tenants = Tenants(name)
    random = np.random.default_rng(0)
    base = tenants.depth * (0,)
    for split in range(tenants.depth + 1):
        # Tenants that part at ``split``, one that shares nothing, and one model twice.
        seeds = [base[:split] + (tenant,) * (tenants.depth - split) for tenant in (1, 2, 3)]
        seeds += [base, (9,) * tenants.depth, seeds[0], base]
        order = random.permutation(len(seeds))
        models = [tenants.model(*seeds[index]) for index in order]
        rows = [torch.rand(int(random.integers(1, 5)), 1, 28, 28) * 2 - 1 for _ in order]
        with torch.inference_mode():
            together = forward(models, rows)
            for model, part, found in zip(models, rows, together, strict=True):
                torch.testing.assert_close(found, model(part), rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(rows))
        return rows


def test_a_shared_prefix_runs_once_for_all_rows() -> None:
    base, middle, *heads = [Counting() for _ in range(5)]
    models = [Model((base, middle, head)) for head in heads]
    rows = [torch.full((size, 2), float(size)) for size in (1, 2, 3)]
    logits = forward(models, rows)
    assert (base.sizes, middle.sizes) == ([6], [6])
    assert sorted(itertools.chain.from_iterable(head.sizes for head in heads)) == [1, 2, 3]
    for part, found in zip(rows, logits, strict=True):
        assert torch.equal(part, found)


def test_models_that_share_nothing_run_one_after_the_other() -> None:
    one, two = Counting(), Counting()
    forward([Model((one,)), Model((two,)), Model((one,))], [torch.zeros(1, 1)] * 3)
    assert (one.sizes, two.sizes) == ([2], [1])


def test_rows_of_one_channel_have_the_strides_of_the_order_in_which_a_model_computes() -> None:
    """``contiguous`` leaves them as they are, and oneDNN then takes a slower convolution: 12 % at 16 rows."""
    seen: list[tuple[int, ...]] = []

    def stage(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.stride())
        return rows

    for channels_last in (True, False):
        forward([Model((stage,), channels_last=channels_last)], [torch.zeros(2, 1, 28, 28)])
    assert seen == [(784, 1, 28, 1), (784, 784, 28, 1)]
