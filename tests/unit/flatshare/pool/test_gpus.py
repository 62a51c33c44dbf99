"""``pool/gpus.py``: what fits on a cluster's GPUs, and whose GPU a replica runs on."""

from __future__ import annotations

import pytest

from flatshare.errors import SettingsError
from flatshare.pool.gpus import allocator_variables, check_visible, replicas_that_fit


@pytest.mark.parametrize(
    ("gpus", "per_replica", "fit"),
    [([1], 0.25, 4), ([1], 0.3, 3), ([1], 0.1, 10), ([2, 1], 1, 3), ([1, 1], 0.6, 2), ([0, 4], 0.5, 8), ([], 1, 0),
     ([1], 1 / 3, 3), ([0.5], 0.25, 0)],
)  # fmt: skip
def test_a_replica_has_its_part_of_one_gpu(gpus: list[float], per_replica: float, fit: int) -> None:
    assert replicas_that_fit(gpus, per_replica) == fit


def test_the_gpu_that_ray_gave_is_the_one_that_is_seen() -> None:
    check_visible([], None)
    check_visible([], "0,1")
    check_visible([3], "3")
    check_visible(["GPU-af0"], "GPU-af0")
    for visible in (None, "", "0", "0,1,2,3"):
        with pytest.raises(SettingsError, match=r"gave this replica GPU 3.*NOSET_CUDA_VISIBLE_DEVICES"):
            check_visible([3], visible)


def test_segments_grow_unless_the_operator_says_otherwise() -> None:
    assert allocator_variables({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator_variables({name: "x:1", "other": "y"}) == {name: "x:1"}
