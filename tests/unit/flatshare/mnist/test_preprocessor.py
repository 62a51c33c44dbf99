"""The step of the pipeline ``images`` does what the notebook's preprocessor does, bit by bit."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from torchvision import transforms

from flatshare.errors import BadInput
from flatshare.mnist.preprocessor import Preprocessor


class OnlineMNISTPreprocessor:
    """The notebook's (section 4.1), without the decorator."""

    def __init__(self) -> None:
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    async def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch["image"]
        images = [self.transform(np.array(image, dtype=np.uint8)).cpu().numpy() for image in images]
        return {"image": images}


def test_it_is_the_notebooks_preprocessor() -> None:
    batch = {"image": np.random.default_rng(0).integers(0, 256, (16, 28, 28)).tolist()}
    theirs = np.stack(asyncio.run(OnlineMNISTPreprocessor().run(batch))["image"])
    ours = Preprocessor().run(batch)["image"]
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (np.float32, (16, 1, 28, 28))
    assert (ours == theirs).all()
    assert (Preprocessor().run({"image": batch["image"][0]})["image"] == theirs[:1]).all(), "one image alone"


@pytest.mark.parametrize(
    "image",
    [
        None, "x", 3, ["x" * 5000, ""], [["x"]], [[["x" * 5000] * 28] * 28], [[[2**80] * 28] * 28], [], [[[0.5] * 28] * 28], [[[256] * 28] * 28], [[[-1] * 28] * 28], [[[0] * 27] * 28],
        [[[0] * 28] * 28, [[0] * 27] * 28], [[[True] * 28] * 28], {"a": 1},
    ],
)  # fmt: skip
def test_what_is_no_raw_pixels_is_refused(image: Any) -> None:
    with pytest.raises(BadInput, match="image"):
        Preprocessor().run({"image": image})


def test_a_batch_without_images_is_refused() -> None:
    with pytest.raises(BadInput, match="key"):
        Preprocessor().run({})
