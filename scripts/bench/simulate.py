"""What no test machine has: 100,000 tenants on 1,000 replicas, in virtual time, beside one cache of all slots.

The decisions are the fleet keeper's own (`placement/`), the caches' policies the replica's own
(`flatshare.simulation` says what is left out). One core, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatshare.cli.output import print_table, progress_bar
from flatshare.placement.scaling import Bounds
from flatshare.simulation.fleet import Absence, FleetSetup, simulate
from flatshare.simulation.references import belady_hits, lru_hits
from flatshare.simulation.trace import Trace, tide_trace, zipf_trace

SLOTS, NODE = 20, 8
STEADY_RATE = 10_000.0
"""Requests a second of a trace; each stands for ten."""


@dataclass(frozen=True)
class Scenario:
    name: str
    trace: Callable[[], Trace]
    setup: FleetSetup


def scenarios(tenants: int, replicas: int, requests: int) -> list[Scenario]:
    seconds = requests / STEADY_RATE
    warm_s = seconds / 2

    def steady(exponent: float) -> Callable[[], Trace]:
        return lambda: zipf_trace(tenants, exponent, requests, STEADY_RATE)

    def fleet(**changes: Any) -> FleetSetup:
        return FleetSetup(
            **{"replicas": replicas, "slots": SLOTS, "weight": 10.0, "warm_s": warm_s, **changes}
        )

    node = tuple(range(NODE))
    at_a_time = max(replicas // 50, 1)
    rollout = tuple(
        Absence(warm_s + 2 * number, 2.0, tuple(range(first, min(first + at_a_time, replicas))))
        for number, first in enumerate(range(0, replicas, at_a_time))
    )
    day_s = 86_400.0
    peak = requests / day_s / 0.6  # the mean of the tide is 0.6 of its peak
    # So that the peak keeps 0.8 of the replicas busy at their target of four.
    weight = replicas * 0.8 * 4 / (peak * 0.001)
    tide = fleet(
        replicas=replicas // 2, weight=weight, tick_s=300.0, warm_s=day_s / 4,
        bounds=Bounds(replicas // 5, replicas, upscale_delay_s=300, downscale_delay_s=1800, idle_s=3600),
    )  # fmt: skip
    return [
        Scenario("zipf-0.8", steady(0.8), fleet()),
        Scenario("zipf-1.0", steady(1.0), fleet()),
        Scenario("zipf-1.2", steady(1.2), fleet()),
        Scenario("zipf-1.0-sieve", steady(1.0), fleet(policy="sieve")),
        Scenario("tide", lambda: tide_trace(tenants, 1.0, requests), tide),
        Scenario("node-lost", steady(1.0), fleet(absences=(Absence(warm_s, 60.0, node, host_lost=True),))),
        Scenario("rollout", steady(1.0), fleet(absences=rollout)),
    ]


def measured(scenario: Scenario) -> dict[str, Any]:
    began = time.perf_counter()
    trace, setup = scenario.trace(), scenario.setup
    with progress_bar(scenario.name) as progress:
        found = simulate(trace, setup, lambda share: progress(int(share * len(trace)), len(trace)))
    after = trace.at_s >= setup.warm_s
    slots = round(sum(found.replicas) / len(found.replicas)) * setup.slots
    after_changes = found.hit_rates[int(setup.warm_s / setup.tick_s) :]
    return {
        "scenario": scenario.name,
        "requests": found.requests,
        "slots": slots,
        "hit_rate": found.hit_rate,
        "hit_rate_of_its_worst_tick": min(one for one in after_changes if one == one),
        "one_lru": float(lru_hits(trace.models, slots)[after].mean()),
        "belady": float(belady_hits(trace.models, slots)[after].mean()),
        "duplicate_factor": found.duplicate_factor,
        "moved": len(found.moved),
        "rehomed": max(found.rehomed, default=0.0),
        "replicas": [min(found.replicas), max(found.replicas)],
        "store_requests_per_s": found.store_requests_per_s,
        "wall_s": time.perf_counter() - began,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="names of scenarios; by default all")
    parser.add_argument("--tenants", type=int, default=100_000)
    parser.add_argument("--replicas", type=int, default=1_000)
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    arguments = parser.parse_args()
    chosen = scenarios(arguments.tenants, arguments.replicas, arguments.requests)
    unknown = set(arguments.only) - {one.name for one in chosen}
    if unknown:
        parser.error(
            f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in chosen)}"
        )
    rows = [measured(one) for one in chosen if not arguments.only or one.name in arguments.only]
    print_table(
        f"{arguments.tenants} tenants, {arguments.replicas} replicas of {SLOTS} slots, {arguments.requests} requests",
        ["scenario", "hit rate#", "worst tick#", "one LRU#", "Belady#", "duplicates#", "moved#", "rehomed#",
         "replicas#", "store loads/s#", "wall s#"],
        [
            (
                row["scenario"], f"{row['hit_rate']:.3f}", f"{row['hit_rate_of_its_worst_tick']:.3f}",
                f"{row['one_lru']:.3f}", f"{row['belady']:.3f}", f"{row['duplicate_factor']:.3f}",
                row["moved"], f"{row['rehomed']:.3f}", "-".join(map(str, dict.fromkeys(row["replicas"]))),
                f"{row['store_requests_per_s']:.1f}", f"{row['wall_s']:.0f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
