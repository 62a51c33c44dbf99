"""Where a model belongs: the consistent hash ring that every edge and every router computes alike.

A *place* is a number from 0 on. A replica has one while it lives, and its replacement takes it over, so that
a restart moves no model. Serve's rank of a replica is its place.

The ring is HAProxy's own (``hash-type consistent crc32 avalanche`` with forced server ids, 2.8.25
``src/lb_chash.c`` and ``include/haproxy/intops.h``), so that the edge needs no table of models and a router
in Python agrees with it. ``tests/contract/test_haproxy_ring.py`` compares both over thousands of models.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from flatshare.placement.homes import canonical

__all__ = ["MAX_PLACES", "NODES_PER_PLACE", "SERVER_WEIGHT", "Ring", "ring_keys", "ring_of", "server_id"]

SERVER_WEIGHT: Final = 100
"""HAProxy's weight of a server. Its default of 1 puts 16 nodes on the ring, and then one of four replicas is
home to a third of the models; with 100 their shares differ by a few hundredths."""

NODES_PER_PLACE: Final = SERVER_WEIGHT * 16
"""Nodes of one server on the ring (``BE_WEIGHT_SCALE`` is 16)."""

_ID_STEP: Final = 4096
"""How far the first nodes of two neighbouring server ids are apart (``SRV_EWGHT_RANGE``)."""

MAX_PLACES: Final = 2**32 // _ID_STEP - 1
"""Beyond it nodes of two servers would be the same."""


def server_id(place: int) -> int:
    """The id by which HAProxy knows a place: in HAProxy, 0 means none."""
    return place + 1


class Ring:
    """The homes of models over a set of places; immutable.

    Parameters
    ----------
    places
        Numbers of the places that have a replica now, in any order.

    Raises
    ------
    ValueError
        A number is negative, or too large for the ring.
    """

    def __init__(self, places: Iterable[int]) -> None:
        self.places: tuple[int, ...] = tuple(sorted(set(places)))
        if self.places and not 0 <= self.places[0] <= self.places[-1] < MAX_PLACES:
            raise ValueError(f"places are numbers from 0 to {MAX_PLACES - 1}")
        numbers = np.arange(NODES_PER_PLACE, dtype=np.uint32)
        keys = [_full_hash(numbers + np.uint32(server_id(place) * _ID_STEP)) for place in self.places]
        all_keys = np.concatenate(keys) if keys else np.empty(0, np.uint32)
        owners = np.repeat(np.array(self.places, np.int64), NODES_PER_PLACE)
        order = np.argsort(all_keys, kind="stable")
        self._keys = all_keys[order]
        self._owners = owners[order]

    def home(self, model_ref: str) -> int | None:
        """The place where a model belongs; None when there is no place."""
        return next(iter(self.homes(model_ref, 1)), None)

    def homes(self, model_ref: str, count: int | None = None) -> list[int]:
        """The places of a model, best first: its home, then where HAProxy goes on when that is too busy.

        Parameters
        ----------
        count
            How many; None for all.
        """
        wanted = len(self.places) if count is None else min(count, len(self.places))
        found: list[int] = []
        node = self._nearest(model_ref) if wanted > 0 else 0
        while len(found) < wanted:
            place = int(self._owners[node])
            if place not in found:
                found.append(place)
            node = (node + 1) % len(self._keys)
        return found

    def home_of_each(self, keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """The homes of many models at once, by their keys (:func:`ring_keys`); there must be a place."""
        after = np.searchsorted(self._keys, keys) % len(self._keys)
        before = (after - 1) % len(self._keys)
        back, ahead = keys - self._keys[before], self._keys[after] - keys  # modulo 2**32, as these wrap
        return self._owners[np.where(back <= ahead, before, after)]

    def _nearest(self, model_ref: str) -> int:
        """Index of the node whose key is nearest, on either side, as ``chash_get_server_hash`` takes it."""
        wanted = int(ring_keys((model_ref,))[0])
        after = int(np.searchsorted(self._keys, np.uint32(wanted))) % len(self._keys)
        before = (after - 1) % len(self._keys)
        back, ahead = (wanted - int(self._keys[before])) % 2**32, (int(self._keys[after]) - wanted) % 2**32
        return before if back <= ahead else after


def ring_keys(model_refs: Iterable[str]) -> npt.NDArray[np.uint32]:
    """Where models stand on the ring."""
    return _full_hash(np.array([zlib.crc32(canonical(ref).encode()) for ref in model_refs], np.uint32))


@functools.lru_cache(maxsize=32)
def _ring(places: tuple[int, ...]) -> Ring:
    return Ring(places)


def ring_of(places: Iterable[int]) -> Ring:
    """The ring of these places; the last ones are remembered, since making one sorts its nodes."""
    return _ring(tuple(sorted(places)))


def _full_hash(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """HAProxy's ``full_hash``: Bob Jenkins' avalanche of 32 bits (burtleburtle.net/bob/hash/integer.html)."""
    mixed = values + np.uint32(0x7ED55D16) + (values << np.uint32(12))
    mixed = (mixed ^ np.uint32(0xC761C23C)) ^ (mixed >> np.uint32(19))
    mixed = (mixed + np.uint32(0x165667B1)) + (mixed << np.uint32(5))
    mixed = (mixed + np.uint32(0xD3A2646C)) ^ (mixed << np.uint32(9))
    mixed = (mixed + np.uint32(0xFD7046C5)) + (mixed << np.uint32(3))
    mixed = (mixed ^ np.uint32(0xB55A4F09)) ^ (mixed >> np.uint32(16))
    return mixed * np.uint32(3221225473)
