"""What a step is: where it is found, what it is given, and what it may return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flatshare.errors import BadInput, SettingsError, StepFailed
from flatshare.mnist.preprocessor import Preprocessor
from flatshare.pipelines.steps import arrays_of, batch_of, step_class, step_names


class NoRun:
    pass


def run(batch: Any) -> Any:
    return batch


def test_the_installed_step_is_found_by_its_pipelines_name_and_ones_own_by_its_path() -> None:
    assert step_names() == ["images"]
    assert step_class("images") is Preprocessor
    assert step_class("mine", "flatshare.mnist.preprocessor:Preprocessor") is Preprocessor


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "there is no pipeline mine: installed are images"),
        ("no_such_module:Step", "can't be imported from no_such_module:Step"),
        ("flatshare.mnist.preprocessor:Nothing", "can't be imported"),
        ("flatshare.mnist.preprocessor", "is not named as module:Class"),
        (f"{__name__}:NoRun", "is no class with a method run"),
        ("flatshare.mnist.pixels:preprocess", "is no class with a method run"),
        ("pathlib:Path", "is no class with a method run"),
    ],
)
def test_what_is_no_step_is_refused_with_its_name(path: str, message: str) -> None:
    with pytest.raises(SettingsError, match="pipeline mine") as caught:
        step_class("mine", path)
    assert message in caught.value.message


def test_a_batch_is_an_object_or_the_string_of_one() -> None:
    assert batch_of(b'{"image": [1]}') == batch_of(b'"{\\"image\\": [1]}"') == {"image": [1]}
    for body in (b"", b"[1]", b'"text"', b'"[1]"', b"{", b'"\\ud800"'):
        with pytest.raises(BadInput):
            batch_of(body)


def test_what_a_step_made_becomes_arrays() -> None:
    made = arrays_of({"image": [np.zeros((1, 2)), np.ones((1, 2))], "n": 3})
    assert made["image"].shape == (2, 1, 2) and made["n"] == 3
    ragged = {"image": [[1], [1, 2]]}
    for wrong in (None, [1], ragged, {"image": ["x"]}, {"image": [{}]}, {1: [1]}):
        with pytest.raises(StepFailed):
            arrays_of(wrong)
