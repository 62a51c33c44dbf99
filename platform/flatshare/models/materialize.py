"""From a checked safetensors file to a module on a device, without a copy where possible.

The module is built on the meta device (no memory, no initialisation) and its parameters are then
assigned tensors that look into the file's bytes. Dense layers stay such views; convolution weights
are copied once into channels-last order. A device other than the CPU takes one copy of everything.
"""

from __future__ import annotations

import warnings
from typing import Final

import torch
from torch import nn

from flatshare.errors import ModelFailed
from flatshare.models.architecture import Architecture
from flatshare_registry.records import VersionRecord

__all__ = ["device_bytes", "materialize"]

# The bytes are read-only and so are the parameters (inference only, requires_grad is off):
# nothing can write through them, which is what torch warns about.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


def materialize(network: Architecture, record: VersionRecord, data: bytes | memoryview) -> nn.Module:
    """Build a version's module in host memory.

    Parameters
    ----------
    record
        Its tensors say where in ``data`` they lie.
    data
        The whole safetensors file, already checked against the record's digest. Kept alive by the
        module's tensors; must not change.

    Returns
    -------
    nn.Module
        In eval mode, in channels-last memory format, no parameter requires grad. Moving it to
        another device copies it once.

    Raises
    ------
    ModelFailed
        The tensors do not fit the architecture (it changed since the registration).
    """
    state = {
        tensor.name: (
            torch.frombuffer(
                data,
                dtype=_DTYPES[tensor.dtype],
                count=tensor.size_bytes // _DTYPES[tensor.dtype].itemsize,
                offset=tensor.start,
            ).reshape(tensor.shape)
            if tensor.size_bytes
            else torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype])
        )
        for tensor in record.tensors
    }
    with torch.device("meta"):
        module = network.build()
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelFailed(f"{record.name} does not fit architecture {network.name} any more") from error
    module.requires_grad_(False)
    return module.to(memory_format=torch.channels_last).eval()


def device_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; a tensor used twice counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}.values())
