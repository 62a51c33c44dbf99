"""Architectures: what they ask for is what they build; weights are views; one transform for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision import transforms

from flatshare.errors import ModelFailed
from flatshare.models.architecture import architecture, architecture_names
from flatshare.models.materialize import device_bytes, materialize
from flatshare.training.mnist import load_digits
from flatshare_registry.errors import InvalidInput
from flatshare_registry.records import VersionRecord, utc
from flatshare_registry.weights import describe


def weights_of(name: str, seed: int = 0) -> tuple[bytes, torch.nn.Module]:
    torch.manual_seed(seed)
    module = architecture(name).build()
    return save({key: tensor.contiguous() for key, tensor in module.state_dict().items()}), module


def record_of(name: str, data: bytes) -> VersionRecord:
    described = describe(data)
    return VersionRecord(
        tenant="acme", version=1, architecture=name, digest=described.digest, size_bytes=described.size_bytes,
        tensors=described.tensors, created_at=utc(0), created_by="test",
    )  # fmt: skip


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


@pytest.mark.parametrize("name", ["mnist-cnn", "mnist-resnet18"])
def test_a_materialized_model_gives_the_same_logits(name: str) -> None:
    data, module = weights_of(name, seed=3)
    made = materialize(architecture(name), record_of(name, data), data)
    rows = torch.rand(6, 1, 28, 28) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(made(rows), module(rows), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made(rows[2:3]), module(rows)[2:3], rtol=1e-5, atol=1e-5)
    assert not any(one.requires_grad or one.is_meta for one in made.parameters())
    assert not made.training
    assert device_bytes(made) == sum(one.nbytes for one in module.state_dict().values())


def test_dense_layers_are_views_of_the_files_bytes() -> None:
    data, _ = weights_of("mnist-cnn")
    record = record_of("mnist-cnn", data)
    made = materialize(architecture("mnist-cnn"), record, data)
    base = np.frombuffer(data, dtype=np.uint8).ctypes.data
    start = next(one.start for one in record.tensors if one.name == "fc1.weight")
    assert made.get_parameter("fc1.weight").data_ptr() == base + start


def test_weights_of_another_architecture_are_a_failed_model() -> None:
    data, _ = weights_of("mnist-cnn")
    with pytest.raises(ModelFailed, match="acme@1"):
        materialize(architecture("mnist-resnet18"), record_of("mnist-cnn", data), data)


def test_the_transform_is_the_notebooks_to_the_bit() -> None:
    pixels = load_digits().test_images[:50]
    notebook = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    wanted = torch.stack([notebook(one) for one in pixels]).numpy()
    np.testing.assert_array_equal(architecture("mnist-cnn").preprocess(pixels), wanted)
