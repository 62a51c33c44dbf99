"""Digests of tensors that arrive in pieces: right whatever their sizes, and nothing is left running."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatshare.weights.hasher import AHEAD, BESIDE_FROM_BYTES, Hasher

SIZES = st.sampled_from([0, 1, 1000, BESIDE_FROM_BYTES - 1, BESIDE_FROM_BYTES, 3 * BESIDE_FROM_BYTES])


@given(st.lists(st.lists(SIZES, max_size=6), max_size=6))
def test_each_tensor_has_its_own_digest_in_order(tensors: Sequence[Sequence[int]]) -> None:
    """Small pieces after large ones must wait for these."""
    with Hasher() as hasher:
        for number, sizes in enumerate(tensors):
            expected = hashlib.sha256()
            for index, size in enumerate(sizes):
                piece = bytes([(number + index) % 256]) * size
                expected.update(piece)
                hasher.update(memoryview(piece))
            assert hasher.hexdigest() == expected.hexdigest()
    assert not [one for one in threading.enumerate() if one.name == "hasher"]


def test_small_tensors_take_no_thread() -> None:
    with Hasher() as hasher:
        hasher.update(memoryview(b"small"))
        assert not [one for one in threading.enumerate() if one.name == "hasher"]
        assert hasher.hexdigest() == hashlib.sha256(b"small").hexdigest()


def test_a_load_that_fails_in_the_middle_leaves_no_thread() -> None:
    piece = memoryview(bytes(BESIDE_FROM_BYTES))
    with pytest.raises(OSError, match="cut"), Hasher() as hasher:
        for _ in range(AHEAD + 1):
            hasher.update(piece)
        raise OSError("cut")
    assert not [one for one in threading.enumerate() if one.name == "hasher"]
