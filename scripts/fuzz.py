"""Hostile requests to every route of both planes, in this process; prints what each route's worst one cost.

Ends with 1 when a request broke a rule (``tests/property/fuzz_run.py``). A finding names its route, its number and
the seed: ``--route`` and ``--only`` send it again.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from tests.property.fuzz_run import Bounds, Planes, RouteResult, baseline, run_route
from tests.property.watch import Watch

from flatshare.api import identity
from flatshare.cli.output import err, print_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="for each route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--route", action="append", help='routes with this in them: "classify", "GET /v2" (repeatable)'
    )
    parser.add_argument(
        "--only", type=int, action="append", help="the request of this number only (repeatable)"
    )
    parser.add_argument("--json", type=Path, help="write results and findings here")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # a failure is told with its route and number
    with patch.object(identity, "REFUSAL_S", 0.0):  # refusals are slow on purpose
        return asyncio.run(run(arguments))


async def run(arguments: argparse.Namespace) -> int:
    watch, results, began = Watch(), [], time.monotonic()
    numbers = arguments.only or range(arguments.requests)
    with Planes.made() as planes:
        bounds = await baseline(planes.data, Bounds(), watch)
        err.print(
            f"bounds of one request: loop lag {bounds.lag_s * 1e3:.0f} ms, {bounds.peak_bytes / 1e6:.0f} MB, {bounds.seconds:g} s"
        )
        for plane, route in list(planes.all()):
            name = " ".join(route)
            if arguments.route and not any(part in name for part in arguments.route):
                continue
            found = await run_route(
                planes, plane, route, numbers, seed=arguments.seed, bounds=bounds, watch=watch
            )
            results.append((plane.name, found))
            err.print(f"{plane.name} {name}: {found.requests} requests, {len(found.findings)} findings")
            for finding in found.findings[:3]:
                err.print(f"  number {finding.number}: {finding.what}\n    {finding.request}", markup=False)
    print_table("", ["plane", "route", "requests#", "statuses", "worst lag ms#", "peak MB#", "longest s#", "findings#"],
                [row(plane, found) for plane, found in results])  # fmt: skip
    resident = psutil.Process().memory_info().rss / 1e6
    total = sum(found.requests for _, found in results)
    err.print(f"{total} requests in {time.monotonic() - began:.0f} s; {resident:.0f} MB resident at the end")
    if arguments.json:
        document = {
            "seed": arguments.seed, "bounds": dataclasses.asdict(bounds), "resident_mb": round(resident),
            "routes": [
                {"plane": plane, "route": " ".join(found.route), "requests": found.requests,
                 "statuses": dict(sorted(found.statuses.items())), "worst_lag_ms": round(found.worst.lag_s * 1e3, 1),
                 "peak_mb": round(found.worst.peak_bytes / 1e6, 1), "longest_s": round(found.worst.seconds, 3),
                 "findings": [dataclasses.asdict(one) for one in found.findings]}
                for plane, found in results
            ],
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1))
    return 1 if any(found.findings for _, found in results) else 0


def row(plane: str, found: RouteResult) -> tuple[object, ...]:
    statuses = " ".join(f"{status}:{count}" for status, count in sorted(found.statuses.items()))
    return (
        plane, " ".join(found.route), found.requests, statuses, f"{found.worst.lag_s * 1e3:.0f}",
        f"{found.worst.peak_bytes / 1e6:.0f}", f"{found.worst.seconds:.2f}", len(found.findings),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
