"""Digits, handwritings, conversion; and that a fine-tuning really learns (on a small share of the digits)."""

from __future__ import annotations

import gzip
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flatshare.mnist.digits import load_digits
from flatshare.mnist.handwriting import HANDWRITINGS, handwriting
from flatshare.mnist.train import fine_tune, load_module, predict_labels, train_base
from flatshare.models.architecture import architecture
from flatshare.models.convert import is_torchscript, to_safetensors
from flatshare_registry.errors import InvalidInput, InvalidWeights
from flatshare_registry.weights import TensorSpec, check_architecture, describe

NETWORK = architecture("mnist-cnn")
DIGITS = load_digits()


def test_the_shipped_digits_are_the_canonical_ones_split_once() -> None:
    assert DIGITS.train_images.shape == (8000, 28, 28)
    assert DIGITS.test_images.shape == (2000, 28, 28)
    everything = np.concatenate([DIGITS.train_labels, DIGITS.test_labels])
    # The label counts of t10k, as published.
    assert np.bincount(everything).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    again = load_digits()
    np.testing.assert_array_equal(again.test_images, DIGITS.test_images)


def test_a_folder_of_files_is_read_packed_or_not(tmp_path: Path) -> None:
    def idx(array: np.ndarray) -> bytes:
        shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
        return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()

    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.ones((3, 28, 28))))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([1, 2, 3]))))
    with pytest.raises(InvalidInput, match="t10k-images"):
        load_digits(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((2, 28, 28)))))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([4, 5])))
    digits = load_digits(tmp_path)
    assert digits.train_labels.tolist() == [1, 2, 3]
    assert digits.test_labels.tolist() == [4, 5]
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([4])))
    with pytest.raises(InvalidInput, match="belong together"):
        load_digits(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x09x")
    with pytest.raises(InvalidInput, match="truncated"):
        load_digits(tmp_path)


@pytest.mark.parametrize("name", HANDWRITINGS)
def test_a_handwriting_is_deterministic_keeps_shapes_and_changes_something(name: str) -> None:
    images, labels = DIGITS.test_images[:100], DIGITS.test_labels[:100]
    one = handwriting(name).apply(images, labels, seed=3)
    two = handwriting(name).apply(images, labels, seed=3)
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)
    assert (one[0].shape, one[0].dtype) == (images.shape, np.uint8)
    assert set(one[1].tolist()) <= set(range(10))
    assert (one[0] != images).any() or (one[1] != labels).any()


def test_there_are_at_least_twelve_and_unknown_ones_are_refused() -> None:
    assert len(HANDWRITINGS) >= 12
    with pytest.raises(InvalidInput, match="there are rotated"):
        handwriting("cuneiform")


