"""Failures remembered for a short, stated time, so that a bad model is no load amplifier."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from cachetools import TTLCache

from flatshare.errors import ModelFailed, NeverFits, ProbeFailed
from flatshare.weights.tiers import ModelKey
from flatshare_registry.errors import Corrupt, Unavailable

__all__ = ["REMEMBER_S", "FailureMemory"]

REMEMBER_S: Final[Mapping[type[Exception], float]] = {
    Corrupt: 60.0,
    ModelFailed: 60.0,
    NeverFits: 60.0,
    ProbeFailed: 60.0,
    Unavailable: 1.0,
}
"""Seconds that a failed load is answered from memory, by kind. A version is immutable, so a corrupt
one stays so until an operator acts (``refresh`` forgets it); a store may be back in a second."""

MAX_REMEMBERED: Final = 10_000
"""Most failures of one kind: each is a registered version, so tenants can't grow this at will."""


class FailureMemory:
    """Which versions failed to load lately, and how."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._kinds: dict[type[Exception], TTLCache[ModelKey, str]] = {
            kind: TTLCache(MAX_REMEMBERED, seconds, clock) for kind, seconds in REMEMBER_S.items()
        }

    def remember(self, key: ModelKey, error: Exception) -> None:
        """Note a failure; kinds without a stated time are not kept."""
        known = self._kinds.get(type(error))
        if known is not None:
            known[key] = str(error)

    def check(self, key: ModelKey) -> None:
        """Raise the remembered failure again, if there is one.

        Raises
        ------
        Corrupt, ModelFailed, Unavailable
            As the load did.
        """
        for kind, known in self._kinds.items():
            message = known.get(key)
            if message is not None:
                raise kind(message)

    def forget(self, tenant: str) -> None:
        """Forget a tenant's failures: somebody says that they are mended."""
        for known in self._kinds.values():
            for key in [key for key in known if key.tenant == tenant]:
                known.pop(key, None)
