"""What the tests of passes share: an engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import Inference


@pytest.fixture
def inference() -> Iterator[Inference]:
    inference = Inference(CpuDevice())
    yield inference
    inference.close()
