"""How many slots a hit rate needs: the curves rise, lie below their bounds, and say where a target is met."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flatshare.simulation.plan import PlanRow, plan_for, plot_plan, slots_needed
from flatshare.simulation.trace import Trace, zipf_trace


def test_hit_rates_rise_with_slots_and_stay_below_their_bounds(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    rows = plan_for(
        zipf_trace(100, 1.0, 12_000, rate=1000.0), 10, lambda done, total: told.append((done, total))
    )
    assert (rows[0].replicas, rows[-1].slots) == (1, 100) and told[-1][0] == told[-1][1]
    for before, row in pairwise(rows):
        assert row.lru > before.lru - 0.01 and row.sieve > before.sieve - 0.01 and row.belady >= before.belady
    for row in rows:
        assert row.lru <= row.belady and row.sieve <= row.belady and row.one_lru <= row.belady
        assert row.lru == pytest.approx(row.one_lru, rel=0.06)
    assert rows[0].lru == pytest.approx(rows[0].one_lru, abs=0.002), "one replica is one cache"
    picture = tmp_path / "plan.svg"
    plot_plan(rows, picture, "a title", 0.8)
    assert "a title" in picture.read_text() or picture.stat().st_size > 5000


def test_the_slots_of_a_target_lie_between_two_sizes() -> None:
    rows = [PlanRow(1, 10, 0.2, 0.4, 0, 0), PlanRow(4, 40, 0.6, 0.7, 0, 0)]
    assert slots_needed(rows, 0.4) == 20
    assert slots_needed(rows, 0.4, "sieve") == 10
    assert slots_needed(rows, 0.6) == 40 and slots_needed(rows, 0.61) is None


def test_a_trace_whose_requests_come_nearly_all_at_its_end_is_planned_for() -> None:
    at_s = np.concatenate([np.arange(100.0), 99.5 + np.arange(1000) / 2000])
    trace = Trace(at_s, np.arange(1100) % 4, ("a", "b", "c", "d"))
    rows = plan_for(trace, 4)
    assert rows[-1].lru > 0.95
