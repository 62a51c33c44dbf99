"""What homes and scaling rely on in Ray Serve 2.60: ranks, numbers from outside, who goes first, a value that stays.

In a process of its own: a cluster is no other test's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

CODE = """
import json, os, signal, time
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
import ray
from ray import serve
from flatshare.pool import kept, scaling
from flatshare.api.identity import OperatorKeys
from flatshare.settings import Settings
from flatshare.pool.details import replica_states
from flatshare.pool.controller import read_details

ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
         _node_ip_address="127.0.0.1")
serve.start(proxy_location="Disabled")

@serve.deployment(name="Pool", num_replicas=3, ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_wait_loop_s=0.1,
                  health_check_period_s=0.5)
class Pool:
    def record_replica_metadata(self):
        return {"place": serve.get_replica_context().rank.rank}
    def where(self):
        return [serve.get_replica_context().rank.rank, os.getpid(), serve.get_replica_context().replica_id.unique_id]

handle = serve.run(Pool.bind(), name="app", route_prefix=None, external_scaler_enabled=True)
scaler = scaling.ServeScaler("app", "Pool")

def where():
    return sorted(handle.broadcast("where").results(timeout_s=10))

def until(done):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if done():
                return
        except Exception:
            pass
        time.sleep(0.05)
    raise SystemExit("not reached")

def settled(count):
    return [rank for rank, _, _ in where()] == list(range(count)) and len(
        replica_states(read_details(), "app", "Pool")) == count

found = {"wanted": scaler.wanted()}
before = where()
found["ranks"] = [rank for rank, _, _ in before]
os.kill(before[1][1], signal.SIGKILL)
until(lambda: settled(3) and before[1][2] not in [name for _, _, name in where()])
after = where()
found["kept"] = [before[0][2] == after[0][2], before[2][2] == after[2][2]]
found["newest_is_the_replacement"] = scaler.newest() == after[1][2]
scaler.scale(2)
until(lambda: settled(2))
found["after_shrink"] = [name for _, _, name in where()] == [after[0][2], after[2][2]]
scaler.scale(0)
until(lambda: replica_states(read_details(), "app", "Pool") == [])
found["zero"] = scaler.wanted()
found["newest_of_none"] = scaler.newest()
began = time.monotonic()
scaler.scale(1)
until(lambda: settled(1))
found["from_zero_s"] = time.monotonic() - began
found["recalled_before"] = [kept.recall_bounds(), kept.recall_deployed()]
kept.remember_bounds(0, 5)
kept.remember_bounds(1, 6)
plans = {"default": {"requests_per_s": 50, "resident_bytes": 5e7}}
deployed = kept.Deployed(Settings(slots=7, plans=plans, max_replicas=3), OperatorKeys({"id": "digest"}), {"A": "b"})
kept.remember_deployed(deployed)
found["recalled"] = kept.recall_bounds()
found["moved"] = [kept.recall_moved(), kept.remember_moved({"acme": 1}), kept.recall_moved()]
found["key"] = [kept.shared_peer_key(one).decode() for one in (b"first", b"second")]
kept.forget()
found["key"].append(kept.shared_peer_key(b"third").decode())
kept.remember_deployed(deployed)
found["same"] = kept.recall_deployed() == deployed
kept.change_deployed(lambda now: now.model_copy(update={"tenant_share": 0.5}))
changed = kept.recall_deployed()
found["changed"] = [changed.revision, changed.settings.tenant_share, changed.settings.slots]
end_of = where()[0]
scaler.end(end_of[2])
until(lambda: settled(1) and where()[0][2] != end_of[2])
found["ended"] = where()[0][0]
serve.shutdown()
ray.shutdown()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_ranks_are_the_numbers_from_0_and_a_replacement_takes_its_predecessors(found: dict[str, Any]) -> None:
    assert found["ranks"] == [0, 1, 2]
    assert found["kept"] == [True, True]


def test_the_newest_goes_first_and_who_is_beyond_the_end_takes_its_rank(found: dict[str, Any]) -> None:
    assert found["newest_is_the_replacement"] is True
    assert found["after_shrink"] is True, "as placement.handover.after_loss says"


def test_the_number_is_set_from_outside_down_to_none_and_back(found: dict[str, Any]) -> None:
    assert (found["wanted"], found["zero"], found["newest_of_none"]) == (3, 0, None)
    assert found["from_zero_s"] < 20


def test_a_replica_is_ended_by_its_name_and_replaced(found: dict[str, Any]) -> None:
    assert found["ended"] == 0, "at its place"


def test_the_first_key_is_the_pools_for_as_long_as_the_cluster_lives(found: dict[str, Any]) -> None:
    assert found["key"] == ["first", "first", "first"], "replicas of the one before may still run"


def test_what_an_operator_allowed_is_kept_by_the_cluster(found: dict[str, Any]) -> None:
    assert (found["recalled_before"], found["recalled"]) == ([None, None], [1, 6])
    assert found["same"] is True
    assert found["changed"] == [1, 0.5, 7], "what was not named stays"
    assert found["moved"] == [{}, None, {"acme": 1}]
