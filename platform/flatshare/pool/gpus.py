"""Checks the GPUs of a cluster before a pool is deployed: Ray waits for missing ones, and says so late.

A deployment that wants more than there is stays "starting" for ever; Serve has no message for 30 s
(``RAY_SERVE_SLOW_STARTUP_WARNING_S``), and ``serve.run`` blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import ray

from flatshare.errors import SettingsError

__all__ = ["allocator_variables", "check_gpus", "check_visible", "replicas_that_fit"]

PRECISION: Final = 1e-4
"""Ray counts fractions of a resource in steps of this size."""


def replicas_that_fit(gpus: Iterable[float], per_replica: float) -> int:
    """How many replicas fit on nodes with so many GPUs; a replica has its part of one GPU, never of two."""
    each = int(1 / per_replica + PRECISION) if per_replica < 1 else 1
    return sum(int(count + PRECISION) * each for count in gpus)


def check_gpus(replicas: int, per_replica: float) -> None:
    """Refuse a pool if the connected cluster does not have enough GPUs for it.

    Raises
    ------
    SettingsError
        It does not; says what would fit.
    """
    if not per_replica:
        return
    nodes: list[Mapping[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray gives it no types
    total = [float(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]
    free = float(ray.available_resources().get("GPU", 0))  # type: ignore[no-untyped-call]  # as the above
    fit = min(replicas_that_fit(total, per_replica), int(free / per_replica + PRECISION))
    if replicas <= fit:
        return
    have = f"{sum(total):g} GPUs on {len(total)} nodes, {free:g} of them free"
    mend = f"set replicas={fit} or less, or a smaller gpus_per_replica" if fit else "use device=cpu"
    raise SettingsError(
        f"{replicas} replicas of {per_replica:g} GPU do not fit: this cluster has {have}, which is room for "
        f"{fit}. Add GPUs, or {mend}"
    )


def check_visible(assigned: Sequence[int | str], visible: str | None) -> None:
    """Refuse to run on a GPU that is not the one that Ray set aside for this replica.

    Parameters
    ----------
    assigned
        ``ray.get_gpu_ids()``.
    visible
        ``CUDA_VISIBLE_DEVICES`` of this process.

    Raises
    ------
    SettingsError
        With ``RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES`` Ray leaves the variable alone, and all replicas
        of a node would run on its first GPU.
    """
    if not assigned:
        return
    seen = [name.strip() for name in (visible or "").split(",") if name.strip()]
    if seen != [str(one) for one in assigned]:
        raise SettingsError(
            f"Ray gave this replica GPU {', '.join(map(str, assigned))}, and CUDA_VISIBLE_DEVICES is "
            f"{visible!a}: unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES, so that Ray sets it"
        )


def allocator_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torch's allocator is told in replicas with a GPU, unless the operator tells it something.

    Without segments that grow, models of 5 to 10 MiB waste up to half of the memory (``device/cuda.py``).
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    given = {name: environment[name] for name in names if name in environment}
    return given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
