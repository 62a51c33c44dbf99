"""Where the host tier is, and how large: what ``host_dir`` and ``host_bytes`` mean on this node."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from flatshare.weights.host_tier import HostTier

__all__ = ["demand_host_tier", "host_tier_folder", "open_host_tier"]

logger = logging.getLogger("flatshare.weights")

MAX_DEFAULT_BYTES: Final = 8 * 1024**3
"""Most that the tier takes without being told."""


def open_host_tier(folder: str, budget_bytes: int) -> HostTier | None:
    """The host tier that the settings mean, or None: a replica without one streams from the store.

    Parameters
    ----------
    folder
        A folder, ``auto`` or ``off``.
    budget_bytes
        0 for a quarter of the file system, at most 8 GiB.
    """
    try:
        return demand_host_tier(folder, budget_bytes)
    except OSError as error:
        logger.warning(
            "no host tier in %s (%s): every load comes from the store",
            host_tier_folder(folder),
            error.strerror or error,
        )
        return None


def demand_host_tier(folder: str, budget_bytes: int) -> HostTier | None:
    """The same, for callers that must know why there is none; None only when it is ``off``.

    Raises
    ------
    OSError
        The folder can't be used: others may write there, or the file system takes nothing.
    """
    root = host_tier_folder(folder)
    if root is None:
        return None
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    budget = budget_bytes or min(shutil.disk_usage(root).total // 4, MAX_DEFAULT_BYTES)
    return HostTier(root, budget)


def host_tier_folder(folder: str) -> Path | None:
    """Where the tier of a setting is; None when it is ``off``."""
    if folder == "off":
        return None
    if folder != "auto":
        return Path(folder)
    shared = Path("/dev/shm")  # noqa: S108  # anybody writes there; our folder in it is private
    base = shared if shared.is_dir() else Path(tempfile.gettempdir())
    return base / f"flatshare-{os.getuid()}"
