"""Bodies to rows: JSON as the notebook sends it, images, raw pixels.

Every limit is checked before memory is spent.
"""

from __future__ import annotations

import io
import itertools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flatshare.errors import BadInput, TooLarge
from flatshare.models.architecture import Architecture, InputSpec

__all__ = ["decode_array", "decode_images", "decode_json", "decode_pixels"]

MAX_DEPTH: Final = 8
"""Deepest nesting of lists that is looked into: more than any architecture's input has."""

_NUMBERS: Final = {int, float}

IMAGE_MODES: Final = frozenset({"1", "L", "P", "RGB"})
"""Pixel formats that convert to 8 bits without loss. Not 16-bit grey, which Pillow clips to white,
and nothing with transparency, which it drops: both would be answered wrongly, and confidently."""

IMAGE_FORMATS: Final = ("PNG", "JPEG")


def decode_json(body: bytes, spec: InputSpec, max_rows: int) -> NDArray[np.float32]:
    """Rows of ``{"image": [...]}``, as a JSON object or as the JSON string of one (what the notebook sends).

    Raises
    ------
    BadInput
        Not JSON, no such key, not numbers, not finite, not of an accepted shape.
    TooLarge
        More than ``max_rows`` rows.
    """
    text: bytes | str = body
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
        return decode_array(value, spec, max_rows)
    # A literal can't be written otherwise, so where neither stands no leaf is a truth value.
    truths = b"true" in text or b"false" in text
    return _rows_of_list(value, spec, max_rows, truths=truths)


def decode_array(value: Any, spec: InputSpec, max_rows: int) -> NDArray[np.float32]:
    """Rows of a nested list or an array of numbers: ``(N, C, H, W)``, or without C if that is 1, or one row.

    Raises as :func:`decode_json`.
    """
    if not isinstance(value, np.ndarray):
        return _rows_of_list(value, spec, max_rows, truths=True)
    array = value
    if array.dtype.kind not in "fiu":
        raise BadInput(f'"{spec.name}" is not a rectangular array of numbers')
    rows = as_rows(array, spec, max_rows)
    with np.errstate(over="ignore"):
        # Aligned, too: tensors that follow a JSON part begin anywhere, and torch takes no such array.
        rows = np.require(rows, np.float32, ["C_CONTIGUOUS", "ALIGNED"])
    if not np.isfinite(rows).all():
        raise BadInput(f'"{spec.name}" holds a number that is not finite in 32 bits')
    return rows


def _rows_of_list(value: Any, spec: InputSpec, max_rows: int, *, truths: bool) -> NDArray[np.float32]:
    """Rows of a nested list, whose shape and leaves are checked before an array is made of them.

    numpy would make text of a list that holds one string, as wide as the longest: a small body could
    ask for gigabytes. ``struct`` takes numbers only, and packs one image in 5 microseconds where ``np.array``
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
    leaves: Iterable[Any] = value
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
    return np.frombuffer(packed, dtype="<f4").reshape(-1, *spec.shape)


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


def decode_images(files: Sequence[bytes], network: Architecture, max_rows: int) -> NDArray[np.float32]:
    """Rows of PNG or JPEG files, through the architecture's own transform.

    Raises
    ------
    BadInput
        Not such a file, damaged, or not of the architecture's size (checked before it is decoded).
    TooLarge
        More than ``max_rows`` files.
    """
    if not files:
        raise BadInput("there is no image in the request")
    if len(files) > max_rows:
        raise TooLarge(f"there are {len(files)} images in the request; the limit is {max_rows}")
    return network.preprocess(np.stack([_decode_image(data, network.input) for data in files]))


def _decode_image(data: bytes, spec: InputSpec) -> NDArray[np.uint8]:
    channels, height, width = spec.shape
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            # open() reads only the header: a bomb is refused by its size, not unpacked.
            if image.size != (width, height):
                raise BadInput(f"an image is {image.width} x {image.height}; it must be {width} x {height}")
            if image.mode not in IMAGE_MODES or "transparency" in image.info:
                raise BadInput("an image must be 8-bit grey, palette or RGB, without transparency")
            return np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput(f"an image is not {' or '.join(IMAGE_FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise BadInput("an image is damaged") from None


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
