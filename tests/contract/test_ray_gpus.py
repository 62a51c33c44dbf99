"""Fractions of a GPU on Ray, with a faked resource: what Ray does with them, and what is refused before it has to.

In a process of its own: a cluster with GPUs is no other test's.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, os, time
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
import ray
from flatshare.errors import SettingsError
from flatshare.pool.gpus import check_gpus, check_visible

ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
found = {}
check_gpus(4, 0.25)
check_gpus(1, 1)
check_gpus(50, 0)
began = time.monotonic()
try:
    check_gpus(5, 0.25)
except SettingsError as error:
    found["refused"] = error.message
found["took_s"] = time.monotonic() - began

@ray.remote(num_cpus=0.1, num_gpus=0.25)
class Replica:
    def where(self):
        check_visible(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        return [ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")]

replicas = [Replica.remote() for _ in range(4)]
found["four"] = ray.get([one.where.remote() for one in replicas])
fifth = Replica.remote().where.remote()
found["fifth_is_placed"] = bool(ray.wait([fifth], timeout=2)[0])
try:
    check_gpus(1, 0.25)
except SettingsError as error:
    found["taken"] = error.message
print(json.dumps(found))
ray.shutdown()
"""


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_four_quarters_of_a_gpu_are_placed_on_it(found: dict[str, object]) -> None:
    assert found["four"] == [[[0], "0"]] * 4
    assert found["fifth_is_placed"] is False, "Ray waits, and says nothing: so it is refused before"


def test_a_fifth_quarter_is_refused_at_once_with_what_fits(found: dict[str, object]) -> None:
    assert float(str(found["took_s"])) < 2
    refused = str(found["refused"])
    assert refused.startswith("5 replicas of 0.25 GPU do not fit: this cluster has 1 GPUs on 1 nodes")
    assert "room for 4" in refused and "replicas=4 or less" in refused


def test_what_others_have_taken_counts(found: dict[str, object]) -> None:
    assert "0 of them free, which is room for 0" in str(found["taken"])
