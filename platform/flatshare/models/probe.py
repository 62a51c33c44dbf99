"""The probe: one fixed input whose logits are stored at registration and compared after each load.

A model that would answer differently from the one that was registered (damaged memory, an
architecture whose code changed, a wrong tensor in a slot) is found before it answers anybody.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.errors import ModelFailed, NoRoom, ProbeFailed
from flatshare.models.architecture import Architecture
from flatshare.models.stages import Model, device_tensor, plan_of, tensor_view
from flatshare_registry.records import VersionRecord
from flatshare_registry.weights import describe

__all__ = ["PROBE_TOLERANCE", "check_probe", "check_probe_logits", "probe_logits", "probe_rows"]

_probes: Final[dict[str, NDArray[np.float32]]] = {}

PROBE_TOLERANCE: Final = 1e-3
"""Largest difference allowed, as a share of the largest logit: other machines and devices sum in other
orders (about 1e-6 between CPUs, 1e-4 with TF32), while one wrong layer moves logits by their own size."""


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
    """What a version says to the probe: stored with it when it is registered.

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
        if not _close(logits, _run(network, Model((whole,)), torch.device("cpu"))):
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
    check_probe_logits(record, found)


def check_probe_logits(record: VersionRecord, found: NDArray[np.float32]) -> None:
    """Compare logits that a model gave to its probe with the stored ones.

    Raises
    ------
    ProbeFailed
        They differ.
    """
    if not _close(found, np.array(record.probe_logits, dtype=np.float32)):
        raise ProbeFailed(f"{record.name} does not answer its probe as it did when it was registered")


def _close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    tolerance = PROBE_TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0)))
    return found.shape == wanted.shape and bool((np.abs(found - wanted) <= tolerance).all())  # NaN is not


def _run(network: Architecture, model: Model, device: torch.device) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(probe_rows(network)).to(device))[0].cpu().numpy()
    return logits
