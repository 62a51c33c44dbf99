"""The probe's tolerance: right answers of other machines and types pass, wrong ones never do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from flatshare.errors import ProbeFailed
from flatshare.models.architecture import Architecture, architecture
from flatshare.models.probe import check_probe_logits, probe_rows, probe_tolerance
from flatshare_registry.records import VersionRecord
from flatshare_registry.weights import TensorSpec

CPU = torch.device("cpu")
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def in_type(base: Architecture, dtype: torch.dtype) -> Architecture:
    """The same network with weights of another type."""
    specs = {name: TensorSpec(CODES[dtype], spec.shape) for name, spec in base.tensors.items()}
    return replace(base, name=f"{base.name}-{CODES[dtype]}", tensors=specs)


def answer(
    module: nn.Module, dtype: torch.dtype, rows: NDArray[np.float32], noise: float, seed: int
) -> NDArray[np.float32]:
    """What a network in ``dtype`` says when each layer's sums are off by ``noise`` before they are rounded."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(dtype)

    def another_order(layer: nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        exact = output.float()
        return (exact * (1 + noise * torch.randn(exact.shape, generator=generator))).to(dtype)

    hooks = [
        layer.register_forward_hook(another_order) for layer in module.modules() if not list(layer.children())
    ]
    with torch.inference_mode():
        logits: NDArray[np.float32] = module(torch.from_numpy(rows).to(dtype)).float()[0].numpy()
    for hook in hooks:
        hook.remove()
    return logits


def record(logits: NDArray[np.float32]) -> VersionRecord:
    return VersionRecord.model_construct(tenant="acme", version=1, probe_logits=tuple(map(float, logits)))


def built(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return architecture(name).build().eval()


@pytest.mark.parametrize("name", ["mnist-cnn", "mnist-resnet18"])
@pytest.mark.parametrize("dtype", CODES)
def test_another_order_of_sums_is_no_failure(name: str, dtype: torch.dtype) -> None:
    network = in_type(architecture(name), dtype)
    worst = 0.0
    for seed in range(4):
        rows = probe_rows(architecture(name))
        wanted = answer(built(name, seed), dtype, rows, 0.0, 0)
        for noise_seed in range(3):
            found = answer(built(name, seed), dtype, rows, 2e-6, noise_seed)
            check_probe_logits(network, record(wanted), found, CPU)
            worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    assert worst < 0.7 * probe_tolerance(network, CPU), "right answers are well within it"


def tf32(module: nn.Module) -> None:
    """Inputs and weights of convolutions in ten bits of mantissa, as a tensor core takes them."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = cut(layer.weight.data)
            layer.register_forward_pre_hook(lambda layer, given: (cut(given[0]),))


@pytest.fixture
def tf32_flags() -> Iterator[None]:
    """Torch's own flags, as they were afterwards; monkeypatch can't read all of them."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("tf32_flags")
@pytest.mark.parametrize("name", ["mnist-cnn", "mnist-resnet18"])
def test_a_device_that_computes_in_tf32_has_its_own_tolerance(name: str) -> None:
    network, cuda = architecture(name), torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = True
    loose = probe_tolerance(network, cuda)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    assert probe_tolerance(network, cuda) == probe_tolerance(network, CPU) < loose
    torch.backends.cudnn.allow_tf32 = True
    for seed in range(4):
        rows = torch.from_numpy(probe_rows(network))
        with torch.inference_mode():
            wanted = built(name, seed)(rows)[0].numpy()
            module = built(name, seed)
            tf32(module)
            found = module(rows)[0].numpy()
        assert np.abs(found - wanted).max() > 1e-6, "it is another arithmetic"
        check_probe_logits(network, record(wanted), found, cuda)


def damaged_head(module: nn.Module) -> None:
    list(module.parameters())[-1].data.zero_()
    list(module.parameters())[-2].data.zero_()


def damaged_layer(module: nn.Module) -> None:
    next(p for p in module.parameters() if p.dim() == 4).data.mul_(-1)


def swapped_classes(module: nn.Module) -> None:
    head = list(module.parameters())[-2].data
    head[[0, 1]] = head[[1, 0]]


@pytest.mark.parametrize("damage", [damaged_head, damaged_layer, swapped_classes])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_model_fails_however_small_its_logits_are(
    damage: Callable[[nn.Module], None], scale: float, dtype: torch.dtype
) -> None:
    """A head scaled by 1e-4 gives the same labels; beside zeros it was "no difference"."""
    network = in_type(architecture("mnist-cnn"), dtype)
    rows = probe_rows(architecture("mnist-cnn"))

    def scaled() -> nn.Module:
        module = built("mnist-cnn", 1)
        for parameter in list(module.parameters())[-2:]:
            parameter.data.mul_(scale)
        return module

    wanted = answer(scaled(), dtype, rows, 0.0, 0)
    check_probe_logits(network, record(wanted), answer(scaled(), dtype, rows, 0.0, 0), CPU)
    wrong = scaled()
    damage(wrong)
    with pytest.raises(ProbeFailed):
        check_probe_logits(network, record(wanted), answer(wrong, dtype, rows, 0.0, 0), CPU)


@pytest.mark.parametrize("found", [np.full(10, np.nan), np.zeros(9), np.full(10, 1e-30), np.full(10, np.inf)])
def test_zeros_must_be_zeros_and_nan_is_nothing(found: NDArray[np.float64]) -> None:
    network = architecture("mnist-cnn")
    check_probe_logits(network, record(np.zeros(10, np.float32)), np.zeros(10, np.float32), CPU)
    with pytest.raises(ProbeFailed):
        check_probe_logits(network, record(np.zeros(10, np.float32)), found.astype(np.float32), CPU)
