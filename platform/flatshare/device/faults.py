"""What an error says of a device, judged by its class and, where torch has none for it, by its text."""

from __future__ import annotations

import torch

from flatshare.device.protocol import Fault

__all__ = ["fault_of", "first_line"]

_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
"""Libraries' own words for it (a handle that can't be made has no memory for its workspace); torch raises
these as plain RuntimeErrors (aten/src/ATen/cuda/Exceptions.h).
"""

_BROKEN = ("CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR")
"""A kernel of theirs did not run. The CUDA error behind it is told only at the next call of torch's own."""


def fault_of(error: BaseException) -> Fault:
    """What an error says of the device that raised it.

    As far as we have found, an ``AcceleratorError`` (torch's class for all CUDA errors but "out of memory")
    leaves the process's CUDA context broken until the process ends. CUDA's documentation says so of
    device-side asserts, illegal accesses, uncorrectable ECC errors and launch failures (cudaError_t 214, 700,
    710, 719). The few that are not sticky do not justify keeping a replica that may be lost.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _NO_MEMORY):
        return "memory"
    if isinstance(error, torch.AcceleratorError):
        return "memory" if "out of memory" in text else "broken"
    if isinstance(error, RuntimeError) and any(words in text for words in _BROKEN):
        return "broken"
    return "other"


def first_line(error: BaseException) -> str:
    """What an error says, without CUDA's hints for debugging."""
    return (str(error).splitlines() or [type(error).__name__])[0]
