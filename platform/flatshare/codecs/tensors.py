"""Bodies that are tensors already: raw bytes with their shape in headers, NumPy's .npy, OIP's binary data.

uint8 values are pixels and go through the architecture's own transform; floats are model-ready. Every
size is checked against the bytes that are there before memory is spent.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flatshare.codecs.payload import READY, READY_HEADER, as_rows, check_shape, decode_array, decode_pixels
from flatshare.errors import BadInput
from flatshare.models.architecture import Architecture

__all__ = ["DTYPE_HEADER", "SHAPE_HEADER", "decode_npy", "decode_octets", "is_ready", "rows_of", "tensor_of"]

SHAPE_HEADER: Final = "x-tensor-shape"
DTYPE_HEADER: Final = "x-tensor-dtype"

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "uint8": np.dtype("u1"),
    "float32": np.dtype("<f4"),
}

MAX_NPY_HEADER: Final = 4096
"""Longest header of an .npy file, in bytes; one of a plain array has 128."""


def decode_octets(
    body: bytes, headers: Mapping[str, str], network: Architecture, max_rows: int
) -> NDArray[np.float32]:
    """Rows of raw bytes, row-major and little-endian.

    Parameters
    ----------
    headers
        ``x-tensor-dtype``: ``uint8`` (default) or ``float32``. ``x-tensor-shape``: ``64,1,28,28``;
        needed for float32, and for uint8 when it is not just images one after the other.

    Raises
    ------
    BadInput, TooLarge
        Unknown type, a shape that is not accepted, or another number of bytes than the shape takes.
    """
    name = headers.get(DTYPE_HEADER, "uint8")
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise BadInput(f"{DTYPE_HEADER} is {name[:20]!a}; it must be {' or '.join(_DTYPES)}")
    text = headers.get(SHAPE_HEADER)
    if text is None:
        if name != "uint8":
            raise BadInput(f"{name} needs its shape in {SHAPE_HEADER}: 64,1,28,28")
        return decode_pixels(body, network, max_rows)
    parts = text[:100].split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 10 for part in parts):
        raise BadInput(f"{SHAPE_HEADER} is {text[:40]!a}; it must be whole numbers with commas: 64,1,28,28")
    shape = tuple(int(part) for part in parts)
    array = tensor_of(memoryview(body), dtype, shape, network, max_rows)
    return rows_of(array, network, max_rows, ready=is_ready(headers))


def is_ready(headers: Mapping[str, str]) -> bool:
    """Whether a caller says that numbers which look like raw pixels are model-ready."""
    return headers.get(READY_HEADER) == READY


def decode_npy(
    body: bytes, network: Architecture, max_rows: int, *, ready: bool = False
) -> NDArray[np.float32]:
    """Rows of an .npy file (numpy.org/doc, numpy.lib.format); nothing in it is unpickled.

    Parameters
    ----------
    ready
        As in :func:`flatshare.codecs.payload.decode_json`.

    Raises
    ------
    BadInput, TooLarge
        Not such a file, of objects, or of a type or shape that is not accepted.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file, max_header_size=MAX_NPY_HEADER)
    except Exception:  # numpy tokenises and parses the header: whatever that raises is the input's fault
        raise BadInput("the body is not a .npy file that is read here (version 1 or 2, no objects)") from None
    if dtype.hasobject or dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise BadInput("the .npy file must hold uint8 pixels or numbers")
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise BadInput("the .npy file has an impossible shape")
    array = tensor_of(memoryview(body)[file.tell() :], dtype, shape, network, max_rows, fortran=fortran)
    return rows_of(array, network, max_rows, ready=ready)


def tensor_of(
    data: memoryview,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    network: Architecture,
    max_rows: int,
    *,
    fortran: bool = False,
) -> NDArray[Any]:
    """An array over bytes, without a copy. The shape is checked before an array is made of it.

    Parameters
    ----------
    fortran
        The first index runs fastest.

    Raises
    ------
    BadInput, TooLarge
        The shape is not accepted, or takes another number of bytes.
    """
    check_shape(shape, network.input, max_rows)
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise BadInput(f"{len(data)} bytes are not a tensor of shape {shape}: that takes {wanted}")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def rows_of(
    array: NDArray[Any], network: Architecture, max_rows: int, *, ready: bool = False
) -> NDArray[np.float32]:
    """Model-ready rows ``(N, *input.shape)`` of pixels (uint8) or of numbers (everything else).

    Raises
    ------
    BadInput, TooLarge
        The shape is not accepted, or a number is not finite in 32 bits.
    """
    if array.dtype != np.uint8:
        return decode_array(array, network.input, max_rows, ready=ready)
    channels, height, width = network.input.shape
    rows = as_rows(array, network.input, max_rows)
    pixels = rows.reshape(-1, height, width) if channels == 1 else rows.transpose(0, 2, 3, 1)
    return network.preprocess(np.ascontiguousarray(pixels))
