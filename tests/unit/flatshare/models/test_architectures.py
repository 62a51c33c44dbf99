"""Architectures: what they ask for is what they build; weights are views; one transform for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision import transforms

from flatshare.mnist.digits import load_digits
from flatshare.models.architecture import architecture, architecture_names
from flatshare_registry.errors import InvalidInput
from flatshare_registry.weights import describe


def weights_of(name: str, seed: int = 0) -> tuple[bytes, torch.nn.Module]:
    torch.manual_seed(seed)
    module = architecture(name).build()
    return save({key: tensor.contiguous() for key, tensor in module.state_dict().items()}), module


def test_the_shipped_ones_are_found_by_entry_point() -> None:
    assert {"mnist-cnn", "mnist-resnet18"} <= set(architecture_names())
    with pytest.raises(InvalidInput, match="installed are mnist-cnn"):
        architecture("gpt")


@pytest.mark.parametrize("name", ["mnist-cnn", "mnist-resnet18"])
def test_the_tensors_asked_for_are_those_of_the_network(name: str) -> None:
    data, module = weights_of(name)
    found = {one.name: (one.dtype, one.shape) for one in describe(data).tensors}
    assert found == {key: (spec.dtype, spec.shape) for key, spec in architecture(name).tensors.items()}
    assert not module.training


def test_the_cnn_is_pytorchs_example() -> None:
    assert sum(one.numel() for one in architecture("mnist-cnn").build().parameters()) == 1_199_882


def test_the_transform_is_the_notebooks_to_the_bit() -> None:
    pixels = load_digits().test_images[:50]
    notebook = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    wanted = torch.stack([notebook(one) for one in pixels]).numpy()
    np.testing.assert_array_equal(architecture("mnist-cnn").preprocess(pixels), wanted)
