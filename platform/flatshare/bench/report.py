"""What a run amounts to: throughput, latency, errors, hit rates; and whether client and servers agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from flatshare.bench.load import Outcome

__all__ = ["compare_hits", "latency_ms", "summarise"]

TIERS: Final = ("device", "host", "peer", "store")


def latency_ms(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """p50, p90, p99 and max over answered requests, in milliseconds; None without any."""
    values = np.array([one.latency_s * 1000 for one in outcomes if one.status == 200])
    if not len(values):
        return {"p50": None, "p90": None, "p99": None, "max": None}
    quantiles = np.percentile(values, [50, 90, 99])
    return {
        **{
            name: round(float(value), 3) for name, value in zip(("p50", "p90", "p99"), quantiles, strict=True)
        },
        "max": round(float(values.max()), 3),
    }


def summarise(outcomes: Sequence[Outcome], batch: int = 1) -> dict[str, Any]:
    """A run as a document; all counts are of requests."""
    answered = [one for one in outcomes if one.status == 200]
    seconds = max((one.at_s + one.latency_s for one in outcomes), default=0.0)
    hits = Counter(one.tier for one in answered)
    return {
        "requests": len(outcomes),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(answered) / seconds, 1) if seconds else 0.0,
        "images_per_s": round(len(answered) * batch / seconds, 1) if seconds else 0.0,
        "errors": len(outcomes) - len(answered),
        "errors_by_code": dict(Counter(one.code for one in outcomes if one.status != 200)),
        "wrong_answers": sum(one.right is False for one in answered),
        "checked_answers": sum(one.right is not None for one in answered),
        "latency_ms": latency_ms(outcomes),
        "hits": {tier: hits.get(tier, 0) for tier in TIERS},
        "hit_rate": {tier: round(hits.get(tier, 0) / max(len(answered), 1), 4) for tier in TIERS},
        "requests_by_replica": dict(Counter(one.replica for one in answered)),
    }


def compare_hits(
    seen: Mapping[str, int], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """Hits as the client saw them (reply headers) against what the servers counted meanwhile.

    Parameters
    ----------
    before, after
        The fleet (``GET /admin/replicas``) around the run. A replica that was replaced in between
        took its counts with it, which shows as a disagreement.
    """
    counted = {tier: after["totals"]["hits"][tier] - before["totals"]["hits"][tier] for tier in TIERS}
    total = max(sum(counted.values()), 1)
    same_replicas = {one["replica"] for one in before["replicas"]} == {
        one["replica"] for one in after["replicas"]
    }
    agree = all(counted[tier] == seen[tier] for tier in TIERS)
    document: dict[str, Any] = {
        "hits": counted,
        "hit_rate": {tier: round(count / total, 4) for tier, count in counted.items()},
        "agree": agree,
    }
    if not agree:
        document["why"] = (
            "other clients sent requests meanwhile, or requests failed after their model was found"
            if same_replicas
            else "replicas came or went meanwhile and took their counts along"
        )
    return document
