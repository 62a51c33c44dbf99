"""The one place that touches Ray's multiplexing wrapper: tell Ray exactly what is held.

``@serve.multiplexed`` is the way that Ray knows: it publishes ids of models to Serve's routers. Its
cache is not used for residency, because it evicts before it knows that a load succeeds, loads one
model at a time and forgets who holds what (``ModelCache`` decides these). The decorated loader is
called after a model became resident, never evicts (``max_num_models_per_replica=-1``), and ids are
taken out here when the model goes, which Ray has no public call for.

Assumptions on ray 2.60 ``serve/multiplex.py``, each pinned by ``tests/contract/test_ray_multiplex.py``:

1. the wrapper is the attribute ``__serve_multiplex_wrapper`` of the object, made at the first call;
2. ``wrapper.models`` is a dict from id to what the loader returned;
3. setting ``_push_multiplexed_replica_info`` makes the next push (every 0.1 s) send all ids;
4. the metric ``registered_model_gauge`` is set to 0 by whoever removes an id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

__all__ = ["NEVER_EVICT", "Advertiser"]

logger = logging.getLogger("flatshare.pool")

NEVER_EVICT: Final = -1
"""``max_num_models_per_replica`` that switches Ray's own eviction off."""

PUBLISH_S: Final = 1.0
"""Shortest time between two updates while models come and go all the time."""

_WRAPPER: Final = "__serve_multiplex_wrapper"


class Advertiser:
    """Keeps the ids that Ray publishes for this replica equal to the ids that are held.

    Parameters
    ----------
    owner
        The object whose method is decorated with ``@serve.multiplexed``.
    load
        That method, bound.
    held
        Returns the ids that should be published now.

    Notes
    -----
    :meth:`changed` may be called at any rate, also while an update runs: updates are made one
    after the other, each from the newest answer of ``held``.
    """

    def __init__(
        self, owner: object, load: Callable[[str], Awaitable[object]], held: Callable[[], Iterable[str]]
    ) -> None:
        self._owner = owner
        self._load = load
        self._held = held
        self._dirty = False
        self._task: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Something was loaded, evicted or promoted: publish anew, soon."""
        self._dirty = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._publish(), name="advertise")

    def advertised(self) -> set[str]:
        """Ids that Ray publishes now."""
        wrapper = self._wrapper()
        return set(wrapper.models) if wrapper is not None else set()

    async def _publish(self) -> None:
        while self._dirty:
            self._dirty = False
            wanted = set(self._held())
            self._remove(self.advertised() - wanted)
            for model_id in wanted - self.advertised():
                await self._load(model_id)
            if self._dirty:
                # Under churn, one update for many changes: each is told to every router in the cluster, and
                # at a thousand loads a second the controller alone took 7 % of a core for it.
                await asyncio.sleep(PUBLISH_S)

    def _remove(self, gone: set[str]) -> None:
        wrapper = self._wrapper()
        if wrapper is None or not gone:
            return
        for model_id in gone:
            wrapper.models.pop(model_id, None)
            wrapper.registered_model_gauge.set(0, tags={"model_id": model_id})
        wrapper._push_multiplexed_replica_info = True

    def _wrapper(self) -> Any:
        return getattr(self._owner, _WRAPPER, None)
