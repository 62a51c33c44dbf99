"""Who and where a replica is, for its answers, receipts and the fleet view."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

__all__ = ["ReplicaIdentity"]


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """Who and where a replica is.

    Attributes
    ----------
    replica
        Its own name, new at each start.
    node
        The machine, for people.
    node_id
        The machine, as the cluster calls it.
    """

    replica: str = "replica"
    node: str = field(default_factory=lambda: os.uname().nodename)
    node_id: str = ""
