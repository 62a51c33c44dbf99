"""The whole story of a request: authenticate, resolve, decode, lease, admit, predict, release.

Knows no protocol: HTTP and handles are thin shells around :meth:`InferenceService.predict`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from flatshare.cache.lease import Lease
from flatshare.cache.model_cache import ModelCache
from flatshare.cache.promotions import Promotions
from flatshare.cache.tiers import Tier
from flatshare.cache.view import RegistryView
from flatshare.engine.admission import Admission
from flatshare.errors import DeadlineExceeded, IsolationBroken, ModelFailed, ProbeFailed
from flatshare.models.architecture import Architecture, architecture
from flatshare_registry.errors import InvalidInput
from flatshare_registry.ids import ModelRef
from flatshare_registry.records import VersionRecord

__all__ = ["Authorize", "Decode", "InferenceService", "Prediction"]

logger = logging.getLogger("flatshare.engine")

FEW_ROWS: Final = 16
"""Rows up to which plain Python finds the labels as fast as numpy does."""

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

    def label_list(self) -> list[int]:
        """The same as plain numbers; for few rows without letting the GIL go (see ``api/payload.py``)."""
        if len(self.logits) > FEW_ROWS:
            numbers: list[int] = self.labels.tolist()
            return numbers
        return [row.index(max(row)) for row in self.logits.tolist()]


class Runs(Protocol):
    """What the service asks of an inference engine."""

    async def run(self, lease: Lease, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``(N, classes)`` of rows ``(N, *input.shape)`` under a lease."""
        ...


class InferenceService:
    """Answers requests of one replica.

    Parameters
    ----------
    admission
        Places for requests whose model is resident: the work of a replica.
    cold
        Places for requests that wait for the registry or for a load. They are apart, so that a
        store that is slow or down does not stop the models that are here (promise 11).
    promotions
        Which old version still answers for an alias that was moved.
    timeout_s
        Seconds that a request may take, waiting included.
    """

    def __init__(
        self,
        *,
        view: RegistryView,
        cache: ModelCache,
        promotions: Promotions,
        inference: Runs,
        admission: Admission,
        cold: Admission,
        timeout_s: float,
    ) -> None:
        self.view = view
        self.cache = cache
        self.promotions = promotions
        self.admission = admission
        self.cold = cold
        self._inference = inference
        self._timeout_s = timeout_s

    async def predict(self, ref: ModelRef, authorize: Authorize, decode: Decode) -> Prediction:
        """Answer one request.

        Raises
        ------
        BadInput
            The request is wrong; nothing was loaded.
        NotFound
            No such tenant, alias or version.
        Overloaded, DeadlineExceeded
            No room, or not in time; retry.
        Corrupt, ModelFailed, Unavailable
            The version can't be served now.
        IsolationBroken
            The slot does not hold what the ref resolved to.
        """
        authorize(ref)
        try:
            async with asyncio.timeout(self._timeout_s):
                version = await self._resolve(ref)
                rows = decode(_installed(version))
                lease = self.cache.try_lease(version)
                if lease is None:
                    async with self.cold.hold(self._timeout_s):
                        lease = await self.cache.lease(version, self._timeout_s)
                with lease:
                    try:
                        if lease.record.digest != version.digest:
                            raise IsolationBroken(f"the slot of {version.name} holds other weights")
                        async with self.admission.hold(self._timeout_s, ref.tenant):
                            logits = await self._inference.run(lease, rows)
                    except ProbeFailed as error:
                        self.cache.condemn(lease, error)
                        raise
                    except IsolationBroken:
                        logger.exception("isolation: %s", lease.receipt)
                        self.cache.quarantine(lease)
                        raise
                return Prediction(logits, version, lease.tier)
        except TimeoutError:
            raise DeadlineExceeded(f"not answered within {self._timeout_s:g} s") from None

    async def describe(self, ref: ModelRef, authorize: Authorize) -> VersionRecord:
        """The version that a ref means now; loads nothing. Raises as :meth:`predict` does."""
        authorize(ref)
        return await self._resolve(ref)

    async def _resolve(self, ref: ModelRef) -> VersionRecord:
        # The head moves the registry's view, which may begin a swap: look at it first.
        version = self.view.resolve_now(ref)
        serving = self.promotions.serving(ref)
        if serving is not None:
            return serving
        if version is not None:
            return version
        async with self.cold.hold(self._timeout_s):
            version = await self.view.resolve(ref, self._timeout_s)
        return self.promotions.serving(ref) or version


def _installed(version: VersionRecord) -> Architecture:
    """A version's architecture.

    Raises
    ------
    ModelFailed
        It is not installed here: the operator's to mend, not the caller's.
    """
    try:
        return architecture(version.architecture)
    except InvalidInput as error:
        raise ModelFailed(
            f"{version.name} can't be served: its architecture is not installed here"
        ) from error