def test_a_fine_tuning_learns_its_customers_digits(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    few = replace(
        DIGITS,
        train_images=DIGITS.train_images[:1500],
        train_labels=DIGITS.train_labels[:1500],
        test_images=DIGITS.test_images[:400],
        test_labels=DIGITS.test_labels[:400],
    )
    seen: list[tuple[int, int]] = []
    weights, accuracy = train_base(
        NETWORK, few, epochs=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (3000, 3000)
    assert accuracy > 0.85
    path = tmp_path / "base.safetensors"
    path.write_bytes(weights)
    base = load_module(NETWORK, path)
    before = predict_labels(base, NETWORK.preprocess(few.test_images))
    trained = fine_tune(NETWORK, base, few, handwriting("inverted"), epochs=1)
    assert trained.own_accuracy > 0.85
    assert trained.own_accuracy > trained.base_accuracy + 0.2
    check_architecture(describe(trained.weights).tensors, NETWORK.name, NETWORK.tensors)
    after = predict_labels(base, NETWORK.preprocess(few.test_images))
    np.testing.assert_array_equal(before, after, err_msg="the base model was changed")


def equal(data: bytes, module: torch.nn.Module) -> bool:
    from safetensors.torch import load

    state = module.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in load(data).items())


def test_convert_takes_torchscript_when_it_is_trusted(tmp_path: Path) -> None:
    module = NETWORK.build()
    path = tmp_path / "model.pt"
    with torch.no_grad():
        torch.jit.save(torch.jit.script(module), path)
    assert is_torchscript(path)
    with pytest.raises(InvalidWeights, match="--trust-torchscript"):
        to_safetensors(path, NETWORK)
    assert equal(to_safetensors(path, NETWORK, trust_torchscript=True), module)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module."])
def test_convert_takes_checkpoints(tmp_path: Path, wrap: str) -> None:
    module = NETWORK.build()
    state: object = module.state_dict()
    if wrap in ("state_dict", "model"):
        state = {wrap: state, "epoch": 3}
    elif wrap == "module.":
        state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    assert not is_torchscript(path)
    assert equal(to_safetensors(path, NETWORK), module)


WRAPPERS = ["module.", "_orig_mod.", "model."]


@pytest.mark.parametrize(
    "prefix", ["".join(order) for count in (1, 2, 3) for order in itertools.product(WRAPPERS, repeat=count)]
)
def test_convert_peels_wrappers_in_any_order(tmp_path: Path, prefix: str) -> None:
    module = NETWORK.build()
    path = tmp_path / "checkpoint.pt"
    torch.save({f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}, path)
    notes: list[str] = []
    assert equal(to_safetensors(path, NETWORK, note=notes.append), module)
    assert notes == [f"took {prefix.removesuffix('.')!r} off the names"]


def test_convert_takes_what_real_wrappers_make(tmp_path: Path) -> None:
    for wrap in (
        lambda module: torch.nn.DataParallel(torch.compile(module)),
        lambda module: torch.compile(torch.nn.DataParallel(module)),
        lambda module: torch.nn.ModuleDict({"model": torch.compile(module)}),
    ):
        module = NETWORK.build()
        path = tmp_path / "checkpoint.pt"
        torch.save(
            {"epoch": 3, "model_state_dict": wrap(module).state_dict(), "optimizer": {"lr": 1.0}}, path
        )
        assert equal(to_safetensors(path, NETWORK), module)


def test_convert_takes_a_part_that_was_compiled_alone(tmp_path: Path) -> None:
    module, compiled = NETWORK.build(), NETWORK.build()
    compiled.load_state_dict(module.state_dict())
    first = next(iter(dict(compiled.named_children())))
    setattr(compiled, first, torch.compile(getattr(compiled, first)))
    assert any("._orig_mod." in name for name in compiled.state_dict())
    path = tmp_path / "checkpoint.pt"
    torch.save(compiled.state_dict(), path)
    assert equal(to_safetensors(path, NETWORK), module)


def test_convert_leaves_an_architectures_own_names_alone(tmp_path: Path) -> None:
    own = replace(NETWORK, tensors={f"model.{name}": spec for name, spec in NETWORK.tensors.items()})
    state = {f"model.{name}": tensor for name, tensor in NETWORK.build().state_dict().items()}
    for wrapped in (state, {f"module.{name}": tensor for name, tensor in state.items()}):
        path = tmp_path / "checkpoint.pt"
        torch.save(wrapped, path)
        found = describe(to_safetensors(path, own)).tensors
        assert {one.name for one in found} == set(own.tensors)


@pytest.mark.parametrize(
    "keys",
    [["model_state_dict"], ["state_dict"], ["model"], ["model", "state_dict"], ["state_dict", "model"],
     ["model", "model_state_dict"], ["module"]],
)  # fmt: skip
def test_convert_finds_the_state_in_what_trainers_write(tmp_path: Path, keys: list[str]) -> None:
    module = NETWORK.build()
    document: object = module.state_dict()
    for key in reversed(keys):
        document = {key: document, "epoch": 3, "optimizer_state_dict": {"state": {}}}
    path = tmp_path / "checkpoint.pt"
    torch.save(document, path)
    assert equal(to_safetensors(path, NETWORK), module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_convert_makes_the_architectures_dtype_of_another(tmp_path: Path, dtype: torch.dtype) -> None:
    module = NETWORK.build().to(dtype)
    path = tmp_path / "checkpoint.pt"
    torch.save(module.state_dict(), path)
    notes: list[str] = []
    data = to_safetensors(path, NETWORK, note=notes.append)
    check_architecture(describe(data).tensors, NETWORK.name, NETWORK.tensors)
    assert equal(data, module.to(torch.float32))
    assert len(notes) == 1
    assert "F32" in notes[0]


def test_convert_refuses_numbers_that_do_not_fit(tmp_path: Path) -> None:
    half = replace(
        NETWORK, tensors={name: TensorSpec("F16", spec.shape) for name, spec in NETWORK.tensors.items()}
    )
    state = NETWORK.build().state_dict()
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    assert describe(to_safetensors(path, half)).tensors[0].dtype == "F16"
    name = next(iter(state))
    state[name].view(-1)[3] = 1e6
    torch.save(state, path)
    with pytest.raises(InvalidWeights, match=re.escape(f"{name!r} holds numbers that F16 can't")):
        to_safetensors(path, half)


def test_convert_shows_what_it_found(tmp_path: Path) -> None:
    state = {f"backbone.{name}": tensor for name, tensor in NETWORK.build().state_dict().items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": state}, path)
    with pytest.raises(InvalidWeights) as caught:
        to_safetensors(path, NETWORK)
    name = next(iter(NETWORK.tensors))
    assert repr(name) in caught.value.message
    assert repr(f"backbone.{name}") in caught.value.message
    torch.save({"epoch": 3, "generator": state}, path)
    with pytest.raises(InvalidWeights, match=r"'epoch'.*'generator'"):
        to_safetensors(path, NETWORK)
    wrong = NETWORK.build().state_dict()
    wrong[name] = torch.zeros(2, 3)
    torch.save(wrong, path)
    with pytest.raises(InvalidWeights, match=re.escape(f"{name!r} is F32[2, 3], must be F32[")):
        to_safetensors(path, NETWORK)


@pytest.mark.parametrize(
    "odd", [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)]
)
def test_convert_refuses_tensors_that_hold_no_plain_numbers(tmp_path: Path, odd: torch.Tensor) -> None:
    state = NETWORK.build().state_dict()
    name = next(iter(state))
    state[name] = odd
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    with pytest.raises(InvalidWeights, match=re.escape(name)):
        to_safetensors(path, NETWORK)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code ran')",))


def test_convert_runs_no_code_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"w": Evil()}, path)
    with pytest.raises(InvalidWeights, match="plain tensors"):
        to_safetensors(path, NETWORK)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_convert_refuses_what_it_cannot_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(InvalidWeights):
        to_safetensors(path, NETWORK, trust_torchscript=True)


def test_convert_refuses_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(InvalidWeights, match="not a mnist-cnn"):
        to_safetensors(path, NETWORK)
