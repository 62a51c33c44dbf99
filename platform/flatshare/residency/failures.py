"""Failed loads: remembered for a short, stated time, so that a bad model can't amplify load, and shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from cachetools import TTLCache

from flatshare.errors import ModelFailed, NeverFits, ProbeFailed
from flatshare.weights.tiers import FailedLoad, ModelKey
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

MAX_SHOWN: Final = 100
"""Most versions with a failed last load that operators are shown: those that failed last."""

MAX_CHARS: Final = 500
"""Of an error's text that is shown: a store or torch may say much."""

MAX_REMEMBERED: Final = 10_000
"""Most failures of one kind: each is a registered version, so tenants can't grow this at will."""


class FailureMemory:
    """Which versions failed to load lately, and how."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._wall_clock = wall_clock
        self._last: dict[ModelKey, FailedLoad] = {}
        self._kinds: dict[type[Exception], TTLCache[ModelKey, str]] = {
            kind: TTLCache(MAX_REMEMBERED, seconds, clock) for kind, seconds in REMEMBER_S.items()
        }

    def remember(self, key: ModelKey, error: Exception) -> None:
        """Answer requests with a failure for a while; kinds without a stated time are not kept."""
        known = self._kinds.get(type(error))
        if known is not None:
            known[key] = str(error)

    def show(self, key: ModelKey, error: BaseException) -> None:
        """Keep a failure for operators to see, until the version is loaded or gone."""
        self._last.pop(key, None)
        self._last[key] = FailedLoad(
            key.tenant, key.version, type(error).__name__, str(error)[:MAX_CHARS], self._wall_clock()
        )
        if len(self._last) > MAX_SHOWN:
            del self._last[next(iter(self._last))]

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

    def hide(self, key: ModelKey) -> None:
        """A version was loaded, or is gone: what failed before is not shown any more."""
        self._last.pop(key, None)

    def hide_all(self, tenant: str) -> None:
        """A tenant is erased: nothing of it is shown any more."""
        for key in [key for key in self._last if key.tenant == tenant]:
            del self._last[key]

    def last(self) -> list[FailedLoad]:
        """Versions whose last load failed, the latest first."""
        return list(reversed(self._last.values()))

    def forget(self, tenant: str) -> None:
        """Try a tenant's failed versions again: somebody says that they are mended. They are still shown."""
        for known in self._kinds.values():
            for key in [key for key in known if key.tenant == tenant]:
                known.pop(key, None)
