"""What a replica that starts does about the fleet's pins."""

from __future__ import annotations

import pytest

from flatshare.errors import NoRoom
from flatshare.replica.pins import restore_pins
from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.ids import ModelRef

REFS = [ModelRef.parse(text) for text in ("acme", "globex@2", "initech:canary")]


class Replica:
    """Fails for a ref as often as it is told to."""

    def __init__(self, **failures: list[Exception]) -> None:
        self.failures = failures
        self.asked: list[str] = []
        self.pinned: set[str] = set()

    async def pin(self, ref: str) -> None:
        self.asked.append(ref)
        planned = self.failures.get(ref.partition("@")[0].partition(":")[0])
        if planned:
            raise planned.pop(0)
        self.pinned.add(ref)

    async def unpin(self, ref: str) -> None:
        if ref not in self.pinned:
            raise NotFound(f"there is no {ref}")
        self.pinned.remove(ref)


def reads(*answers: list[ModelRef] | Exception):  # type: ignore[no-untyped-def]  # an async function
    """One answer after the other; the last one again and again."""
    left = list(answers)

    async def read() -> list[ModelRef]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return read


async def test_all_are_pinned_and_one_that_can_not_be_stops_no_other() -> None:
    replica = Replica(globex=[NoRoom("it would leave no slot")])
    await restore_pins(reads(REFS), replica.pin, replica.unpin, retry_s=0)
    assert replica.asked == ["acme", "globex@2", "initech:canary"]
    assert replica.pinned == {"acme", "initech:canary"}


@pytest.mark.parametrize("times", [1, 3])
async def test_a_store_that_is_away_is_asked_again(times: int) -> None:
    away: list[Exception] = [Unavailable("the store does not answer") for _ in range(times)]
    replica = Replica(globex=list(away))
    await restore_pins(reads(*away, REFS), replica.pin, replica.unpin, retry_s=0)
    assert replica.pinned == {"acme", "globex@2", "initech:canary"}
    assert replica.asked.count("acme") == 1, "what is pinned is not loaded again"


async def test_what_is_unpinned_meanwhile_does_not_stay_pinned() -> None:
    replica = Replica(initech=[NotFound("it was deleted")])
    await restore_pins(reads(REFS, REFS[:1]), replica.pin, replica.unpin)
    assert replica.pinned == {"acme"}
