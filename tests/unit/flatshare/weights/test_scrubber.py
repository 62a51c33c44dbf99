"""``weights/scrubber.py``: files of the host tier that are not what they were are found, told and fetched anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare.weights.device_loader import PROOF_S
from flatshare.weights.host_tier import HostTier
from flatshare.weights.scrubber import LOOK_S, ROUND_S, HostScrubber
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock

NETWORK = architecture("mnist-cnn")


def publish(tier: HostTier, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    writer = tier.writer(digest, len(data))
    assert writer is not None
    assert writer.write(memoryview(data))
    writer.publish()
    return digest


def flip(path: Path) -> None:
    """One bit, as a bad memory cell would: the file's name and mode stay."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(7)
        byte = file.read(1)[0]
        file.seek(7)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o400)


@pytest.fixture
def tier(tmp_path: Path) -> HostTier:
    return HostTier(tmp_path / "host", 10 * 1024**2)


def round_of(scrubber: HostScrubber, clock: ManualClock, files: int) -> None:
    for _ in range(files):
        clock.advance(ROUND_S)
        scrubber.step()


def test_a_damaged_file_is_found_removed_and_told(tier: HostTier) -> None:
    digests = sorted(publish(tier, bytes([number]) * 5000) for number in range(3))
    told: list[str] = []
    clock = ManualClock(0.0)
    scrubber = HostScrubber(tier, told.append, clock=clock)
    round_of(scrubber, clock, 3)
    assert (told, tier.digests(), tier.usage().scrubbed) == ([], digests, 3)
    flip(tier.path(digests[1]))
    round_of(scrubber, clock, 4)  # and one step more to see the mark
    assert told == [digests[1]]
    assert tier.digests() == [digests[0], digests[2]]
    assert tier.usage().damaged == 1
    round_of(scrubber, clock, 4)
    assert told == [digests[1]], "once"


def test_every_replica_of_the_node_is_told_and_one_hashes(tier: HostTier, tmp_path: Path) -> None:
    digest = publish(tier, b"x" * 5000)
    other = HostTier(tmp_path / "host", 10 * 1024**2)
    clock = ManualClock(0.0)
    told: dict[str, list[str]] = {"first": [], "second": []}
    first = HostScrubber(tier, told["first"].append, clock=clock)
    second = HostScrubber(other, told["second"].append, clock=clock)
    first.step()
    second.step()
    assert (tier.scrubbed, other.scrubbed) == (1, 0)
    assert second._due == LOOK_S, "whose turn it is not looks once a second, and not all the time"
    flip(tier.path(digest))
    for _ in range(2):
        clock.advance(ROUND_S)
        first.step()
        second.step()
    assert told == {"first": [digest], "second": [digest]}
    tier.give_scrub_turn(first._turn)  # as the kernel does when its process dies
    publish(other, b"y" * 5000)
    clock.advance(ROUND_S)
    second.step()
    assert other.scrubbed == 1


def test_a_mark_is_told_again_when_the_same_bytes_are_damaged_again(tier: HostTier) -> None:
    told: list[str] = []
    clock = ManualClock(0.0)
    scrubber = HostScrubber(tier, told.append, clock=clock)
    for number in range(1, 3):
        digest = publish(tier, b"x" * 5000)
        flip(tier.path(digest))
        round_of(scrubber, clock, 2)
        assert told == [digest] * number


def test_hashing_takes_its_share_of_a_core_and_no_more(tier: HostTier) -> None:
    for number in range(2):
        publish(tier, bytes([number]) * 5000)
    times = iter([0.0, 0.1, 1.0, 4.9, 5.1, 5.2])
    scrubber = HostScrubber(tier, lambda digest: None, clock=lambda: next(times))
    scrubber.step()  # took 0.1 s: the next is due 5 s after its beginning
    scrubber.step()  # at 1.0
    scrubber.step()  # at 4.9
    assert tier.scrubbed == 1
    scrubber.step()  # at 5.1
    assert tier.scrubbed == 2


def test_an_erased_file_is_no_damage(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = publish(tier, b"x" * 5000)
    real = hashlib.file_digest

    def erased_meanwhile(file: object, name: str) -> object:
        tier.scrub([digest])
        return real(file, name)  # type: ignore[type-var]  # the file that was given

    monkeypatch.setattr(hashlib, "file_digest", erased_meanwhile)
    assert not tier.is_damaged(digest)
    assert tier.damage_marks() == {}


@pytest.fixture
def registry() -> Registry:
    """One tenant, whose model has a probe."""
    registry = Registry(MemoryStore())
    registry.create_tenant(TenantId("acme"))
    torch.manual_seed(1)
    registry.register(
        TenantId("acme"), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors,
        probe=lambda weights: probe_logits(NETWORK, weights),
    )  # fmt: skip
    return registry


async def labels(replica: Replica, rows: np.ndarray) -> list[float]:
    ref = ModelRef.parse("acme")
    with await replica.service.enter(LOCAL_OPERATOR, ref) as ticket:
        prediction = await replica.service.predict(ticket, lambda network: rows)
    found: list[float] = prediction.logits[0].tolist()
    return found


async def test_a_resident_model_of_a_damaged_file_is_loaded_anew(tmp_path: Path, registry: Registry) -> None:
    """The model that runs maps the file: a bit that flips there is a wrong number in its passes."""
    settings = Settings(slots=2, host_dir=str(tmp_path / "host"), device="cpu")
    replica = Replica.build(settings, registry.store)
    tier = replica.host_tier
    assert tier is not None
    rows = np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32)
    await replica.preload("acme", pin=True)
    right = await labels(replica, rows)
    record = registry.version(TenantId("acme"), 1)
    largest = max(record.tensors, key=lambda one: one.size_bytes).sha256
    flip(tier.path(largest))
    clock = ManualClock(0.0)
    scrubber = HostScrubber(tier, replica.distrust, clock=clock)
    round_of(scrubber, clock, len(tier.digests()) + 1)
    assert tier.damaged == 1
    assert len(replica._reloads) == 1, "it was pinned: it comes back"
    await next(iter(replica._reloads))
    assert [one.pinned for one in replica.cache.snapshot()] == [True]
    assert await labels(replica, rows) == right
    assert not tier.is_damaged(largest), "fetched anew"
    await replica.close()


async def test_a_model_that_comes_back_from_what_is_mapped_is_proven_once_a_minute(
    tmp_path: Path, registry: Registry
) -> None:
    # A tier of 160 MB: the process keeps an eighth of it mapped.
    settings = Settings(slots=2, host_dir=str(tmp_path / "host"), host_bytes=160 * 1024**2, device="cpu")
    clock = ManualClock(0.0)
    replica = Replica.build(settings, registry.store, clock=clock)
    await replica.preload("acme")
    for passed_s, due in ((PROOF_S, False), (1.0, True), (PROOF_S, False), (1.0, True)):
        assert await replica.unload("acme")
        clock.advance(passed_s)
        await replica.preload("acme")
        (resident,) = replica.cache._residency.lendable()
        assert (resident.tier, resident.probe_due) == ("host", due)
    await replica.close()
