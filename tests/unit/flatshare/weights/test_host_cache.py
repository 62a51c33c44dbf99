"""Warm tensors: what is used stays, what is longest unused goes, and the bytes are bounded."""

from __future__ import annotations

import torch

from flatshare.weights.host_cache import HostTensorCache
from flatshare.weights.tiers import Part


def part(name: str) -> Part:
    return Part(name, "F32", (10,))


def test_what_is_used_outlives_what_is_not() -> None:
    warm = HostTensorCache(budget_bytes=120)
    for name in "abc":
        warm.keep({part(name): torch.zeros(10)})
    warm.touch([part("a"), part("unknown")])
    warm.keep({part("d"): torch.zeros(10)})
    assert warm.get([part("b")]) is None
    assert set(warm.get([part("a"), part("c"), part("d")]) or {}) == {part("a"), part("c"), part("d")}


def test_too_large_a_tensor_is_not_kept_and_clearing_lets_go_of_all() -> None:
    warm = HostTensorCache(budget_bytes=120)
    warm.keep({part("a"): torch.zeros(10), part("huge"): torch.zeros(31)})
    assert warm.get([part("huge")]) is None
    assert warm.get([part("a")]) is not None
    warm.clear()
    assert warm.get([part("a")]) is None
