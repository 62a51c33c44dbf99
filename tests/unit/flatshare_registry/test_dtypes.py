"""Element types, whose sizes are those of the safetensors library; and where exactly the limits of a header are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flatshare_registry.errors import InvalidWeights
from flatshare_registry.testing.files import frame
from flatshare_registry.weights import (
    DTYPE_BYTES,
    MAX_DIMS,
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    TensorSpec,
    check_architecture,
    describe,
    read_weights,
)

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip


def test_every_type_that_is_accepted_is_tried_here() -> None:
    assert TORCH.keys() == DTYPE_BYTES.keys()


@pytest.mark.parametrize("name", TORCH)
def test_a_tensor_of_every_type_that_the_library_writes_is_accepted(name: str) -> None:
    dtype = TORCH[name]
    data = save({"w": torch.zeros(3, 5).to(dtype), "scalar": torch.zeros(()).to(dtype)})
    for one in describe(data).tensors:
        assert one.dtype == name
        assert one.end - one.start == dtype.itemsize * (15 if one.name == "w" else 1)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("by", [-1, 1])
def test_a_tensor_that_spans_a_byte_more_or_less_is_refused(name: str, by: int) -> None:
    size = 3 * TORCH[name].itemsize + by
    header = json.dumps({"w": {"dtype": name, "shape": [3], "data_offsets": [0, size]}}).encode()
    with pytest.raises(InvalidWeights, match=f"spans {size} bytes"):
        describe(frame(header, bytes(size)))


def one(**change: object) -> bytes:
    """A file of one tensor, changed."""
    entry = {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6], **change}
    return frame(json.dumps({"w": entry}).encode(), bytes(6))


def test_the_largest_that_is_accepted_is_accepted_and_one_more_is_not() -> None:
    assert describe(one()).tensors[0].shape == (2, 3)
    most = [1] * (MAX_DIMS - 1) + [6]
    assert describe(one(shape=most)).tensors[0].shape == tuple(most)
    with pytest.raises(InvalidWeights, match=f"at most {MAX_DIMS} sizes"):
        describe(one(shape=[1, *most]))
    for name, fits in (("n" * 512, True), ("n" * 513, False), ("", False), ("a\nb", False)):
        data = frame(json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode(), b"x")
        if fits:
            assert describe(data).tensors[0].name == name
        else:
            with pytest.raises(InvalidWeights, match="unusable name"):
                describe(data)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, -3]}, {"shape": [2, 3.0]}, {"shape": [True, 6]}, {"shape": "23"}, {"shape": None},
        {"shape": [MAX_ELEMENTS + 1, 0]}, {"data_offsets": [0]}, {"data_offsets": [0, 6, 6]}, {"data_offsets": [6, 0]},
        {"data_offsets": [0, True]}, {"data_offsets": [-1, 5]}, {"dtype": "F7"}, {"dtype": 8}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_is_not_well_formed_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidWeights, match="'w'"):
        describe(one(**change))


def test_an_empty_tensor_is_one_and_a_header_as_long_as_the_file_claims_none() -> None:
    data = frame(json.dumps({"w": {"dtype": "F32", "shape": [0, 9], "data_offsets": [0, 0]}}).encode())
    assert (describe(data).tensors[0].start, describe(data).tensors[0].end) == (len(data), len(data))
    for data in (b"", bytes(7), frame(b"{}"), frame(b"[]"), frame(b"{}", length=3)):
        with pytest.raises(InvalidWeights):
            describe(data)


def test_tensors_leave_no_byte_to_nobody_and_share_none() -> None:
    def two(first: tuple[int, int], second: tuple[int, int], size: int) -> bytes:
        entries = {
            name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            for name, (start, end) in (("a", first), ("b", second))
        }
        return frame(json.dumps(entries).encode(), bytes(size))

    assert [tensor.name for tensor in describe(two((3, 5), (0, 3), 5)).tensors] == ["b", "a"]
    for data, why in (
        (two((0, 3), (4, 5), 5), "leaves a gap"), (two((0, 3), (2, 5), 5), "overlaps"), (two((1, 3), (3, 5), 5), "leaves a gap"),
        (two((0, 3), (3, 5), 6), "truncated or padded"), (two((0, 3), (3, 5), 4), "truncated or padded"),
    ):  # fmt: skip
        with pytest.raises(InvalidWeights, match=why):
            describe(data)


def test_a_file_with_too_long_a_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(one())
    assert read_weights(path) == one()
    path.write_bytes(frame(b"{}", length=MAX_HEADER_BYTES + 1))
    with pytest.raises(InvalidWeights, match=f"the limit is {MAX_HEADER_BYTES}"):
        read_weights(path)
    with pytest.raises(InvalidWeights, match="can't be read: No such file"):
        read_weights(tmp_path / "nothing")


def test_the_first_three_differences_from_an_architecture_are_named_and_the_rest_counted() -> None:
    tensors = describe(one()).tensors
    for count, more in ((2, ""), (3, ""), (4, " and 1 more"), (9, " and 6 more")):
        wanted = {"w": TensorSpec("U8", (2, 3)), **{f"x{n}": TensorSpec("U8", (1,)) for n in range(count)}}
        with pytest.raises(InvalidWeights) as caught:
            check_architecture(tensors, "net", wanted)
        shown = ", ".join(f"'x{number}'" for number in range(min(count, 3)))
        assert caught.value.message.endswith(f"{shown}{more} are missing")
    check_architecture(tensors, "net", {"w": TensorSpec("U8", (2, 3))})


def test_bytes_that_end_before_they_begin_are_named_so() -> None:
    with pytest.raises(InvalidWeights, match=r"data_offsets that are not \[start, end\]"):
        describe(one(data_offsets=[6, 0]))
