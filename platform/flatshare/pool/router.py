"""Our request router: each model has a home replica, kept unless it is overloaded or another one is warm.

For callers with a ``DeploymentHandle`` and for ``--edge serve``. The ring of places (``placement.ring``)
gives every router, and the edge, the same home without communication; a replica that comes or goes moves only
its own share of models, and a replacement gets them back. A replica's place here is the one that it had when
it started: after the pool shrank Serve may give it another number, which only the edge learns. Bounded load
(arxiv.org/abs/1608.01350): no replica is offered more than ``load_factor`` times the average while another is
under it. The last rank always has all replicas, because a router that insists on one blocks all tenants (Ray
places at most ``2 * replicas`` requests at a time, and a request that waits for its replica occupies one of
these).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from flatshare.placement.homes import canonical, rank
from flatshare.placement.ring import Ring

__all__ = ["PLACE", "HomeReplicaRouter"]

PLACE: Final = "place"
"""Where a replica's metadata say its place."""

MAX_REMEMBERED_ORDERS: Final = 10_000
"""Models whose order of replicas is remembered; computing one takes a hash for each replica."""


class HomeReplicaRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Ray Serve's router for the classifier pool (see the module's text)."""

    def initialize_state(self, load_factor: float = 1.5, **_: Any) -> None:
        """Called by Serve with ``request_router_kwargs``."""
        self._load_factor = load_factor
        self._orders: OrderedDict[str, list[str]] = OrderedDict()
        self._ring: Ring | None = None

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget what was worked out for the old set of replicas."""
        self._orders = OrderedDict()
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks for one request; never empty, and asks for backoff when all are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        model_ref = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not model_ref or len(candidate_replicas) < 2:
            return [candidate_replicas]
        model_ref = canonical(model_ref)
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        queued = {
            name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in by_name.items()
        }
        ranks = rank(
            self._order(model_ref, by_name),
            {name for name, one in by_name.items() if model_ref in one.multiplexed_model_ids},
            queued,
            {name: one.max_ongoing_requests for name, one in by_name.items()},
            self._load_factor,
        )
        return [[by_name[name] for name in names] for names in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Drop finished requests from Ray's index by model, which keeps their payloads alive otherwise."""
        super().on_request_routed(pending_request, replica_id, result)
        # The lookup that Ray's FIFOMixin makes also removes what is done (2.60, request_router.py:219).
        self._get_pending_request_matching_multiplexed_model_id(pending_request.metadata)

    def _order(self, model_ref: str, by_name: dict[str, RunningReplica]) -> list[str]:
        known = self._orders.get(model_ref)
        if known is not None and len(known) == len(by_name) and all(name in by_name for name in known):
            self._orders.move_to_end(model_ref)
            return known
        names = self._by_place(by_name)
        if self._ring is None or self._ring.places != tuple(names):
            self._ring = Ring(names)
        order = [names[place] for place in self._ring.homes(model_ref)]
        self._orders[model_ref] = order
        if len(self._orders) > MAX_REMEMBERED_ORDERS:
            self._orders.popitem(last=False)
        return order

    def _by_place(self, by_name: dict[str, RunningReplica]) -> dict[int, str]:
        """Names by place, sorted. Replicas whose place another has get places beyond all, in the order of
        their names.
        """
        names: dict[int, str] = {}
        left = []
        for name in sorted(by_name):
            place = by_name[name].replica_metadata.get(PLACE)
            if isinstance(place, int) and place not in names:
                names[place] = name
            else:
                left.append(name)
        first = max(names, default=-1) + 1
        return dict(sorted({**names, **dict(enumerate(left, first))}.items()))
