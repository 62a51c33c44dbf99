"""Networks with three channels, and the forms of arrays that the shipped networks' tests do not reach."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flatshare.codecs.images import decode_images
from flatshare.codecs.payload import check_shape, decode_array, decode_json, decode_pixels
from flatshare.codecs.tensors import decode_npy, decode_octets
from flatshare.errors import BadInput, TooLarge
from flatshare.models.architecture import Architecture, InputSpec, architecture
from flatshare.models.probe import probe_rows


def planes(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W, C) to (N, C, H, W), the values as they are."""
    assert pixels.ndim == 4 and pixels.shape[1:] == (4, 5, 3), pixels.shape
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)


def unused() -> None:
    raise AssertionError("nothing is built here")


COLOURS = Architecture("colours", InputSpec("image", (3, 4, 5)), 2, {}, unused, planes)  # type: ignore[arg-type]
SPEC = COLOURS.input
PIXELS = np.random.default_rng(1).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
WANTED = PIXELS.transpose(0, 3, 1, 2).astype(np.float32)


def npy(array: NDArray[np.generic], version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=False)
    return file.getvalue()


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, "RGB" if pixels.ndim == 3 else "L").save(file, "PNG")
    return file.getvalue()


def test_raw_pixels_come_with_their_colours_side_by_side() -> None:
    rows = decode_pixels(PIXELS.tobytes(), COLOURS, 8)
    np.testing.assert_array_equal(rows, WANTED)
    with pytest.raises(BadInput, match="5 x 4 images of 60 bytes"):
        decode_pixels(PIXELS.tobytes()[:20], COLOURS, 8)
    with pytest.raises(TooLarge, match="there are 2 images"):
        decode_pixels(PIXELS.tobytes(), COLOURS, 1)


def test_tensors_of_pixels_come_plane_by_plane_as_all_tensors_do() -> None:
    tensor = np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2))
    for array in (tensor, tensor[:1], tensor[0]):
        wanted = WANTED[: 1 if array.ndim == 3 else len(array)]
        shape = ",".join(map(str, array.shape))
        np.testing.assert_array_equal(
            decode_octets(array.tobytes(), {"x-tensor-shape": shape}, COLOURS, 8), wanted
        )
        np.testing.assert_array_equal(decode_npy(npy(array), COLOURS, 8), wanted)
        np.testing.assert_array_equal(
            decode_npy(npy(array.astype(np.float64)), COLOURS, 8, ready=True), wanted
        )
        np.testing.assert_array_equal(decode_npy(npy(np.asfortranarray(array)), COLOURS, 8), wanted)


def test_image_files_are_read_in_colour_also_grey_ones() -> None:
    np.testing.assert_array_equal(decode_images([png(one) for one in PIXELS], COLOURS, 8), WANTED)
    grey = decode_images([png(np.ascontiguousarray(PIXELS[0, :, :, 0]))], COLOURS, 8)
    np.testing.assert_array_equal(grey, np.repeat(WANTED[:1, :1], 3, axis=1))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (3, 4, 5)])
