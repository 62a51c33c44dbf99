"""Bodies to rows: everything that the notebook sends, and everything that must be refused."""

from __future__ import annotations

import io
import json
import time
import tracemalloc

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flatshare.codecs.images import decode_images
from flatshare.codecs.payload import decode_array, decode_json, decode_pixels
from flatshare.errors import BadInput, TooLarge
from flatshare.models.architecture import architecture

NETWORK = architecture("mnist-cnn")
SPEC = NETWORK.input
RANDOM = np.random.default_rng(0)


def body(value: object) -> bytes:
    return json.dumps({"image": value}).encode()


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 28, 28), (28, 28), (1, 28, 28), (1, 1, 28, 28)])
@pytest.mark.parametrize("twice", [False, True], ids=["object", "string of an object"])
def test_the_notebooks_shapes(shape: tuple[int, ...], twice: bool) -> None:
    value = RANDOM.random(shape)
    data = body(value.tolist())
    if twice:
        data = json.dumps(data.decode()).encode()
    rows = decode_json(data, SPEC, 100)
    assert rows.shape == (value.size // 784, 1, 28, 28)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows.ravel(), value.astype(np.float32).ravel())


GOOD_ROW = np.zeros((28, 28)).tolist()
BAD = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"image": "\xff"}',
    "a list": b"[]",
    "a number": b"1",
    "a string of a string": json.dumps(json.dumps("x")).encode(),
    "no image": b'{"picture": []}',
    "null": body(None),
    "a number for the image": body(1),
    "text": body("pixels"),
    "an object": body({"0": GOOD_ROW}),
    "empty list": body([]),
    "empty rows": body([[]]),
    "wrong size": body(np.zeros((27, 28)).tolist()),
    "wrong channels": body(np.zeros((1, 3, 28, 28)).tolist()),
    "too deep": body(np.zeros((1, 1, 1, 28, 28)).tolist()),
    "ragged": body([GOOD_ROW, GOOD_ROW[:-1]]),
    "strings for numbers": body([["1"] * 28] * 28),
    "booleans": body([[True] * 28] * 28),
    "nulls": body([[None] * 28] * 28),
    "mixed with strings": body([[0.0] * 27 + ["x"]] + [[0.0] * 28] * 27),
    "NaN": b'{"image": [[NaN]]}',
    "infinity": body([[0.0] * 28] * 28).replace(b"0.0", b"Infinity", 1),
    "1e999": body([[0.0] * 28] * 28).replace(b"0.0", b"1e999", 1),
    "1e300": body([[0.0] * 28] * 28).replace(b"0.0", b"1e300", 1),
    "huge integer": body([[0.0] * 28] * 28).replace(b"0.0", b"9" * 400, 1),
    "deep nesting": b'{"image": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_bodies_get_one_clear_error(data: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        decode_json(data, SPEC, 100)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "value",
    [["x" * 2000] + [0] * 100_000, ["x" * 1_000_000] + [0] * 500_000, [[]] * 500_000, [[0] * 784] * 5_000],
    ids=["text among numbers", "long text", "empty lists", "flat rows"],
)
def test_a_small_body_cannot_ask_for_much_memory(value: list[object]) -> None:
    data = body(value)
    tracemalloc.start()
    # CPU time of this thread, and beside it that of the parser alone: a busy machine slows down both.
    started = time.thread_time()
    parsed = orjson.loads(data)
    parsing = time.thread_time() - started
    del parsed
    tracemalloc.reset_peak()
    started = time.thread_time()
    with pytest.raises(BadInput):
        decode_json(data, SPEC, 100)
    seconds = time.thread_time() - started
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What orjson makes of the body is there anyway: 56 bytes and a reference for the 3 of an empty list.
    assert peak_bytes < 32 * len(data) + 10_000_000
    assert seconds < 8 * parsing + 0.1


def test_too_many_rows() -> None:
    with pytest.raises(TooLarge, match="limit is 2"):
        decode_json(body(np.zeros((3, 28, 28)).tolist()), SPEC, 2)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=4)
    )
)
def test_no_value_raises_anything_else(value: object) -> None:
    with pytest.raises(BadInput):
        decode_array(value, SPEC, 100)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (28, 28), mode: str = "L") -> Image.Image:
    pixels = RANDOM.integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_png_goes_through_the_models_own_transform() -> None:
    image = picture()
    rows = decode_images([encoded(image, "PNG")] * 2, NETWORK, 10)
    np.testing.assert_array_equal(rows, NETWORK.preprocess(np.stack([np.asarray(image)] * 2)))


def test_colour_images_become_grey() -> None:
    assert decode_images([encoded(picture(mode="RGB"), "PNG")], NETWORK, 10).shape == (1, 1, 28, 28)


def test_jpeg_is_taken() -> None:
    assert decode_images([encoded(picture(), "JPEG")], NETWORK, 10).shape == (1, 1, 28, 28)


def test_images_that_would_lose_information_are_refused() -> None:
    deep = Image.fromarray(RANDOM.integers(0, 65536, (28, 28)).astype(np.uint16))
    for data in (
        encoded(deep, "PNG"),
        encoded(picture(mode="LA"), "PNG"),
        encoded(picture(mode="RGBA"), "PNG"),
    ):
        with pytest.raises(BadInput, match="8-bit"):
            decode_images([data], NETWORK, 10)


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = encoded(Image.new("L", (8000, 8000)), "PNG")
    with pytest.raises(BadInput, match="8000 x 8000; it must be 28 x 28"):
        decode_images([bomb], NETWORK, 10)


@pytest.mark.parametrize("data", [b"", b"GIF89a", encoded(picture(), "BMP"), encoded(picture(), "PNG")[:60]])
def test_what_is_no_png_or_jpeg_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput):
        decode_images([data], NETWORK, 10)


def test_numbers_of_images_are_bounded() -> None:
    with pytest.raises(BadInput, match="no image"):
        decode_images([], NETWORK, 10)
    with pytest.raises(TooLarge):
        decode_images([b""] * 11, NETWORK, 10)


def test_raw_pixels() -> None:
    pixels = RANDOM.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(decode_pixels(pixels.tobytes(), NETWORK, 10), NETWORK.preprocess(pixels))
    for bad in (b"", pixels.tobytes()[:-1]):
        with pytest.raises(BadInput):
            decode_pixels(bad, NETWORK, 10)
    with pytest.raises(TooLarge):
        decode_pixels(pixels.tobytes(), NETWORK, 2)
