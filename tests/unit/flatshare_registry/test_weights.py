"""Safetensors files: good ones are described exactly, hostile ones get one clear error and little memory."""

import hashlib
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatshare_registry.errors import InvalidWeights
from flatshare_registry.testing.files import encode_safetensors, frame, specs_of
from flatshare_registry.weights import (
    MAX_HEADER_BYTES,
    TensorSpec,
    check_architecture,
    describe,
    read_weights,
)

GOOD = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1, 2], dtype=np.int64),
    "s": np.array(5, dtype=np.uint8),
    "none": np.zeros((0, 4), dtype=np.float32),
}


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_good_file_is_described_exactly() -> None:
    data = encode_safetensors(GOOD)
    described = describe(data)
    assert described.size_bytes == len(data)
    assert described.digest == hashlib.sha256(data).hexdigest()
    by_name = {record.name: record for record in described.tensors}
    assert set(by_name) == set(GOOD)
    for name, array in GOOD.items():
        record = by_name[name]
        assert data[record.start : record.end] == array.tobytes()
        assert record.sha256 == hashlib.sha256(array.tobytes()).hexdigest()
        assert record.shape == array.shape


def test_equal_tensors_of_two_files_have_equal_digests() -> None:
    one = describe(encode_safetensors(GOOD))
    two = describe(encode_safetensors({**GOOD, "b": np.array([3, 4], dtype=np.int64)}))
    digests = [{record.name: record.sha256 for record in file.tensors} for file in (one, two)]
    assert {name for name in GOOD if digests[0][name] != digests[1][name]} == {"b"}


