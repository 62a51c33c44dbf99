"""The probe: one fixed input whose logits are stored at registration and compared after each load.

A model that would answer differently from the one that was registered (damaged memory, an
architecture whose code changed, a wrong tensor in a slot) is found before it answers anybody.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.errors import ModelFailed, NoRoom, ProbeFailed
from flatshare.models.architecture import Architecture
from flatshare.models.stages import Model, device_tensor, plan_of, tensor_view
from flatshare_registry.records import VersionRecord
from flatshare_registry.weights import describe

__all__ = ["check_probe", "check_probe_logits", "probe_logits", "probe_rows", "probe_tolerance"]

_probes: Final[dict[str, NDArray[np.float32]]] = {}

LEAST_TOLERANCE: Final = 1e-3
"""Difference that is always allowed, as a share of the largest logit. Machines sum in other orders: CPUs
of three instruction sets, batches of 1 and 64, differed by 1.7e-6 at most; one wrong layer moves logits by
their own size."""

ROUNDINGS: Final = 8.0
"""How many roundings of the coarsest type a layer's result may be off by.

Errors of layers add up like the steps of a random walk (Higham and Mary, "A new approach to probabilistic
rounding error analysis", SIAM J. Sci. Comput. 2019), so this is multiplied by the square root of the number
of layers. With noise of 2e-6 before each rounding, as from another order of sums, a network of 18 layers in
BF16 moved by 1.6e-2; this allows 0.14."""

_UNIT: Final = {
    "F64": 2.0**-53,
    "F32": 2.0**-24,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "F8_E4M3": 2.0**-4,
    "F8_E5M2": 2.0**-3,
}
"""Half the distance from 1 to the next number, by safetensors' name of the type."""

_TF32_UNIT: Final = 2.0**-11


def probe_tolerance(network: Architecture, device: torch.device) -> float:
    """Largest difference of two right answers to a probe, as a share of the largest logit.

    Follows the coarsest type that the network's weights have, its depth, and what the device makes of FP32.

    Parameters
    ----------
    device
        Where the answer was computed; the stored one was computed on a CPU.
    """
    types = {spec.dtype for spec in network.tensors.values()}
    unit = max((_UNIT[one] for one in types if one in _UNIT), default=_UNIT["F32"])
    if device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        unit = max(unit, _TF32_UNIT)
    layers = sum(len(spec.shape) >= 2 for spec in network.tensors.values())
    return max(LEAST_TOLERANCE, ROUNDINGS * unit * math.sqrt(max(layers, 1)))


def probe_rows(network: Architecture) -> NDArray[np.float32]:
    """The probe of an architecture, ``(1, *input.shape)``: pixels that look like noise, the same for ever."""
    known = _probes.get(network.name)
    if known is not None:
        return known
    channels, height, width = network.input.shape
    count = channels * height * width
    # Knuth's multiplicative hash: no random generator, whose stream a release may change.
    pixels = ((np.arange(count, dtype=np.uint64) * 2654435761) >> 16).astype(np.uint8)
    shape = (1, height, width) if channels == 1 else (1, height, width, channels)
    rows = _probes[network.name] = network.preprocess(pixels.reshape(shape))
    return rows


def probe_logits(network: Architecture, weights: bytes | memoryview) -> tuple[float, ...]:
    """A version's answer to the probe, which is stored with it when it is registered.

    Raises
    ------
    InvalidWeights
        Not a valid safetensors file.
    ModelFailed
        The weights do not run in this architecture, or give something that is not finite.
    """
    view = memoryview(weights).cast("B")
    tensors = {
        one.name: device_tensor(
            tensor_view(view[one.start : one.end], one), channels_last=network.channels_last
        )
        for one in describe(view).tensors
    }
    plan = plan_of(network)
    try:
        model = Model(tuple(plan.stage(index, tensors) for index in range(len(plan.names))))
        logits = _run(network, model, torch.device("cpu"))
        if not np.isfinite(logits).all():
            raise ModelFailed(
                f"the weights give logits that are not finite: a damaged or diverged {network.name}"
            )
        whole = network.build().eval()
        whole.load_state_dict(tensors)
        cpu = torch.device("cpu")
        if not _close(logits, _run(network, Model((whole,)), cpu), probe_tolerance(network, cpu)):
            raise ModelFailed(
                f"{network.name} in stages does not answer as {network.name} in one: report this"
            )
    except ModelFailed:
        raise
    except Exception as error:  # whatever an operator's own network raises
        raise ModelFailed(
            f"the weights do not run in {network.name}: {type(error).__name__}: {error}"
        ) from error
    return tuple(float(value) for value in logits)


def check_probe(network: Architecture, record: VersionRecord, model: Model, device: torch.device) -> None:
    """Compare a loaded model's answer to the probe with the one stored at its registration.

    A version that was registered without one (by a client without torch) is not checked.

    Raises
    ------
    ModelFailed
        It answers something else, or does not run.
    NoRoom
        The device has no memory for it now.
    """
    if record.probe_logits is None:
        return
    try:
        found = _run(network, model, device)
    except torch.OutOfMemoryError as error:  # the device's trouble, and perhaps over in a moment
        raise NoRoom(f"the device has no memory to try {record.name} out now; retry") from error
    except Exception as error:  # whatever an operator's own network raises
        raise ModelFailed(f"{record.name} does not run: {type(error).__name__}") from error
    check_probe_logits(network, record, found, device)


def check_probe_logits(
    network: Architecture, record: VersionRecord, found: NDArray[np.float32], device: torch.device
) -> None:
    """Compare logits that a model gave to its probe, on a device, with the stored ones.

    Raises
    ------
    ProbeFailed
        They differ.
    """
    wanted = np.array(record.probe_logits, dtype=np.float32)
    if not _close(found, wanted, probe_tolerance(network, device)):
        raise ProbeFailed(f"{record.name} does not answer its probe as it did when it was registered")


def _close(found: NDArray[np.float32], wanted: NDArray[np.float32], tolerance: float) -> bool:
    # No floor: a network whose logits are small has small errors, too. Zeros must be zeros.
    allowed = tolerance * float(np.abs(wanted).max(initial=0)) + float(np.finfo(np.float32).tiny)
    return found.shape == wanted.shape and bool((np.abs(found - wanted) <= allowed).all())  # NaN is not


def _run(network: Architecture, model: Model, device: torch.device) -> NDArray[np.float32]:
    # A copy: a network may write into its input, and these rows are every model's.
    rows = torch.from_numpy(probe_rows(network)).to(device, copy=True)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(rows)[0].cpu().numpy()
    return logits
