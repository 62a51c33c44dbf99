"""Stages: how a network falls apart, and that putting it together again changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.errors import ModelFailed
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits, probe_rows
from flatshare.models.stages import Model, device_tensor, plan_of
from flatshare_registry.testing.files import encode_safetensors


@pytest.mark.parametrize(("name", "stages"), [("mnist-cnn", 4), ("mnist-resnet18", 7)])
def test_the_stages_together_are_the_network(name: str, stages: int) -> None:
    network = architecture(name)
    torch.manual_seed(3)
    module = network.build()
    tensors = {
        key: device_tensor(tensor, channels_last=network.channels_last)
        for key, tensor in module.state_dict().items()
    }
    plan = plan_of(network)
    assert len(plan.names) == stages
    assert {one for names in plan.names for one in names} == set(network.tensors)
    model = Model(tuple(plan.stage(index, tensors) for index in range(stages)))
    rows = torch.rand(6, 1, 28, 28) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(model(rows), module(rows), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(rows[2:3]), module(rows)[2:3], rtol=1e-5, atol=1e-5)
    for own in (own for index in range(stages) for _, own in plan.stage(index, tensors).steps):
        assert not any(one.requires_grad or one.is_meta for one in own)


def test_dense_layers_are_the_tensors_given_and_not_copies() -> None:
    network = architecture("mnist-cnn")
    tensors = dict(network.build().state_dict())
    stage = plan_of(network).stage(2, tensors)
    assert stage.steps[0][1] == (tensors["fc1.weight"], tensors["fc1.bias"])


def test_a_module_that_comes_twice_runs_twice() -> None:
    def build() -> nn.Module:
        act = nn.Tanh()
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), act, nn.Linear(16, 10), act)

    network = replace(architecture("mnist-cnn"), name="twice", build=build)
    module = build()
    state = module.state_dict()
    plan = plan_of(network)
    model = Model(tuple(plan.stage(index, state) for index in range(len(plan.names))))
    rows = torch.rand(3, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model(rows), module(rows))


def test_a_network_that_is_no_sequential_is_one_stage() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(784, 10)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.layer(rows.flatten(1))

    network = replace(architecture("mnist-cnn"), name="odd", build=Odd, tensors={})
    plan = plan_of(network)
    assert plan.names == (("layer.weight", "layer.bias"),)
    state = Odd().state_dict()
    with torch.inference_mode():
        logits = plan.stage(0, state)(torch.ones(2, 1, 28, 28))
    torch.testing.assert_close(logits, torch.nn.functional.linear(torch.ones(2, 784), *state.values()))


def test_buffers_that_no_file_fills_are_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3), persistent=False)

    with pytest.raises(ModelFailed, match="no weights fill"):
        plan_of(replace(architecture("mnist-cnn"), name="hidden", build=Hidden))


def test_tensors_of_another_shape_are_a_failed_model() -> None:
    plan = plan_of(architecture("mnist-cnn"))
    with pytest.raises(ModelFailed, match=r"conv1\.weight does not fit"):
        plan.stage(0, {"conv1.weight": torch.zeros(1), "conv1.bias": torch.zeros(32)})


def test_the_probe_is_the_same_for_ever() -> None:
    rows = probe_rows(architecture("mnist-cnn"))
    assert (rows.shape, rows.dtype) == ((1, 1, 28, 28), np.float32)
    # Stored logits of every registered version rest on these: changing them is a change of format.
    assert float(rows.sum()) == pytest.approx(-3.5843, abs=1e-3)
    np.testing.assert_allclose(rows.ravel()[:3], [-1.0, -0.5686, -0.1373], atol=1e-3)


def test_weights_that_give_no_numbers_can_not_be_registered() -> None:
    network = architecture("mnist-cnn")
    state = {key: value.numpy() for key, value in network.build().state_dict().items()}
    assert len(probe_logits(network, encode_safetensors(state))) == 10
    state["fc2.bias"] = np.full(10, np.nan, dtype=np.float32)
    with pytest.raises(ModelFailed, match="not finite"):
        probe_logits(network, encode_safetensors(state))
