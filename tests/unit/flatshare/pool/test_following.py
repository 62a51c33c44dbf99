"""A replica follows settings that were changed: looks never pile up, and one that fails is made again."""

from __future__ import annotations

import asyncio
import threading

import pytest

from flatshare.pool.following import SettingsFollower
from flatshare.pool.kept import Deployed
from flatshare.settings import Settings


async def test_looks_do_not_pile_up_while_the_cluster_hangs() -> None:
    looks: list[int] = []
    go = threading.Event()
    taken: list[int] = []

    def recall() -> Deployed:
        looks.append(len(looks))
        go.wait(10)
        return Deployed(Settings(), None, {}, revision=len(looks))

    follower = SettingsFollower(lambda _, revision: taken.append(revision), recall)
    first = follower.follow()
    assert follower.follow() is first
    told = asyncio.create_task(follower.now())
    go.set()
    await asyncio.wait_for(told, 10)
    assert (looks, taken) == ([0, 1], [1, 2]), "who is told of a change looks after the look under way"


async def test_a_look_that_fails_is_made_again() -> None:
    answers: list[Deployed | Exception | None] = [
        RuntimeError("GCS"),
        None,
        Deployed(Settings(), None, {}, 3),
    ]
    taken: list[int] = []

    def recall() -> Deployed | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    follower = SettingsFollower(lambda _, revision: taken.append(revision), recall)
    with pytest.raises(RuntimeError):
        await follower.now()
    await follower.now()
    assert taken == [], "nothing was deployed: nothing changes"
    await follower.now()
    assert taken == [3]
