"""A replica's first passes, before any customer's: a device plans each shape once, and planning is slow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

from flatshare.device.protocol import Device
from flatshare.engine.passes import forward
from flatshare.errors import DeviceBroken
from flatshare.models.architecture import Architecture, architecture, architecture_names
from flatshare.models.stages import DTYPES, Model, device_tensor, plan_of
from flatshare_registry.errors import InvalidInput

__all__ = ["installed", "warm_up"]

logger = logging.getLogger("flatshare.replica")


def installed() -> list[Architecture]:
    """All architectures that can be loaded here. One that can't be loaded is logged, and only its own
    versions fail.
    """
    found = []
    for name in architecture_names():
        try:
            found.append(architecture(name))
        except InvalidInput as error:
            logger.warning("%s", error.message)
    return found


def warm_up(
    device: Device, max_rows: int, networks: Callable[[], Iterable[Architecture]] = installed
) -> None:
    """Run each architecture once at each number of rows that a pass will be computed with.

    To be called in the thread of the passes: cuDNN keeps its plans by thread (``Conv_v8.cpp``,
    ``thread_local BenchmarkCache``). A device that computes any shape at once needs none.

    Raises
    ------
    DeviceBroken
        The device did not survive it.
    """
    if not device.overlaps:
        return
    began = time.monotonic()
    # A full pass may have a probe for each of its models, too.
    counts = sorted({device.padded(rows) for rows in range(1, 2 * max_rows + 1)})
    for network in networks():
        try:
            model = _blank(network, device)
            for count in counts:
                rows = np.zeros((count, *network.input.shape), np.float32)
                device.launch([rows], partial(_through, model)).wait()
        except Exception as error:
            if device.judge(error) == "broken":
                raise DeviceBroken(
                    f"the device failed with {network.name}, the first thing it ran"
                ) from error
            logger.warning("%s does not run on %s: %s", network.name, device.name, error)
    logger.info("warmed up in %.1f s: passes of %s rows", time.monotonic() - began, counts)


def _through(model: Model, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return forward([model], rows)


def _blank(network: Architecture, device: Device) -> Model:
    host = {
        name: device_tensor(
            torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]), channels_last=network.channels_last
        )
        for name, spec in network.tensors.items()
    }
    placed = device.place(host)
    plan = plan_of(network)
    stages = tuple(plan.stage(index, placed) for index in range(len(plan.names)))
    return Model(stages, {}, "", network.name, network.channels_last, network.threads)
