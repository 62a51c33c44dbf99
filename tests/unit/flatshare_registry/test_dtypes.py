"""Element types: how many bytes each takes is what the safetensors library says, for all that it writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from flatshare_registry.errors import InvalidWeights
from flatshare_registry.testing.files import frame
from flatshare_registry.weights import DTYPE_BYTES, describe

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
