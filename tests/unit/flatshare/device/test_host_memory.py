"""A pass uses the memory of the one before it: the kernel is not asked for it again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PASSES = """
import asyncio, resource, sys
import numpy as np
from safetensors.torch import save
from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.device.cpu import CpuDevice
from flatshare.device.host_memory import keep_freed_memory
from flatshare.models.architecture import architecture
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
network, store = architecture("mnist-cnn"), MemoryStore()
registry = Registry(store)
registry.create_tenant(TenantId("acme"))
registry.register(TenantId("acme"), save(dict(network.build().state_dict())), network.name, network.tensors)
rows = np.zeros((64, 1, 28, 28), np.float32)
async def main():
    replica = Replica.build(Settings(host_dir="off"), store, device=CpuDevice())
    async def ask():
        with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse("acme")) as ticket:
            await replica.service.predict(ticket, lambda network: rows.copy())
    async def passes(count):
        for _ in range(count // 4):
            await asyncio.gather(*(ask() for _ in range(4)))
    await passes(8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    await passes(40)
    print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    await replica.close()
asyncio.run(main())
"""


def faults(mode: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and pages that the kernel gave to 40 passes of 64 images."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PASSES, mode], capture_output=True, text=True, env={**plain, **environment}
    )
    assert done.returncode == 0, done.stderr
    kept, pages = map(int, done.stdout.split())
    return bool(kept), pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_passes_do_not_have_their_memory_mapped_again() -> None:
    kept, with_it = faults("keep")
    _, without = faults("plain")
    assert kept
    assert with_it < without / 4


def test_what_the_operator_says_of_the_allocator_stands() -> None:
    assert faults("keep", MALLOC_ARENA_MAX="8")[0] is False
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=8")[0] is False