def test_rows_of_three_channels_have_one_short_form(shape: tuple[int, ...]) -> None:
    value = np.random.default_rng(2).random(shape)
    for rows in (
        decode_json(b'{"image": %s}' % str(value.tolist()).encode(), SPEC, 2),
        decode_array(value, SPEC, 2),
        decode_array(value.tolist(), SPEC, 2),
    ):
        assert rows.shape == (value.size // 60, 3, 4, 5)
        np.testing.assert_array_equal(rows.ravel(), value.astype(np.float32).ravel())


@pytest.mark.parametrize(
    "shape", [(4, 5), (2, 4, 5), (1, 4, 5), (3, 5, 4), (4, 5, 3), (1, 1, 3, 4, 5), (2, 1, 4, 5), (60,), ()]
)
def test_a_channel_is_never_guessed(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"it must be \(N, 3, 4, 5\), or one row of it"):
        check_shape(shape, SPEC, 8)
    if math.prod(shape) > 1:
        with pytest.raises(BadInput):
            decode_array(np.zeros(shape), SPEC, 8)


def test_the_probe_of_a_network_in_colour_is_one_row_of_its_shape() -> None:
    rows = probe_rows(COLOURS)
    assert rows.shape == (1, 3, 4, 5)
    np.testing.assert_array_equal(probe_rows(COLOURS), rows)
    assert len(np.unique(rows)) > 10, "noise, not one colour"


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int16", ">f4"])
def test_npy_files_of_both_versions_are_read(version: tuple[int, int], dtype: str) -> None:
    array = np.random.default_rng(3).integers(0, 100, (2, 3, 4, 5)).astype(dtype)
    rows = decode_npy(npy(array, version), COLOURS, 8, ready=True)
    np.testing.assert_array_equal(rows, array.astype(np.float32))


@pytest.mark.parametrize("version", [(3, 0), (1, 1), (0, 1), (9, 9)])
def test_npy_files_of_other_versions_are_refused(version: tuple[int, int]) -> None:
    good = npy(np.zeros((1, 3, 4, 5)))
    with pytest.raises(BadInput, match="version 1 or 2"):
        decode_npy(good[:6] + bytes(version) + good[8:], COLOURS, 8)


NOT_FINITE = [math.nan, math.inf, -math.inf, 1e39, -1e300]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", [0, 59])
@pytest.mark.parametrize("form", ["list", "array", "array of 32 bits"])
def test_a_number_that_is_not_finite_is_refused_from_python_callers_too(
    value: float, where: int, form: str
) -> None:
    array = np.zeros((1, 3, 4, 5))
    array.ravel()[where] = value
    with np.errstate(over="ignore"):
        given = {"list": array.tolist(), "array": array, "array of 32 bits": array.astype(np.float32)}[form]
    with pytest.raises(BadInput, match="not finite in 32 bits"):
        decode_array(given, SPEC, 8)


def test_infinities_that_cancel_out_are_still_refused_and_large_numbers_are_not() -> None:
    both = np.zeros((1, 3, 4, 5))
    both.ravel()[:2] = math.inf, -math.inf
    with pytest.raises(BadInput, match="not finite"):
        decode_array(both.tolist(), SPEC, 8)
    most = float(np.finfo(np.float32).max)
    large = np.full((2, 3, 4, 5), most)
    np.testing.assert_array_equal(decode_array(large.tolist(), SPEC, 8), large.astype(np.float32))


def test_python_callers_can_not_pass_texts_truths_or_objects() -> None:
    for value in (True, "1", None, b"1"):
        row = np.zeros((3, 4, 5)).tolist()
        row[2][3][4] = value
        with pytest.raises(BadInput, match="not a rectangular array of numbers"):
            decode_array(row, SPEC, 8)
    for array in (np.zeros((3, 4, 5), bool), np.zeros((3, 4, 5), complex), np.zeros((3, 4, 5), object)):
        with pytest.raises(BadInput, match="not a rectangular array of numbers"):
            decode_array(array, SPEC, 8)


def test_one_channel_has_two_short_forms() -> None:
    spec = architecture("mnist-cnn").input
    for shape in ((28, 28), (1, 28, 28), (2, 28, 28), (2, 1, 28, 28)):
        check_shape(shape, spec, 2)
    with pytest.raises(BadInput, match=r"\(N, 1, 28, 28\) or \(N, 28, 28\), or one row"):
        check_shape((3, 28, 28, 1), spec, 8)
    with pytest.raises(BadInput, match="holds no row"):
        check_shape((0, 28, 28), spec, 2)
    with pytest.raises(TooLarge, match="holds 3 rows; the limit is 2"):
        check_shape((3, 28, 28), spec, 2)


def test_a_shape_of_many_dimensions_is_told_shortly() -> None:
    for dimensions in (8, 9, 30):
        with pytest.raises(BadInput) as caught:
            check_shape((2,) * dimensions, SPEC, 8)
        told = str((2,) * 8) if dimensions == 8 else f"(2, ... {dimensions} dimensions)"
        assert f"has shape {told};" in caught.value.message


def test_numbers_wider_than_eight_bytes_and_other_kinds_are_refused() -> None:
    for dtype in ("longdouble", "complex64", "bool", "datetime64[s]", "S1"):
        with pytest.raises(BadInput, match="must hold uint8 pixels or numbers"):
            decode_npy(npy(np.zeros((1, 3, 4, 5), dtype)), COLOURS, 8)
