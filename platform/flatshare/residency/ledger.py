"""The ledger of a device: slots and bytes that are taken, and what would come free.

Promise 4 is an inequality that holds at every instant:

    held + reserved <= budget        (held: resident and draining, each part once)
    slots taken     <= slots

Parts (tensors) have a count of holders, so that models which share layers pay for them once, and a
part's bytes count until its last holder, a draining model included, has let go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flatshare.weights.tiers import Part

__all__ = ["Ledger", "Reservation"]

RAISING_STEPS: Final = 16
"""After the device had less than the budget: loads to place before the whole budget is tried again."""

MAX_SPARING: Final = 32
"""Most victims that are checked again, to spare those that did not help: the check runs on the event loop."""


@dataclass(slots=True, eq=False)
class Reservation:
    """A slot and bytes set aside for one load; ends with :meth:`Ledger.settle` or :meth:`Ledger.cancel`."""

    bytes: int
    open: bool = True


class Ledger:
    """Counts; decides nothing. Must be used on one event loop.

    Parameters
    ----------
    slots
        Most models at a time.
    budget_bytes
        Most bytes of all parts; None for no bound.

    Attributes
    ----------
    limit_bytes
        The budget, or less for a while after the device refused what the ledger had room for: its allocator
        cuts memory into segments, and other processes may have some of it.
    """

    def __init__(self, slots: int, budget_bytes: int | None) -> None:
        self.slots = slots
        self.budget_bytes = budget_bytes
        self.limit_bytes = budget_bytes
        self._steps_left = 0
        self.slots_taken = 0
        self.held_bytes = 0
        self.reserved_bytes = 0
        self._holders: dict[Part, int] = {}
        self._sizes: dict[Part, int] = {}

    # -- asking

    def fits(self, slots: int, new_bytes: int, *, whole: bool = False) -> bool:
        """Whether this much is free now. With ``whole``, it is measured against the whole budget, even while
        a lower limit applies.
        """
        return self.slots_taken + slots <= self.slots and self._bytes_fit(new_bytes, whole=whole)

    def missing_bytes(self, parts: Mapping[Part, int]) -> int:
        """Bytes that holding these parts would add."""
        return sum(size for part, size in parts.items() if part not in self._holders)

    def own_bytes(self, parts: Collection[Part]) -> int:
        """Bytes of those parts that have one holder."""
        return sum(self._sizes[part] for part in self.own_parts(parts))

    def own_parts(self, parts: Collection[Part]) -> list[Part]:
        """Those parts that have one holder."""
        return [part for part in parts if self._holders.get(part) == 1]

    def absent_parts(self, parts: Collection[Part]) -> list[Part]:
        """Those parts that nobody holds."""
        return [part for part in parts if part not in self._holders]

    def choose_victims(
        self,
        candidates: Sequence[Collection[Part]],
        new_bytes: int,
        *,
        slots: int = 1,
        keep: Collection[Part] = (),
        whole: bool = False,
    ) -> list[int] | None:
        """Which candidates must be evicted to make this much fit; nothing is changed.

        Parameters
        ----------
        candidates
            Parts of models that may go, the first to go first.
        new_bytes, slots
            What is wanted.
        keep
            Parts that stay whichever models go: the new model needs them too.
        whole
            As for :meth:`fits`.

        Returns
        -------
        list of int or None
            Indices into the candidates, empty if there is room; None if even all of them together are not
            enough. An early candidate that turns out not to help is spared.
        """
        trial = _Trial(self, new_bytes, slots, keep, self.budget_bytes if whole else self.limit_bytes)
        chosen: list[int] = []
        for index, parts in enumerate(candidates):
            if trial.fits():
                break
            chosen.append(index)
            trial.without(parts)
        if not trial.fits():
            return None
        # The last one is needed. Of the others spare the most recently used first.
        for index in reversed(chosen[:-1][-MAX_SPARING:]):
            trial.keep(candidates[index])
            if trial.fits():
                chosen.remove(index)
            else:
                trial.without(candidates[index])
        return chosen

    # -- what the device really takes

    def lower(self) -> None:
        """The device refused a load until a model was evicted: it seems that no more fits than what is there
        now.
        """
        self.limit_bytes = self.held_bytes + self.reserved_bytes
        self._steps_left = RAISING_STEPS

    def restore(self) -> bool:
        """Try the whole budget again; returns whether that is more than before."""
        lowered, self._steps_left, self.limit_bytes = self.limit_bytes, 0, self.budget_bytes
        return lowered != self.budget_bytes

    def raise_again(self) -> None:
        """A load was placed: raise the limit one step towards the budget."""
        if not self._steps_left:
            return
        self._steps_left -= 1
        if not self._steps_left or self.limit_bytes is None or self.budget_bytes is None:
            self._steps_left, self.limit_bytes = 0, self.budget_bytes
        else:
            self.limit_bytes += (self.budget_bytes - self.limit_bytes) // (self._steps_left + 1)

    # -- changing

    def reserve(self, new_bytes: int) -> Reservation:
        """Set a slot and bytes aside; they must fit."""
        assert self.fits(1, new_bytes), "reserve() without room"
        self.slots_taken += 1
        self.reserved_bytes += new_bytes
        return Reservation(new_bytes)

    def grow(self, reservation: Reservation, new_bytes: int) -> bool:
        """Set more bytes aside for a load that turned out larger; False, and no change, without room."""
        more = new_bytes - reservation.bytes
        if more > 0 and not self._bytes_fit(more):
            return False
        self.reserved_bytes += more
        reservation.bytes = new_bytes
        return True

    def settle(self, reservation: Reservation, parts: Mapping[Part, int]) -> None:
        """The load ended: its slot stays taken, and what it really holds counts instead of the claim."""
        assert reservation.open, "a reservation ends once"
        assert self.missing_bytes(parts) <= reservation.bytes, "settle() for more than was reserved"
        reservation.open = False
        self.reserved_bytes -= reservation.bytes
        self.hold(parts)

    def cancel(self, reservation: Reservation) -> None:
        """The load failed: slot and bytes are free again."""
        assert reservation.open, "a reservation ends once"
        reservation.open = False
        self.reserved_bytes -= reservation.bytes
        self.slots_taken -= 1

    def hold(self, parts: Mapping[Part, int]) -> None:
        """One more holder of each part, without a slot."""
        for part, size in parts.items():
            holders = self._holders.get(part, 0)
            self._holders[part] = holders + 1
            if not holders:
                self._sizes[part] = size
                self.held_bytes += size

    def hold_present(self, parts: Iterable[Part]) -> dict[Part, int]:
        """One more holder of those parts that are there; returns them with their sizes."""
        present = {part: self._sizes[part] for part in parts if part in self._holders}
        self.hold(present)
        return present

    def drop(self, parts: Iterable[Part]) -> None:
        """One holder less of each part; bytes of those that nobody holds any more are free."""
        for part in parts:
            self._holders[part] -= 1
            if not self._holders[part]:
                del self._holders[part]
                self.held_bytes -= self._sizes.pop(part)

    def free_slot(self) -> None:
        """A model went."""
        self.slots_taken -= 1

    def _bytes_fit(self, new_bytes: int, *, whole: bool = False) -> bool:
        limit = self.budget_bytes if whole else self.limit_bytes
        return limit is None or self.held_bytes + self.reserved_bytes + new_bytes <= limit


class _Trial:
    """What would be free if some models were evicted; only a trial, nothing is changed."""

    def __init__(
        self, ledger: Ledger, new_bytes: int, slots: int, keep: Collection[Part], limit: int | None
    ) -> None:
        self._ledger = ledger
        self._limit = limit
        self._keep = keep
        self._slots_short = ledger.slots_taken + slots - ledger.slots
        self._wanted = ledger.held_bytes + ledger.reserved_bytes + new_bytes
        self._drops: Counter[Part] = Counter()

    def fits(self) -> bool:
        return self._slots_short <= 0 and (self._limit is None or self._wanted <= self._limit)

    def without(self, parts: Collection[Part]) -> None:
        self._slots_short -= 1
        for part in parts:
            self._drops[part] += 1
            if self._drops[part] == self._ledger._holders[part] and part not in self._keep:
                self._wanted -= self._ledger._sizes[part]

    def keep(self, parts: Collection[Part]) -> None:
        self._slots_short += 1
        for part in parts:
            if self._drops[part] == self._ledger._holders[part] and part not in self._keep:
                self._wanted += self._ledger._sizes[part]
            self._drops[part] -= 1
