"""Mutations: each changes one line that keeps a promise, in a copy of the sources, and must be found.

A promise whose test still passes with the line broken is not tested; this says so and ends with 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flatshare.cli.output import err, print_table

ROOT = Path(__file__).parents[1]
CACHE = "tests/unit/flatshare/cache/test_model_cache.py"


@dataclass(frozen=True)
class Mutation:
    promise: int
    what: str
    file: str
    old: str
    new: str
    test: str


SIGNS = (
    "AssertionError",
    "DID NOT RAISE",
    "assert ",
    "Timeout",
    "IsolationBroken",
    "NoRoom",
    "CancelledError",
)
"""What a test says when it finds a broken promise; a mutation that does not even run says something else."""

MUTATIONS = [
    Mutation(
        1, "what the slot holds is not compared", "platform/flatshare/engine/inference.py",
        "if not job.lease.is_intact(job.same):", "if False:",
        "tests/unit/flatshare/engine/test_inference.py::test_promise_1_a_slot_that_changed_fails_the_request",
    ),
    Mutation(
        1, "rows of different models go through one model", "platform/flatshare/engine/inference.py",
        "blocks.setdefault(job.same, [])", "blocks.setdefault(0, [])",
        "tests/unit/flatshare/engine/test_inference.py::test_promise_1_models_that_share_layers_keep_their_own_heads",
    ),
    Mutation(
        2, "room is made before it is known that the load succeeds", "platform/flatshare/cache/model_cache.py",
        "                prepared = await prepare(record, held)\n",
        "                whole = sum(claimed.values())\n"
        "                self._residency.make_room(record.tenant, whole, slots=1, whole_bytes=whole)\n"
        "                prepared = await prepare(record, held)\n",
        f"{CACHE}::test_promise_2_a_load_that_fails_evicts_nothing",
    ),
    Mutation(
        2, "a model is tried out after room was made for it", "platform/flatshare/cache/loading.py",
        "            self._try_out(network, record, tensors, held)\n", "",
        "tests/unit/flatshare/cache/test_loading.py"
        "::test_promise_2_a_model_that_fails_its_probe_evicts_nothing_on_any_device",
    ),
    Mutation(
        3, "leased models are evicted", "platform/flatshare/cache/residency.py",
        "return not resident.leases and not resident.pinned", "return not resident.pinned",
        f"{CACHE}::test_promise_3_a_leased_model_is_not_freed",
    ),
    Mutation(
        4, "draining bytes do not count", "platform/flatshare/cache/residency.py",
        "        self.leaving[id(resident)] = resident\n",
        "        self.leaving[id(resident)] = resident\n"
        "        self.ledger.drop(resident.parts)\n        self.ledger.hold({})\n",
        f"{CACHE}::test_promise_4_bytes_hold_at_every_instant_also_while_draining",
    ),
    Mutation(
        5, "each caller loads for itself", "platform/flatshare/cache/model_cache.py",
        "        if load is not None:\n            load.check_erased(record)\n        else:\n", "        if True:\n",
        f"{CACHE}::test_promise_5_one_load_for_many_callers",
    ),
    Mutation(
        5, "each replica fetches for itself", "platform/flatshare/cache/host_tier.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            except BlockingIOError:",
        "pass\n            except BlockingIOError:",
        "tests/unit/flatshare/cache/test_host_tier.py::test_one_fetch_at_a_time_and_the_lock_file_goes",
    ),
    Mutation(
        6, "the caller's cancellation reaches the load", "platform/flatshare/cache/model_cache.py",
        "            # Cancelled or timed out, perhaps just after the load handed this waiter its lease.\n",
        "            self._loads[ModelKey.of(record)].task.cancel()\n",
        f"{CACHE}::test_promise_6_a_caller_that_goes_away_does_not_cancel_the_load",
    ),
    Mutation(
        7, "failures are not remembered", "platform/flatshare/cache/failures.py",
        "            known[key] = str(error)", "            pass",
        f"{CACHE}::test_promise_7_failures_are_remembered_for_their_time",
    ),
    Mutation(
        8, "removals are not told", "platform/flatshare/cache/model_cache.py",
        "        self._residency.retire(resident_now, evicted=False)\n        self._on_change()\n",
        "        self._residency.retire(resident_now, evicted=False)\n",
        f"{CACHE}::test_promise_8_every_addition_and_removal_is_told",
    ),
    Mutation(
        8, "removals are not taken out of Ray's wrapper", "platform/flatshare/pool/multiplex.py",
        "            wrapper.models.pop(model_id, None)", "            pass",
        "tests/contract/test_ray_multiplex.py",
    ),
    Mutation(
        9, "what can never fit waits like anything else", "platform/flatshare/cache/residency.py",
        "if budget is not None and size > budget:", "if False:",
        f"{CACHE}::test_promise_9_what_can_never_fit_is_refused_by_name_and_size",
    ),
    Mutation(
        10, "a promoted alias means the new version at once", "platform/flatshare/engine/service.py",
        "        if serving is not None:\n            return serving\n", "",
        "tests/unit/flatshare/cache/test_promotions.py::test_promise_10_no_request_fails_or_waits_for_the_swap",
    ),
    Mutation(
        11, "loads from the node's own files queue behind the store", "platform/flatshare/cache/model_cache.py",
        "record, claimed, load, self._loading_local, self._loader.prepare_local",
        "record, claimed, load, self._loading, self._loader.prepare_local",
        f"{CACHE}::test_promise_11_a_store_that_hangs_does_not_hold_up_the_nodes_own_files",
    ),
    Mutation(
        11, "a store that hangs is asked by one after the other", "platform/flatshare/cache/model_cache.py",
        "if self._clock() < self._store_rests_until:", "if False:",
        "tests/property/test_fault_simulation.py"
        "::test_promise_11_with_a_store_that_hangs_everybody_gets_503_and_nobody_a_hang",
    ),
    Mutation(
        12, "bytes are not compared with their sha256", "platform/flatshare/cache/fetch.py",
        "if self.hasher.hexdigest() != self.tensor.sha256:", "if False:",
        "tests/unit/flatshare/cache/test_loading.py::test_promise_12_every_flipped_bit_of_a_tensor_is_found",
    ),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--promise", type=int, action="append", help="only this one (repeatable)")
    arguments = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    missed = 0
    for mutation in MUTATIONS:
        if arguments.promise and mutation.promise not in arguments.promise:
            continue
        found = is_found(mutation)
        missed += not found
        err.print(f"promise {mutation.promise}: {mutation.what}: {'found' if found else 'NOT FOUND'}")
        rows.append((mutation.promise, mutation.what, "found" if found else "NOT FOUND", mutation.test))
    print_table("", ["promise#", "broken on purpose", "", "test"], rows)
    return 1 if missed else 0


def is_found(mutation: Mutation) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("platform", "registry", "tests"):
            shutil.copytree(ROOT / part, copy / part)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"promise {mutation.promise}: the line to break is not in {mutation.file} any more"
            )
        path.write_text(text.replace(mutation.old, mutation.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "60", "-p", "no:cacheprovider", mutation.test],
            cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": f"{copy / 'platform'}:{copy / 'registry'}"},
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise SystemExit(f"promise {mutation.promise}: pytest could not run:\n{done.stdout[-2000:]}")
        return done.returncode == 1 and any(sign in done.stdout for sign in SIGNS)


if __name__ == "__main__":
    sys.exit(main())