def test_a_file_written_by_the_safetensors_library_is_accepted(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(GOOD, str(tmp_path / "w.safetensors"), metadata={"trained": "today"})
    data = read_weights(tmp_path / "w.safetensors")
    described = describe(data)
    check_architecture(described.tensors, "test", specs_of(GOOD))
    assert hashlib.sha256(data).hexdigest() == described.digest


HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "huge length": frame(b"{}", length=2**63),
    "length over the limit": frame(b"{}", length=MAX_HEADER_BYTES + 1),
    "length beyond the file": frame(b"{}", length=100),
    "not JSON": frame(b"hello"),
    "not UTF-8": frame(b'{"\xff": 1}'),
    "not an object": frame(b"[]"),
    "deep nesting": frame(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "absurd integer": frame(b'{"a":' + b"9" * 10_000 + b"}"),
    "no tensor": frame(b"{}"),
    "only metadata": frame(header(__metadata__={"a": "b"})),
    "metadata of numbers": frame(header(__metadata__={"a": 1}, w=tensor()), b"1234"),
    "metadata is a list": frame(header(__metadata__=[], w=tensor()), b"1234"),
    "duplicate name": frame(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "duplicate key inside": frame(
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"
    ),
    "negative offset": frame(header(w=tensor(offsets=(-4, 0))), b"1234"),
    "reversed offsets": frame(header(w=tensor(offsets=(4, 0))), b"1234"),
    "float offsets": frame(header(w=tensor(offsets=(0, 4.0))), b"1234"),
    "three offsets": frame(header(w=tensor(offsets=(0, 4, 4))), b"1234"),
    "offsets beyond the file": frame(header(w=tensor(shape=(2,), offsets=(0, 8))), b"1234"),
    "bytes after the last tensor": frame(header(w=tensor()), b"12345678"),
    "overlap": frame(header(a=tensor(shape=(2,), offsets=(0, 8)), b=tensor(offsets=(4, 8))), b"12345678"),
    "gap": frame(header(a=tensor(), b=tensor(offsets=(8, 12))), b"123456789012"),
    "unknown dtype": frame(header(w=tensor(dtype="F33")), b"1234"),
    "dtype is a list": frame(header(w=tensor(dtype=["F32"])), b"1234"),
    "shape does not fit": frame(header(w=tensor(shape=(2,))), b"1234"),
    "negative shape": frame(header(w=tensor(shape=(-1,))), b"1234"),
    "boolean shape": frame(header(w=tensor(shape=(True,))), b"1234"),
    "shape overflows": frame(header(w=tensor(shape=(2**40, 2**40))), b"1234"),
    "too many dimensions": frame(header(w=tensor(shape=(1,) * 9)), b"1234"),
    "missing key": frame(header(w={"dtype": "F32", "shape": [1]}), b"1234"),
    "unknown key": frame(header(w={**tensor(), "extra": 1}), b"1234"),
    "tensor is a string": frame(header(w="F32")),
    "empty name": frame(header(**{"": tensor()}), b"1234"),
    "name with a newline": frame(header(**{"a\nb": tensor()}), b"1234"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_get_one_clear_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InvalidWeights) as caught:
        describe(data)
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidWeights):
        read_weights(path)


def test_a_truncated_file_is_refused_at_every_length() -> None:
    data = encode_safetensors({"w": np.zeros(4, dtype=np.float32)})
    for length in range(len(data)):
        with pytest.raises(InvalidWeights):
            describe(data[:length])


def test_a_million_tensors_are_refused_with_little_memory() -> None:
    one = b'"t%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    text = b"{" + b"".join(one % number for number in range(1_000_000))[:-1] + b"}"
    data = frame(text)
    tracemalloc.start()
    with pytest.raises(InvalidWeights, match="the limit is"):
        describe(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_more_tensors_than_the_limit_are_refused() -> None:
    text = json.dumps({f"t{n}": tensor("U8", [0], [0, 0]) for n in range(20_001)}).encode()
    with pytest.raises(InvalidWeights, match="20001 tensors"):
        describe(frame(text))


@settings(max_examples=300)
@given(st.binary(max_size=400), st.integers(0, 200), st.binary(max_size=3))
def test_a_damaged_file_never_raises_anything_else(noise: bytes, at: int, patch: bytes) -> None:
    good = bytearray(encode_safetensors({"w": np.zeros(4, dtype=np.float32)}))
    good[at : at + len(patch)] = patch
    for data in (bytes(good), noise, frame(noise)):
        try:
            describe(data)
        except InvalidWeights:
            pass


def test_missing_and_unexpected_names_are_both_shown_the_nearest_first() -> None:
    wanted = {f"layer{number}.weight": TensorSpec("F32", (1,)) for number in range(9)}
    found = {
        f"{'net.' if number else 'something.quite.other.'}layer{number}.weight": np.zeros(1, np.float32)
        for number in range(9)
    }
    with pytest.raises(InvalidWeights) as caught:
        check_architecture(describe(encode_safetensors(found)).tensors, "net", wanted)
    message = caught.value.message
    assert "'layer1.weight', 'layer2.weight', 'layer3.weight' and 6 more are missing" in message
    assert (
        "'net.layer1.weight', 'net.layer2.weight', 'net.layer3.weight' and 6 more are not part of it"
        in message
    )


def test_naming_what_is_wrong_takes_no_time_whatever_is_wrong() -> None:
    wanted = {f"{'w' * 70}{number}": TensorSpec("F32", (1,)) for number in range(5000)}
    found = {f"{'v' * 70}{number}": np.zeros(1, np.float32) for number in range(5000)}
    tensors = describe(encode_safetensors(found)).tensors
    begun = time.perf_counter()
    with pytest.raises(InvalidWeights, match="4997 more"):
        check_architecture(tensors, "net", wanted)
    assert time.perf_counter() - begun < 5


def test_architecture_mismatches_are_named() -> None:
    wanted = {"w": TensorSpec("F32", (2, 3)), "gone": TensorSpec("F32", (1,)), "b": TensorSpec("I64", (3,))}
    with pytest.raises(InvalidWeights) as caught:
        check_architecture(describe(encode_safetensors(GOOD)).tensors, "mnist-cnn", wanted)
    assert "not a mnist-cnn" in caught.value.message
    assert "'gone' is missing" in caught.value.message
    assert "'none', 's' are not part of it" in caught.value.message
    assert "'b' is I64[2], must be I64[3]" in caught.value.message


def test_a_folder_is_not_weights(tmp_path: Path) -> None:
    with pytest.raises(InvalidWeights, match="can't be read"):
        read_weights(tmp_path)
