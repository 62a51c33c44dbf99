"""``CudaRuntime`` over ``torch.cuda``: the only lines that a stand-in can't run.

Written against pytorch.org/docs/stable/notes/cuda.html and the sources of torch 2.14. ``scripts/gpu-checks``
runs them where there is a GPU (an H100 so far: ``platform/DESIGN.md``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from flatshare.device.memory import DeviceMemory
from flatshare.device.runtime import Event

__all__ = ["TorchCuda", "allocator_settings", "without_tf32"]

_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Both names are read by torch 2.14; the second is the old one."""


def without_tf32() -> None:
    """Have FP32 mean FP32, in this process.

    With TF32, torch's default for convolutions on Ampere and later, a right answer differs from the CPU's by
    up to 1.5e-3, and by who shares its pass: kernels are chosen by batch size. A probe would condemn good
    models. The old switches on purpose: once ``cudnn.conv.fp32_precision`` is set, reading
    ``cudnn.allow_tf32`` raises; and these beat ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def allocator_settings() -> dict[str, str]:
    """What the environment says to torch's allocator, by name."""
    text = next((os.environ[name] for name in _CONF if name in os.environ), "")
    pairs = (one.partition(":") for one in text.split(",") if one.strip())
    return {name.strip(): value.strip() for name, _, value in pairs}


class TorchCuda:
    """The device that this process sees first. See :class:`CudaRuntime`.

    Parameters
    ----------
    most_bytes
        Memory that this process's allocator may take; 0 for no bound of its own.
    """

    def __init__(self, most_bytes: int = 0) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.expandable_segments = allocator_settings().get("expandable_segments", "").lower() == "true"
        self.most_bytes = most_bytes
        without_tf32()
        self.main = torch.cuda.default_stream(self.torch_device)
        if most_bytes:
            total = torch.cuda.mem_get_info(self.torch_device)[1]
            torch.cuda.set_per_process_memory_fraction(min(most_bytes / total, 1.0), self.torch_device)

    def stream(self) -> torch.cuda.Stream:
        """See :class:`CudaRuntime`."""
        return torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]  # torch gives it no types

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """See :class:`CudaRuntime`."""
        with torch.cuda.stream(stream):
            yield

    def wait(self, stream: torch.cuda.Stream, for_: torch.cuda.Stream) -> None:
        """See :class:`CudaRuntime`."""
        stream.wait_stream(for_)

    def event(self, stream: torch.cuda.Stream) -> Event:
        """See :class:`CudaRuntime`. ``blocking``: a waiting thread sleeps, and does not spin on a core."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch gives it no types
        event.record(stream)
        return event

    def pinned(self, size: int) -> torch.Tensor:
        """See :class:`CudaRuntime`."""
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """See :class:`CudaRuntime`."""
        return torch.empty_like(tensor, device=self.torch_device)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """See :class:`CudaRuntime`."""
        to.copy_(source, non_blocking=True)

    def zero(self, tensor: torch.Tensor) -> None:
        """See :class:`CudaRuntime`."""
        tensor.zero_()

    def describe(self) -> str:
        """See :class:`CudaRuntime`."""
        found = torch.cuda.get_device_properties(self.torch_device)
        return (
            f"{found.name}, compute capability {found.major}.{found.minor}; torch {torch.__version__} has "
            f"kernels for {' '.join(torch.cuda.get_arch_list())}"
        )

    def memory(self) -> DeviceMemory:
        """See :class:`CudaRuntime`."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(
            torch.cuda.memory_allocated(self.torch_device),
            torch.cuda.memory_reserved(self.torch_device),
            free,
            total,
        )
