"""How many slots a hit rate needs: hit rates by number of slots, and which of them reaches a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatshare.simulation.fleet import FleetSetup, simulate
from flatshare.simulation.references import belady_hits, lru_hits
from flatshare.simulation.trace import Trace

__all__ = ["PlanRow", "plan_for", "plot_plan", "slots_needed"]

WARM_SHARE = 0.3
"""Part of a trace that fills the caches and counts for nothing."""

SIZES = 12
"""Fleet sizes that are tried, from one replica to one that holds all models."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Hit rates with so many slots.

    Attributes
    ----------
    lru, sieve
        Of a fleet of ``replicas``, with either policy.
    one_lru, belady
        Of one cache that has all the slots: with LRU, and the most that any policy could reach.
    """

    replicas: int
    slots: int
    lru: float
    sieve: float
    one_lru: float
    belady: float


def plan_for(
    trace: Trace, slots: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[PlanRow]:
    """Hit rates of fleets of growing size on a trace; few first.

    Parameters
    ----------
    slots
        Of one replica.
    progress
        Called with fleet sizes done and in all.
    """
    models = len(np.unique(trace.models))
    largest = max(-(-models // slots), 1)
    sizes = sorted({max(round(one), 1) for one in np.geomspace(1, largest, SIZES)})
    tick_s = max(float(trace.at_s[-1]) / 200, 1e-3)
    # From the beginning of a tick on: requests may come all in the last one.
    warm_s = float(trace.at_s[int(len(trace) * WARM_SHARE)]) // tick_s * tick_s
    after = trace.at_s >= warm_s
    rows = []
    for done, replicas in enumerate(sizes):
        progress(done, len(sizes))
        rates = [
            simulate(
                trace, FleetSetup(replicas, slots, policy, warm_s=warm_s, tick_s=tick_s, service_s=0.0)
            ).hit_rate
            for policy in ("lru", "sieve")
        ]
        total = replicas * slots
        one, best = lru_hits(trace.models, total)[after], belady_hits(trace.models, total)[after]
        rows.append(PlanRow(replicas, total, rates[0], rates[1], float(one.mean()), float(best.mean())))
    progress(len(sizes), len(sizes))
    return rows


def slots_needed(rows: Sequence[PlanRow], target: float, policy: str = "lru") -> int | None:
    """Slots with which a fleet of this policy reaches a hit rate; None: none of these sizes does.

    Between two rows it interpolates along a straight line in the logarithm of slots.
    """
    before: PlanRow | None = None
    for row in rows:
        rate = getattr(row, policy)
        if rate >= target:
            if before is None:
                return row.slots
            low = getattr(before, policy)
            share = float((target - low) / (rate - low))
            return math.ceil(round(float(before.slots * (row.slots / before.slots) ** share), 6))
        before = row
    return None


def plot_plan(rows: Sequence[PlanRow], path: Path, title: str, target: float | None = None) -> None:
    """Draw hit rate against slots into a PNG, or what the suffix says."""
    import matplotlib

    matplotlib.use("Agg")  # no window: also on servers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    slots = [row.slots for row in rows]
    for name, label, style in (
        ("belady", "Belady's bound", {"color": "#888888", "linestyle": ":"}),
        ("one_lru", "one LRU of all slots", {"color": "#888888", "linestyle": "--"}),
        ("sieve", "fleet, SIEVE", {"color": "#c9a227", "marker": "o", "markersize": 4}),
        ("lru", "fleet, LRU", {"color": "#2b7a4b", "marker": "o", "markersize": 4}),
    ):
        axes.plot(slots, [getattr(row, name) for row in rows], label=label, **style)
    if target is not None:
        axes.axhline(target, color="#b5442e", linewidth=0.8, label=f"wanted: {target:g}")
    axes.set(xlabel="slots in all", ylabel="device hit rate", xscale="log", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
