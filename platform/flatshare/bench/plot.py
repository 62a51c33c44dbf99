"""A run as a picture: latency over time by tier, and the distribution of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from flatshare.bench.load import Outcome
from flatshare.bench.report import TIERS

__all__ = ["COLOURS", "plot_run"]

COLOURS: Final = {"device": "#2b7a4b", "host": "#c9a227", "peer": "#d9772b", "store": "#b5442e"}
"""By tier, in every picture."""


def plot_run(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Write a PNG (or what the suffix says) of a run."""
    import matplotlib

    matplotlib.use("Agg")  # no window: also on servers
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for tier in TIERS:
        chosen = [one for one in outcomes if one.tier == tier]
        if not chosen:
            continue
        latency = np.array([one.latency_s * 1000 for one in chosen])
        left.scatter(
            [one.at_s for one in chosen], latency, s=3, color=COLOURS[tier], label=f"{tier} ({len(chosen)})"
        )
        ordered = np.sort(latency)
        right.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=COLOURS[tier], label=tier)
    failed = [one for one in outcomes if one.status != 200]
    if failed:
        left.scatter(
            [one.at_s for one in failed],
            [one.latency_s * 1000 for one in failed],
            s=16,
            marker="x",
            color="black",
            label=f"failed ({len(failed)})",
        )
    left.set(xlabel="seconds into the run", ylabel="latency, ms", yscale="log", title="each request")
    right.set(xlabel="latency, ms", ylabel="share of requests", xscale="log", title="distribution, by tier")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(markerscale=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
