"""Bodies to rows: JSON as the notebook sends it, raw pixels. Image files are ``images.py``.

Every limit is checked before memory is spent.
"""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from flatshare.errors import BadInput, TooLarge
from flatshare.models.architecture import Architecture, InputSpec

__all__ = ["READY", "READY_HEADER", "check_expansion", "decode_array", "decode_json", "decode_pixels"]

MAX_DEPTH: Final = 8
"""Deepest nesting of lists that is looked into: more than any architecture's input has."""

_NUMBERS: Final = {int, float}


SHORT_BYTES: Final = 64 * 1024
"""JSON up to this length is parsed without checking what it expands to: 25 times that, at most."""

FEW_BYTES: Final = 16 * 1024
"""Bytes of rows up to which plain Python looks for the largest number."""

SPARE_VALUES: Final = 4096
"""Lists, objects, texts and numbers that a body may have beside its rows."""

READY_HEADER: Final = "x-tensor-values"
READY: Final = "model-ready"
"""Says that numbers which look like raw pixels are what the model wants."""


def decode_json(body: bytes, spec: InputSpec, max_rows: int, *, ready: bool = False) -> NDArray[np.float32]:
    """Rows of ``{"image": [...]}``, as a JSON object or as the JSON string of one (what the notebook sends).

    Parameters
    ----------
    ready
        The caller says that numbers which look like raw pixels are model-ready.

    Raises
    ------
    BadInput
        Not JSON, no such key, not numbers, not finite, not of an accepted shape, or raw pixels.
    TooLarge
        More than ``max_rows`` rows.
    """
    text: bytes | str = body
    check_expansion(body, spec, max_rows)
    try:
        document = orjson.loads(body)
        if isinstance(document, str):
            text = document.encode()
            document = orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise BadInput(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict) or spec.name not in document:
        raise BadInput(f'the body must be an object with the key "{spec.name}"')
    value = document[spec.name]
    if not isinstance(value, list):
        return decode_array(value, spec, max_rows, ready=ready)
    # JSON has no other spelling for these literals, so if neither occurs, no leaf is a truth value.
    truths = b"true" in text or b"false" in text
    rows, small = _rows_of_list(value, spec, max_rows, truths=truths)
    return rows if small else _checked(rows, spec, ready=ready)


def check_expansion(body: bytes, spec: InputSpec, max_rows: int) -> None:
    """Refuse long JSON with more values than ``max_rows`` rows can have: each would take up to 64 bytes.

    Raises
    ------
    BadInput, TooLarge
        It has more.
    """
    if len(body) <= SHORT_BYTES:
        return
    lists = sum(math.prod(spec.shape[:depth]) for depth in range(len(spec.shape)))  # of one row
    nested = body.count(b"[") + body.count(b"{") + body.count(b'"') // 2
    if nested > max_rows * lists + SPARE_VALUES:
        raise BadInput(f"the body has {nested} lists, objects and texts: more than {max_rows} rows can have")
    numbers = body.count(b",")
    if numbers > max_rows * spec.row_values + SPARE_VALUES:
        raise TooLarge(f"the body has {numbers} numbers; the limit is {max_rows} rows a request")


def _checked(rows: NDArray[np.float32], spec: InputSpec, *, ready: bool) -> NDArray[np.float32]:
    """The rows, unless they are raw pixels, which a model would answer wrongly and with confidence.

    Raises
    ------
    BadInput
        They are, and the caller does not say that they are right.
    """
    # Model-ready numbers of most transforms are 1 at most, so most rows are looked at once.
    if ready or rows.max() <= 1:
        return rows
    if rows.min() >= 0 and rows.max() <= 255 and (rows == np.rint(rows)).all():
        raise BadInput(
            f'"{spec.name}" holds whole numbers of 0 to 255: raw pixels, which go to /classify (as files or '
            "as bytes) or, as they are, to /pipelines/images. If they are what the model wants, say so with "
            f"the header {READY_HEADER}: {READY}"
        )
    return rows


def decode_array(value: Any, spec: InputSpec, max_rows: int, *, ready: bool = False) -> NDArray[np.float32]:
    """Rows of a nested list or an array of numbers: ``(N, C, H, W)``, or without C if that is 1, or one row.

    Parameters and errors as those of :func:`decode_json`.
    """
    if not isinstance(value, np.ndarray):
        listed, small = _rows_of_list(value, spec, max_rows, truths=True)
        return listed if small else _checked(listed, spec, ready=ready)
    array = value
    if array.dtype.kind not in "fiu":
        raise BadInput(f'"{spec.name}" is not a rectangular array of numbers')
    rows = as_rows(array, spec, max_rows)
    with np.errstate(over="ignore"):
        # Aligned, too: tensors that follow a JSON part begin anywhere, and torch takes no such array.
        rows = np.require(rows, np.float32, ["C_CONTIGUOUS", "ALIGNED"])
    if not np.isfinite(rows).all():
        raise BadInput(f'"{spec.name}" holds a number that is not finite in 32 bits')
    return _checked(rows, spec, ready=ready)


