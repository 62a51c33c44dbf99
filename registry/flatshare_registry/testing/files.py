"""Write safetensors files from plain numpy arrays (the format is small enough to write by hand)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatshare_registry.weights import TensorSpec

__all__ = ["TINY_SPECS", "encode_safetensors", "frame", "specs_of", "tiny_weights"]

_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8", "float16": "F16"}


def encode_safetensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A well-formed safetensors file with these tensors, in this order."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _DTYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return frame(json.dumps(header).encode(), data)


def frame(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Length, header and data, as they stand in a file; ``length`` can lie."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def specs_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, TensorSpec]:
    """What an architecture with exactly these tensors would ask for."""
    return {
        name: TensorSpec(_DTYPES[str(array.dtype)], tuple(array.shape)) for name, array in tensors.items()
    }


TINY_SPECS = {"w": TensorSpec("F32", (4,))}
"""The architecture of :func:`tiny_weights`."""


def tiny_weights(value: float) -> bytes:
    """A whole file of one small tensor; equal values give equal files."""
    return encode_safetensors({"w": np.full(4, value, dtype=np.float32)})
