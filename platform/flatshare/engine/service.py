"""The whole story of a request: parse the ref, authenticate, admit, resolve, decode, lease, predict, release.

Knows no protocol: HTTP and handles are thin shells around :meth:`InferenceService.predict`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flatshare.cache.model_cache import Lease, ModelCache
from flatshare.cache.tiers import Tier
from flatshare.cache.view import RegistryView
from flatshare.engine.admission import Admission
from flatshare.models.architecture import Architecture, architecture
from flatshare_registry.ids import ModelRef
from flatshare_registry.records import VersionRecord

__all__ = ["Authorize", "Decode", "InferenceService", "Prediction"]

Decode = Callable[[Architecture], NDArray[np.float32]]
"""Makes the rows ``(N, *input.shape)`` of a request for an architecture; raises ``BadInput``."""


class Authorize(Protocol):
    """Whether a caller may use a ref: the place of authentication; raises to refuse."""

    def __call__(self, ref: ModelRef) -> None:
        """Return to allow."""
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer and where it came from.

    Attributes
    ----------
    logits
        ``(N, classes)`` float32.
    version
        Exactly what ran.
    tier
        Where the request found it.
    """

    logits: NDArray[np.float32]
    version: VersionRecord
    tier: Tier

    @property
    def labels(self) -> NDArray[np.int64]:
        """Most likely class of each row, ``(N,)``."""
        labels: NDArray[np.int64] = self.logits.argmax(axis=1)
        return labels


class Runs(Protocol):
    """What the service asks of an inference engine."""

    async def run(self, lease: Lease, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``(N, classes)`` of rows ``(N, *input.shape)`` under a lease."""
        ...


class InferenceService:
    """Answers requests of one replica.

    Parameters
    ----------
    timeout_s
        Seconds that a request may take, waiting included.
    """

    def __init__(
        self,
        *,
        view: RegistryView,
        cache: ModelCache,
        inference: Runs,
        admission: Admission,
        timeout_s: float,
    ) -> None:
        self.view = view
        self.cache = cache
        self.admission = admission
        self._inference = inference
        self._timeout_s = timeout_s

    async def predict(self, ref_text: str, authorize: Authorize, decode: Decode) -> Prediction:
        """Answer one request.

        Raises
        ------
        InvalidRef, BadInput
            The request is wrong; nothing was looked up, or nothing was loaded.
        NotFound
            No such tenant, alias or version.
        Overloaded, DeadlineExceeded
            No room, or not in time; retry.
        Corrupt, ModelFailed, Unavailable
            The version can't be served now.
        """
        ref = ModelRef.parse(ref_text)
        authorize(ref)
        async with self.admission.hold(self._timeout_s) as left_s:
            version = self.view.resolve_now(ref) or await self.view.resolve(ref, left_s)
            rows = decode(architecture(version.architecture))
            lease = self.cache.try_lease(version) or await self.cache.lease(version, left_s)
            with lease:
                return Prediction(await self._inference.run(lease, rows), version, lease.tier)