def _rows_of_list(
    value: Any, spec: InputSpec, max_rows: int, *, truths: bool
) -> tuple[NDArray[np.float32], bool]:
    """Rows of a nested list, whose shape and leaves are checked before an array is made of them.

    Also returns whether they are known to hold no number above 1, and so no raw pixels. For few numbers,
    Python finds the largest in 8 microseconds; numpy would release the GIL and wait to get it back.

    numpy would turn a list that holds one string into text, as wide as the longest: a small body could ask
    for gigabytes. ``struct`` takes numbers only, and packs one image in 5 microseconds where ``np.array``
    takes 14; with the rest of this function, 18 against 42.

    Parameters
    ----------
    truths
        Whether a leaf may be True or False, which ``struct`` would take for numbers.
    """
    shape: list[int] = []
    level = value
    while isinstance(level, list):
        shape.append(len(level))
        if len(shape) > MAX_DEPTH or not level:
            break
        level = level[0]
    check_shape(tuple(shape), spec, max_rows)
    leaves: list[Any] = value
    try:
        for size in shape[1:]:
            if any(type(part) is not list or len(part) != size for part in leaves):
                raise ValueError
            leaves = list(itertools.chain.from_iterable(leaves))
        if truths and not set(map(type, leaves)) <= _NUMBERS:
            raise ValueError
        packed = struct.pack(f"<{math.prod(shape)}f", *leaves)  # native order would make 1e300 infinite
        if not math.isfinite(sum(leaves)):  # no sum of so few numbers of 32 bits is too large for one of 64
            raise OverflowError
    except OverflowError:
        raise BadInput(f'"{spec.name}" holds a number that is not finite in 32 bits') from None
    except (ValueError, TypeError, struct.error):
        raise BadInput(f'"{spec.name}" is not a rectangular array of numbers') from None
    small = 0 < len(packed) <= FEW_BYTES and max(leaves) <= 1
    return np.frombuffer(packed, dtype="<f4").reshape(-1, *spec.shape), small


def check_shape(shape: tuple[int, ...], spec: InputSpec, max_rows: int) -> None:
    """Refuse a shape that is not ``(N, *spec.shape)`` or one of its short forms.

    Raises
    ------
    BadInput, TooLarge
        It is another shape, no row, or too many.
    """
    accepted = [spec.shape, spec.shape[1:]] if spec.shape[0] == 1 else [spec.shape]
    if not any(shape[-len(row) :] == row and len(shape) - len(row) in (0, 1) for row in accepted):
        forms = " or ".join(str(("N", *row)).replace("'", "") for row in accepted)
        raise BadInput(f'"{spec.name}" has shape {_shown(shape)}; it must be {forms}, or one row of it')
    rows = math.prod(shape) // spec.row_values
    if not rows:
        raise BadInput(f'"{spec.name}" holds no row')
    if rows > max_rows:
        raise TooLarge(f'"{spec.name}" holds {rows} rows; the limit is {max_rows} a request')


def as_rows(array: NDArray[Any], spec: InputSpec, max_rows: int) -> NDArray[Any]:
    """Give an array the shape ``(N, *spec.shape)``.

    Raises
    ------
    BadInput, TooLarge
        It has another shape, no row, or too many.
    """
    check_shape(array.shape, spec, max_rows)
    return array.reshape(-1, *spec.shape)


def decode_pixels(body: bytes, network: Architecture, max_rows: int) -> NDArray[np.float32]:
    """Rows of raw uint8 pixels, one image after the other, through the architecture's own transform.

    Raises
    ------
    BadInput, TooLarge
        The length is no multiple of one image, or there are too many.
    """
    channels, height, width = network.input.shape
    pixels = math.prod(network.input.shape)
    if not body or len(body) % pixels:
        raise BadInput(
            f"{len(body)} bytes are not a whole number of {width} x {height} images of {pixels} bytes"
        )
    if len(body) // pixels > max_rows:
        raise TooLarge(f"there are {len(body) // pixels} images in the request; the limit is {max_rows}")
    shape = (-1, height, width) if channels == 1 else (-1, height, width, channels)
    return network.preprocess(np.frombuffer(body, dtype=np.uint8).reshape(shape))


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"({shape[0]}, ... {len(shape)} dimensions)"
