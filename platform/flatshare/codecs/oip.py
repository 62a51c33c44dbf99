"""Open Inference Protocol v2: a request's JSON and binary parts to rows, and which outputs it wants.

A request for an extension that is not served here is refused by name: an answer without it would be a
different tensor from the one asked for. ``api/oip.py`` does HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from flatshare.codecs.numbers import whole_number
from flatshare.codecs.payload import check_expansion, decode_array
from flatshare.codecs.tensors import rows_of, tensor_of
from flatshare.errors import BadInput
from flatshare.models.architecture import Architecture

__all__ = ["HEADER_LENGTH", "OUTPUTS", "input_rows", "split_body", "wanted_outputs"]

HEADER_LENGTH: Final = "inference-header-content-length"
"""The header that says where the JSON part of a body ends."""

_INPUT_TYPES: Final[Mapping[str, np.dtype[Any]]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
OUTPUTS: Final = ("logits", "predicted_label")

_NOT_SERVED: Final = (
    "classification",
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
    "sequence_id",
    "sequence_start",
    "sequence_end",
)
"""Parameters of extensions that change what the answer is."""


def split_body(
    body: bytes, header_length: str | None, network: Architecture, max_rows: int
) -> tuple[dict[str, Any], memoryview]:
    """A body's JSON part, refused if it expands to more than rows can have, and the binary data after it."""
    end = len(body)
    if header_length is not None:
        found = whole_number(header_length, len(body))
        if found is None:
            raise BadInput(f"{HEADER_LENGTH} is not a length within the body")
        end = found
    text = body[:end]
    check_expansion(text, network.input, max_rows)
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the inference request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadInput("the inference request is not a JSON object")
    _refuse_extensions(document)
    return document, memoryview(body)[end:]


def _refuse_extensions(document: dict[str, Any]) -> None:
    """Return if a request asks for no extension that is not served here.

    Raises
    ------
    BadInput
        It does; names the parameter.
    """
    tensors = [
        one
        for field in ("inputs", "outputs")
        if isinstance(document.get(field), list)
        for one in document[field]
    ]
    for one in (document, *tensors):
        parameters = one.get("parameters") if isinstance(one, dict) else None
        if isinstance(parameters, dict):
            for name in _NOT_SERVED:
                if parameters.get(name):  # false, 0 and "" turn it off
                    raise BadInput(f'the parameter "{name}" is of an extension that is not served here')


def input_rows(
    document: dict[str, Any], binary: memoryview, network: Architecture, max_rows: int, *, ready: bool
) -> NDArray[np.float32]:
    """Rows of a request's one input, from its JSON or from the binary data after it.

    Raises
    ------
    BadInput, TooLarge
        It is not what the network takes, or has more than ``max_rows`` rows.
    """
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise BadInput(f'"inputs" must be a list of one tensor, "{network.input.name}"')
    tensor = inputs[0]
    if tensor.get("name") != network.input.name:
        raise BadInput(f'the input must be named "{network.input.name}"')
    dtype = _INPUT_TYPES.get(str(tensor.get("datatype")))
    if dtype is None:
        raise BadInput(f"the input's datatype must be {' or '.join(_INPUT_TYPES)}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise BadInput("the input's shape must be a list of whole numbers")
    parameters = tensor.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if type(size) is not int or size != len(binary):
            raise BadInput(f"binary_data_size is not the {len(binary)} bytes that follow the JSON")
        array = tensor_of(binary, dtype, tuple(shape), network, max_rows)
        return rows_of(array, network, max_rows, ready=ready)
    return _json_rows(tensor.get("data"), dtype, shape, network, max_rows, ready=ready)


def _json_rows(
    data: Any,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    network: Architecture,
    max_rows: int,
    *,
    ready: bool,
) -> NDArray[np.float32]:
    """Rows of JSON data, nested or flat (the protocol allows both)."""
    if isinstance(data, list) and data and not isinstance(data[0], list):
        if len(data) != math.prod(shape):
            raise BadInput(f"the input has {len(data)} numbers; its shape takes {math.prod(shape)}")
        rows = len(data) // network.input.row_values
        if rows * network.input.row_values != len(data):
            raise BadInput(f"the input has {len(data)} numbers: not a whole number of rows")
        size = network.input.row_values
        data = [data[start : start + size] for start in range(0, len(data), size)]
        channels, height, width = network.input.shape
        data = [
            [[row[(c * height + h) * width :][:width] for h in range(height)] for c in range(channels)]
            for row in data
        ]
    rows_found = decode_array(data, network.input, max_rows, ready=ready or dtype == np.uint8)
    if dtype != np.uint8:
        return rows_found
    if ((rows_found < 0) | (rows_found > 255) | (rows_found != np.floor(rows_found))).any():
        raise BadInput("a UINT8 input holds a number that is not a whole one of 0 to 255")
    return rows_of(rows_found.astype(np.uint8), network, max_rows)


def wanted_outputs(document: dict[str, Any]) -> list[tuple[str, bool]]:
    """Names of outputs, and whether each is wanted as binary data."""
    parameters = document.get("parameters")
    everything = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    outputs = document.get("outputs")
    if outputs is None:
        return [(name, everything) for name in OUTPUTS]
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise BadInput('"outputs" must be a list of objects with a name')
    found: list[tuple[str, bool]] = []
    for one in outputs:
        if one.get("name") not in OUTPUTS:
            raise BadInput(f"an output must be {' or '.join(OUTPUTS)}")
        own = one.get("parameters")
        binary = own.get("binary_data") if isinstance(own, dict) else None
        found.append((one["name"], everything if binary is None else binary is True))
    return found
