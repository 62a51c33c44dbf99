"""Traces: drawn ones have the popularity that was asked for; files are read as they were written, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flatshare.simulation.trace import read_trace, tide_trace, write_trace, zipf_trace
from flatshare_registry.errors import InvalidInput


def test_a_drawn_trace_has_its_rate_and_its_popularity() -> None:
    trace = zipf_trace(100, 1.0, 50_000, rate=200.0, seed=3)
    counts = np.bincount(trace.models, minlength=100) / len(trace)
    harmonic = sum(1 / k for k in range(1, 101))
    assert counts[0] == pytest.approx(1 / harmonic, rel=0.05)
    assert counts[9] == pytest.approx(0.1 / harmonic, rel=0.1)
    assert trace.at_s[-1] == pytest.approx(250, rel=0.05) and (np.diff(trace.at_s) >= 0).all()
    again = zipf_trace(100, 1.0, 50_000, rate=200.0, seed=3)
    assert (again.models == trace.models).all()


def test_a_tide_rises_and_falls() -> None:
    trace = tide_trace(10, 0.0, 20_000, day_s=100.0, low=0.2)
    by_tenth = np.histogram(trace.at_s, 10, (0, 100))[0]
    assert by_tenth[0] < by_tenth[4] / 3 and by_tenth[9] < by_tenth[5] / 3


def test_a_file_is_read_as_it_was_written_in_whatever_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    assert write_trace(path, [(12.5, "b"), (10.0, "a"), (11.0, "b,c")]) == 3
    trace = read_trace(path)
    assert trace.at_s.tolist() == [0.0, 1.0, 2.5]
    assert [trace.names[model] for model in trace.models] == ["a", "b,c", "b"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("time,who\n1,a\n", "no columns"), ("", "no columns"), ("time,tenant\n", "no request"),
        ("time,tenant\n1,a\nx,b\n", "line 3"), ("time,tenant\ninf,a\n", "none"), ("time,tenant\n1\n,\n", "line"), ("time,tenant\n1,\n", "line 2 names no tenant"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_with_its_place(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=why):
        read_trace(path)
    with pytest.raises(InvalidInput, match="can't be read"):
        read_trace(tmp_path / "none.csv")
