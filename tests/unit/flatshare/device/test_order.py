"""What waits for what on CUDA: the checker finds each wait that is taken out of ``cuda.py``, and nothing in it as it is."""

from __future__ import annotations

import gc
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatshare.device import cuda
from flatshare.device.testing.simulated_cuda import OrderViolation, SimulatedCuda
from flatshare.errors import SettingsError

SOURCE = Path(cuda.__file__).read_text()

# What is taken out, and what the checker says of it.
PATCHES = {
    "a load does not wait for passes (wait_stream)": (
        "            self.runtime.wait(self._copies, self.runtime.main)\n",
        "",
        "memory is written while another stream may still use it",
    ),
    "a load waits for passes before it has its memory: who frees some in between is free too early": (
        """            placed = {key: self.runtime.empty_like(tensor) for key, tensor in tensors.items()}
            # The last owner of this memory let go of it before now, so all that still uses it was launched
            # before now.
            self.runtime.wait(self._copies, self.runtime.main)
""",
        """            self.runtime.wait(self._copies, self.runtime.main)
            self.in_between()
            placed = {key: self.runtime.empty_like(tensor) for key, tensor in tensors.items()}
""",
        "memory is written while another stream may still use it",
    ),
    "a load does not wait for its copies (synchronize)": (
        "                self._wait(self.runtime.event(self._copies))\n",
        "",
        "a pinned buffer is written while a copy may still use it",
    ),
    "nor overwrites its pinned memory": (
        """                self._wait(self.runtime.event(self._copies))
            finally:
                slab.overwrite()
""",
        "            finally:\n",
        "is written while a copy may still use it|memory is read before what writes it is done",
    ),
    "a chunk is filled again while the device reads it": (
        "                        self._wait(before)\n",
        "                        pass\n",
        "a pinned buffer is written while a copy may still use it",
    ),
    "a pass's answer is read before it is there": (
        "            self._device._wait(self._done)\n",
        "            pass\n",
        "",
    ),
    "rows of a pass that raised are written over": (
        "                self._wait(buffers.busy)\n",
        "                pass\n",
        "a pinned buffer is written while a copy may still use it",
    ),
    "what is overwritten does not wait for the pass": (
        "        with self._judged(), self.runtime.on(self.runtime.main):\n            for tensor in tensors:",
        "        with self._judged(), self.runtime.on(self._copies):\n            for tensor in tensors:",
        "memory is written while another stream may still use it",
    ),
}  # fmt: skip


def device_of(source: str, runtime: SimulatedCuda) -> Any:
    module = types.ModuleType("patched")
    module.__dict__["__name__"] = "flatshare.device.cuda"
    exec(compile(source, "cuda.py", "exec"), module.__dict__)
    module.CudaDevice.in_between = lambda self: None
    return module.CudaDevice(runtime, chunk_bytes=4096)


def weights(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(300, 50, generator=random), "b": torch.randn(300, generator=random)}


def history(source: str, device: Any) -> None:
    """Loads, passes, evictions and a failing pass; raises where an answer is wrong or the order is."""

    def through(placed: Mapping[str, torch.Tensor]) -> Any:
        return lambda rows: [torch.nn.functional.linear(rows[0], placed["w"], placed["b"])]

    rows = np.random.default_rng(0).random((4, 50), dtype=np.float32)
    for seed in range(4):
        host = weights(seed)
        wanted = rows @ host["w"].numpy().T + host["b"].numpy()
        placed = device.place(host)
        np.testing.assert_allclose(
            device.launch([rows], through(placed)).wait()[0], wanted, rtol=1e-3, atol=1e-4
        )
        # A model goes while a pass that nobody waits for any more is queued.
        given_up = device.launch([rows], through(placed))
        device.scrub(placed.values())
        keep = [placed]
        del placed

        def freed(self: object, keep: list[Any] = keep) -> None:
            if keep:  # one more pass of it has come meanwhile
                device.launch([rows], through(keep.pop()))
                gc.collect()

        type(device).in_between = freed
        if "self.in_between()" not in source:
            freed(device)
        gc.collect()
        again = device.place(host)
        given_up.wait()
        for _ in range(2):  # one for each set of buffers
            with pytest.raises(ValueError, match="bad"):
                device.launch([rows], lambda rows: _raise())
        for number in range(2):
            other = rows + number
            found = device.launch([other], through(again)).wait()[0]
            np.testing.assert_allclose(
                found, other @ host["w"].numpy().T + host["b"].numpy(), rtol=1e-3, atol=1e-4
            )
        device.scrub(again.values())


def _raise() -> Any:
    raise ValueError("bad")


def test_as_it_is_nothing_is_out_of_order() -> None:
    runtime = SimulatedCuda()
    device = device_of(SOURCE, runtime)
    history(SOURCE, device)
    assert runtime.violations == []
    assert runtime.operations > 100


@pytest.mark.parametrize("patch", PATCHES)
def test_each_wait_that_is_taken_out_is_found(patch: str) -> None:
    old, new, says = PATCHES[patch]
    assert SOURCE.count(old) == 1, "cuda.py has moved on: mend this patch"
    runtime = SimulatedCuda()
    with pytest.raises((OrderViolation, AssertionError, SettingsError)) as caught:
        source = SOURCE.replace(old, new)
        device = device_of(source, runtime)
        history(source, device)
    assert bool(runtime.violations) == bool(says), caught.value
    if says:
        assert re.search(says, runtime.violations[0])
