"""Layers as functions: each is its module, bit by bit, and none writes into what it was given by others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.models.architecture import architecture
from flatshare.models.layers import function_of
from flatshare.models.probe import probe_logits, probe_rows
from flatshare.models.stages import Model, Stage, plan_of
from flatshare_registry.testing.files import encode_safetensors

LAYERS = [
    nn.Conv2d(4, 8, 3),
    nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(4, 8, (3, 5), dilation=(2, 1), groups=2, padding="same"),
    nn.Flatten(),
    nn.Flatten(2, 3),
    nn.Linear(12, 5),
    nn.Linear(12, 5, bias=False),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    nn.ReLU(),
    nn.ReLU(inplace=True),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_function_gives_what_its_layer_gives(layer: nn.Module) -> None:
    rows = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    run = function_of(layer, may_overwrite=True)
    assert run is not None
    with torch.inference_mode():
        assert torch.equal(run(rows.clone(), *layer.state_dict().values()), layer(rows.clone()))


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def hooked() -> nn.Module:
    layer = nn.Linear(12, 5)
    layer.register_forward_hook(lambda layer, given, output: output * 2)
    return layer


def patched() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda rows: rows * 2  # type: ignore[method-assign]  # what some exporters do
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Doubling(12, 5),
        hooked(),
        patched(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2, return_indices=True),
    ],
    ids=["subclass", "hook", "patched", "unknown", "reflected", "indices"],
)
def test_a_layer_that_may_do_more_stays_a_layer(layer: nn.Module) -> None:
    assert function_of(layer, may_overwrite=True) is None


@pytest.mark.parametrize("odd", [Doubling(784, 10), nn.Softmax(1), nn.Hardtanh(0.0, 0.5)], ids=str)
def test_functions_and_layers_meet_in_one_network(odd: nn.Module) -> None:
    def build() -> nn.Module:
        last = type(odd)(784, 10) if isinstance(odd, nn.Linear) else odd
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 784), nn.ReLU(inplace=True), last).eval()

    network = replace(architecture("mnist-cnn"), name=f"meets-{odd}", build=build)
    torch.manual_seed(2)
    module, rows = build(), torch.randn(2, 1, 28, 28)
    plan = plan_of(network)
    model = Model(tuple(plan.stage(index, module.state_dict()) for index in range(len(plan.names))))
    with torch.inference_mode():
        assert torch.equal(model(rows), module(rows))


def test_the_workload_runs_without_a_module() -> None:
    network = architecture("mnist-cnn")
    plan, state = plan_of(network), network.build().state_dict()
    stages: list[Stage] = [plan.stage(index, state) for index in range(len(plan.names))]
    assert not [run for stage in stages for run, _ in stage.steps if isinstance(run, nn.Module)]


def test_a_network_that_begins_in_place_leaves_its_input_alone() -> None:
    """An in-place ReLU in front wrote zeros into the probe's rows, which all models of its kind share."""

    def build() -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(784, 10)).eval()

    network = replace(architecture("mnist-cnn"), name="in-place", build=build)
    torch.manual_seed(2)
    module, before = build(), probe_rows(network).copy()
    assert (before < 0).any()
    plan = plan_of(network)
    rows = torch.from_numpy(before.copy())
    with torch.inference_mode():
        plan.stage(0, module.state_dict())(rows)
    assert np.array_equal(rows.numpy(), before)
    probe_logits(
        network, encode_safetensors({name: one.numpy() for name, one in module.state_dict().items()})
    )
    assert np.array_equal(probe_rows(network), before)
