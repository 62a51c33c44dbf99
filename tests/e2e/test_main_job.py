"""The main job through everything real: register, promote, predict, roll back, see who holds what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import requests
from PIL import Image
from safetensors.torch import save

from flatshare.bench.load import Load, send_all
from flatshare.bench.workload import BenchRequest, encode_json

from .conftest import MODEL, NETWORK, Platform, processes_of, random_rows


def test_register_promote_predict_and_roll_back(platform: Platform, tmp_path: Path) -> None:
    rows = random_rows(8)
    platform.add("acme", 1)
    reply = platform.predict("acme", rows)
    assert reply.json() == {"predicted_label": platform.right("acme@1", rows)}
    assert (reply.headers["x-flatshare-tenant"], reply.headers["x-flatshare-version"]) == ("acme", "1")

    # The second version by the CLI, as a training job would.
    import torch

    torch.manual_seed(2)
    module = platform.modules["acme@2"] = NETWORK.build()
    file = tmp_path / "second.safetensors"
    file.write_bytes(save(dict(module.state_dict())))
    registered = platform.cli_json("register", "acme", str(file), "--url", platform.url)
    assert (registered["ref"], registered["created"]) == ("acme@2", True)
    assert platform.predict("acme", rows).headers["x-flatshare-version"] == "1"
    assert platform.predict("acme@2", rows).json() == {"predicted_label": platform.right("acme@2", rows)}

    said = platform.cli("promote", "acme@2", "--url", platform.url).stdout
    assert "2 replicas see it now" in said
    for _ in range(20):  # at once, on whichever replica
        promoted = platform.predict("acme", rows)
        assert promoted.headers["x-flatshare-version"] == "2"
        assert promoted.json() == {"predicted_label": platform.right("acme@2", rows)}
        assert promoted.headers["x-flatshare-digest"] == registered["digest"]

    platform.cli("rollback", "acme", "--url", platform.url)
    for _ in range(20):
        assert platform.predict("acme", rows).headers["x-flatshare-version"] == "1"
    actions = [entry["action"] for entry in platform.cli_json("audit", "acme")]
    assert actions == [
        "tenant.created",
        "version.registered",
        "version.registered",
        "alias.set",
        "alias.rolled-back",
    ]


def test_the_notebooks_client(platform: Platform) -> None:
    platform.add("notebook", 3)
    images = random_rows(2)
    url = f"{platform.url}/"
    headers = {MODEL: "notebook", "authorization": f"Bearer {platform.key('notebook')}"}
    # Verbatim from the notebook, with the headers added.
    json_request = json.dumps({"image": images.tolist()})
    response = requests.post(url, json=json_request, headers=headers)
    assert response.json()["predicted_label"] == platform.right("notebook@1", images)
    response = requests.post(url + "predict", json={"image": images.tolist()}, headers=headers)
    assert response.json()["predicted_label"] == platform.right("notebook@1", images)


def test_more_tenants_than_slots_and_every_answer_right(platform: Platform) -> None:
    for number in range(9):
        platform.add(f"many-{number}", 100 + number)
    rows = random_rows(40)
    expected = {n: platform.right(f"many-{n}@1", rows) for n in range(9)}
    random = np.random.default_rng(0)
    before = platform.fleet()["totals"]

    def shots() -> object:
        for _ in range(400):
            tenant, row = int(random.integers(9)), int(random.integers(40))
            yield BenchRequest(f"many-{tenant}", encode_json(rows[row : row + 1]), (expected[tenant][row],))

    outcomes = asyncio.run(
        send_all(
            f"{platform.url}/predict", shots(), Load(requests=400, concurrency=12, headers=platform.admin)
        )
    )  # type: ignore[arg-type]  # a generator
    assert [one.code for one in outcomes if one.code != "ok"] == []
    assert all(one.right for one in outcomes)
    after = platform.fleet()
    assert after["totals"]["evictions"] > before["evictions"]
    assert all(one["slots_used"] <= one["slots"] for one in after["replicas"])
    # Client and servers count the same hits.
    seen = {tier: sum(one.tier == tier for one in outcomes) for tier in ("device", "host", "store")}
    counted = {tier: after["totals"]["hits"][tier] - before["hits"][tier] for tier in seen}
    assert seen == counted


def test_unknown_tenants_get_404_and_evict_nothing(platform: Platform) -> None:
    for number in range(3):
        platform.add(f"keep-{number}", 200 + number)
        platform.predict(f"keep-{number}", random_rows(1))
    held, loads = platform.residents(), platform.fleet()["totals"]["loads"]
    for number in range(60):
        model = ["nobody", f"junk-{number}", "keep-0@99", "keep-0:canary"][number % 4]
        reply = platform.predict(model, random_rows(1))
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    assert platform.predict("Bad_Id!", random_rows(1)).json()["error"]["code"] == "invalid_model_ref"
    assert platform.residents() == held
    assert platform.fleet()["totals"]["loads"] == loads


def test_replicas_name_the_models_of_the_last_requests_where_their_replies_said(platform: Platform) -> None:
    platform.add("where", 300)
    replica = platform.predict("where", random_rows(1)).headers["x-flatshare-replica"]
    fleet = platform.cli_json("replicas", "--url", platform.url)
    (found,) = [one for one in fleet["replicas"] if one["replica"] == replica]
    assert found["state"] == "RUNNING"
    model = found["models"][0]
    assert (model["tenant"], model["version"], model["leases"]) == ("where", 1, 0)
    # Promise 8: what Ray is told is what is held.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        fleet = platform.fleet()
        if all(
            {f"{m['tenant']}@{m['version']}" for m in one["models"]}
            == {ref for ref in one["advertised"] if "@" in ref}
            for one in fleet["replicas"]
        ):
            break
    else:
        raise AssertionError("advertised and held models differ")
    (found,) = [one for one in fleet["replicas"] if one["replica"] == replica]
    assert {"where", "where@1"} <= set(found["advertised"])


def test_images_by_the_cli(platform: Platform, tmp_path: Path) -> None:
    platform.add("pictures", 400)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    files = []
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    answer = platform.cli_json("predict", "pictures", *files, "--url", platform.url)
    assert answer["predicted_label"] == platform.right("pictures@1", NETWORK.preprocess(pixels))
    assert answer["version"] == "1"


def test_header_hygiene_and_limits_at_the_edge(platform: Platform) -> None:
    platform.add("edge", 500)
    rows = random_rows(1)
    # A client must not be able to switch Serve's time-outs or routing.
    reply = platform.http.post(
        f"{platform.url}/predict",
        json={"image": rows.tolist()},
        headers={MODEL: "edge", "x-request-timeout-seconds": "0.000001", "x-serve-router-x": "y"},
    )
    assert reply.status_code == 200
    assert (
        platform.http.post(
            f"{platform.url}/predict", content=b"x", headers={MODEL: "edge", "x-request-id": "mine-1"}
        ).json()["error"]["request_id"]
        == "mine-1"
    )
    huge = platform.http.post(
        f"{platform.url}/predict", content=b"x" * (9 * 1024**2), headers={MODEL: "edge"}
    )
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "too_large")

    def chunks() -> object:
        for _ in range(9):
            yield b"x" * 1024**2

    chunked = platform.http.post(f"{platform.url}/predict", content=chunks(), headers={MODEL: "edge"})  # type: ignore[arg-type]  # a generator
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "too_large")
    ids = platform.http.get(f"{platform.url}/nope").headers.get_list("x-request-id")
    assert len(ids) == 1


def test_every_listener_is_on_loopback(platform: Platform) -> None:
    family = {one.pid for one in processes_of(platform)}
    listening = [c for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in family]
    assert any(c.laddr.port == platform.port for c in listening)
    ours = [c for c in listening if c.laddr.port in range(30000, 31001) or c.laddr.port == platform.port]
    assert len(ours) >= 4  # edge, two replicas, control plane
    assert {c.laddr.ip for c in ours} == {"127.0.0.1"}


def test_a_replica_killed_under_load_costs_no_request(platform: Platform) -> None:
    for number in range(4):
        platform.add(f"steady-{number}", 600 + number)
    rows = random_rows(16)
    expected = {n: platform.right(f"steady-{n}@1", rows) for n in range(4)}
    random = np.random.default_rng(1)
    platform.cli("preload", "steady-0", "--pin")
    victim = platform.fleet()["replicas"][0]["pid"]
    killed = threading.Event()

    def shots() -> object:
        for number in range(1500):
            if number == 300:
                psutil.Process(victim).kill()
                killed.set()
            tenant, row = int(random.integers(4)), int(random.integers(16))
            yield BenchRequest(f"steady-{tenant}", encode_json(rows[row : row + 1]), (expected[tenant][row],))

    outcomes = asyncio.run(
        send_all(
            f"{platform.url}/predict", shots(), Load(requests=1500, concurrency=8, headers=platform.admin)
        )
    )  # type: ignore[arg-type]  # a generator
    assert killed.is_set()
    failed = [(one.status, one.code) for one in outcomes if one.status != 200]
    assert failed == []
    assert all(one.right for one in outcomes)
    wait_for_replicas(platform, 2)
    # The new one pins what the fleet has pinned, without being asked for it.
    deadline = time.monotonic() + 30
    while (pinned := pins(platform)) != [{"steady-0"}, {"steady-0"}]:
        assert time.monotonic() < deadline, pinned
        threading.Event().wait(0.2)  # a load shows only by asking
    assert victim not in [one["pid"] for one in platform.fleet()["replicas"]]
    platform.cli("unpin", "steady-0")
    assert pins(platform) == [set(), set()]


def test_settings_change_in_place_and_hold_in_what_starts_later(platform: Platform) -> None:
    platform.add("metered", 700)
    rows = random_rows(1)
    changed = platform.cli_json("settings", "set", 'plans={"slow": {"requests_per_s": 0.001, "burst": 2}}')
    assert len(changed["refreshed"]) == 2 and changed["missed"] == []
    platform.cli("quotas", "set", "metered", "--plan", "slow")
    codes = [platform.predict("metered", rows).status_code for _ in range(4)]
    assert codes == [200, 200, 429, 429]
    victims = [one["pid"] for one in platform.fleet()["replicas"]]
    victims += [one.pid for one in processes_of(platform) if "ControlPlane" in " ".join(one.cmdline())]
    assert len(victims) == 3
    for pid in victims:
        psutil.Process(pid).kill()
    wait_for_replicas(platform, 2)
    fleet = platform.fleet()
    assert (
        [one["settings_revision"] for one in fleet["replicas"]] == [fleet["settings_revision"]] * 2 != [0, 0]
    )
    assert not set(victims) & {one["pid"] for one in fleet["replicas"]}
    codes = [platform.predict("metered", rows).status_code for _ in range(4)]
    assert codes == [200, 200, 429, 429], "its buckets are new, and as large as the plan says"
    platform.cli("settings", "set", "plans={}")
    assert platform.predict("metered", rows).status_code == 200


def pins(platform: Platform) -> list[set[str]]:
    """Tenants whose models are pinned, by replica."""
    return [
        {model["tenant"] for model in replica["models"] if model["pinned"]}
        for replica in platform.fleet()["replicas"]
    ]


def wait_for_replicas(platform: Platform, count: int) -> None:
    """Until so many run again (Serve replaces a dead one at its next health check)."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):  # the control plane may have been killed, too
            reply = platform.http.get(f"{platform.url}/admin/replicas", timeout=30)
            if reply.status_code == 200:
                running = [one for one in reply.json()["replicas"] if one["state"] == "RUNNING"]
                if len(running) == count and not reply.json()["not_answering"]:
                    return
        threading.Event().wait(0.2)  # readiness shows only by asking
    raise AssertionError(f"no {count} replicas after 60 s")
