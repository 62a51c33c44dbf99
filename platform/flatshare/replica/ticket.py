"""The right to one request, and its answer: what shells and ``request.py`` hand each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from flatshare.engine.quotas import UnderWay
from flatshare.errors import RowsOverQuota, TooLarge
from flatshare.models.architecture import Architecture
from flatshare.telemetry.tracing import NO_TRACE, Trace
from flatshare.weights.tiers import Tier
from flatshare_registry.ids import ModelRef
from flatshare_registry.records import Quotas, TenantHead, VersionRecord

__all__ = ["FEW_ROWS", "Decode", "MayPredict", "Prediction", "Rows", "Ticket"]

FEW_ROWS: Final = 16
"""Rows up to which plain Python finds the labels as fast as numpy does."""

Rows = NDArray[np.float32]

Decode = Callable[[Architecture], Rows | Awaitable[Rows]]
"""Makes the rows ``(N, *input.shape)`` of a request for an architecture, at once or as something to await;
raises ``BadInput``."""


class MayPredict(Protocol):
    """A caller who is known."""

    @property
    def background(self) -> bool:
        """Whether it asks for tasks, whose answers nobody waits for."""
        ...

    def may_predict(self, ref: ModelRef) -> None:
        """Return if the caller may use a model; raises ``NotFound`` or ``Forbidden``."""
        ...


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to one request for a model: its caller was allowed and its tenant's limits were checked.

    Attributes
    ----------
    head
        The tenant, as known when the request came.
    limits
        The tenant's limits, which apply to the size of this request.
    background
        It belongs to a task, so nobody waits for it at this moment.
    trace
        Where its parts are recorded, if it is sampled.
    """

    ref: ModelRef
    head: TenantHead
    limits: Quotas
    under_way: UnderWay
    background: bool = False
    trace: Trace = NO_TRACE

    def __enter__(self) -> Ticket:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The request is over: it counts no longer."""
        self.under_way.__exit__(kind, error, trace)

    def hold_bytes(self, size: int) -> None:
        """Count what the request holds in memory. Raises as :meth:`UnderWay.hold_bytes`."""
        self.under_way.hold_bytes(size)

    def decode(self, most: int, decode: Callable[[int], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Decode rows within the tenant's limit, which is known before memory is spent on them.

        Parameters
        ----------
        most
            Rows that anybody may send.
        decode
            Called with the smaller of the two limits.

        Raises
        ------
        RowsOverQuota
            There are more than this tenant may send.
        """
        own = self.limits.rows_per_request
        if own is None or own >= most:
            return decode(most)
        try:
            return decode(own)
        except TooLarge as error:
            raise RowsOverQuota(f"tenant {self.ref.tenant}: {error.message}") from None

    def check_rows(self, rows: int) -> None:
        """Refuse a batch that is larger than the tenant may send.

        Raises
        ------
        RowsOverQuota
            It is.
        """
        limit = self.limits.rows_per_request
        if limit is not None and rows > limit:
            raise RowsOverQuota(f"there are {rows} rows; tenant {self.ref.tenant} may send {limit} at a time")


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
    _label_list: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Most likely class of each row, ``(N,)``."""
        labels: NDArray[np.int64] = self.logits.argmax(axis=1)
        return labels

    def label_list(self) -> list[int]:
        """The same as plain numbers; for few rows without releasing the GIL (see ``codecs/payload.py``)."""
        if not self._label_list:  # worked out once: the answer and the usage counts both need them
            few = len(self.logits) <= FEW_ROWS
            self._label_list.extend(
                [row.index(max(row)) for row in self.logits.tolist()] if few else self.labels.tolist()
            )
        return self._label_list
