"""What a real Prometheus reads of a platform under load: names that it takes, sums that agree with everybody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.debian import program

from flatshare_registry.testing.ports import free_ports

from .conftest import FLATSHARE, MODEL, Platform, random_rows

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "platform/deploy/dashboard.json"


def leases(text: str) -> float:
    return summed(text, "flatshare_leases")


def summed(text: str, family: str, ending: str = "_total", **labels: str) -> float:
    """The sum of a family's samples of that ending, and with those labels."""
    families = {one.name: one for one in text_string_to_metric_families(text)}
    return sum(
        sample.value
        for sample in families[family].samples
        if sample.name == family + ending and labels.items() <= sample.labels.items()
    )


@pytest.fixture(scope="module")
def tenants(platform: Platform) -> list[str]:
    names = [f"counted-{number}" for number in range(5)]
    for number, name in enumerate(names):
        platform.add(name, 300 + number)
    return names


def test_sums_are_those_of_replicas_and_of_the_client(platform: Platform, tenants: list[str]) -> None:
    page = platform.http.get(f"{platform.url}/admin/metrics").raise_for_status().text
    before = leases(page)
    shown = platform.fleet()["totals"]["requests"]
    assert before == shown
    ran = subprocess.run(
        [FLATSHARE, "bench", "--tenants", ",".join(tenants), "--requests", "300", "--url", platform.url, "--json"],
        env=platform.environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    report = json.loads(ran.stdout)
    assert (report["requests"], report["errors"]) == (300, 0)
    said = platform.http.get(f"{platform.url}/admin/metrics").text
    after = leases(said)
    for family, ending, labels in (
        ("flatshare_requests", "_total", {"status": "200"}),
        ("flatshare_request_seconds", "_count", {}),
        ("flatshare_request_seconds", "_bucket", {"le": "+Inf"}),
    ):
        assert summed(said, family, ending, **labels) - summed(page, family, ending, **labels) == 300, family
    assert after - before == sum(report["hits"].values()) == 300
    # Each replica says the same at its own door, where service discovery finds it.
    doors = platform.http.get(f"{platform.url}/admin/metrics/targets").raise_for_status().json()
    pages = [door_metrics(platform, door).raise_for_status().text for door in doors]
    assert len(pages) == 2 and sum(map(leases, pages)) == leases(said)
    assert httpx.get(f"http://{doors[0]['targets'][0]}/-/metrics").status_code == 401
    key = platform.key(tenants[0])
    forbidden = httpx.get(f"http://{doors[0]['targets'][0]}/-/metrics", headers={"x-api-key": key})
    assert forbidden.status_code == 403
    assert platform.http.get(f"{platform.url}/-/metrics").status_code == 404, "not through the edge"
    assert httpx.get(f"{platform.url}/admin/metrics").status_code == 401


def door_metrics(platform: Platform, door: dict[str, Any]) -> httpx.Response:
    (address,) = door["targets"]
    return platform.http.get(f"http://{address}{door['labels']['__metrics_path__']}")


def test_errors_are_counted_by_their_code(platform: Platform, tenants: list[str]) -> None:
    before = platform.http.get(f"{platform.url}/admin/metrics").text
    refused = platform.predict("nobody-at-all", random_rows(1))
    failed = platform.http.post(f"{platform.url}/predict", content=b"{", headers={MODEL: tenants[0]})
    assert (refused.status_code, failed.status_code) == (404, 400)
    for reply in (refused, failed):
        code = reply.json()["error"]["code"]
        assert reply.headers["x-flatshare-code"] == code
        now = platform.http.get(f"{platform.url}/admin/metrics").text
        grown = summed(now, "flatshare_request_errors", code=code)
        was = summed(before, "flatshare_request_errors", code=code) if "request_errors" in before else 0
        assert grown - was == 1


def test_usage_is_what_the_client_was_answered(platform: Platform) -> None:
    names = [f"billed-{number}" for number in range(3)]
    for number, name in enumerate(names):
        platform.add(name, 330 + number)
    for number in range(20):
        assert platform.predict(names[number % 3], random_rows(3)).status_code == 200
    wanted = {"billed-0": (7, 21), "billed-1": (7, 21), "billed-2": (6, 18)}
    deadline = time.monotonic() + 30
    while {name: count for name, count in used(platform).items() if name in names} != wanted:
        assert time.monotonic() < deadline, used(platform)
        time.sleep(0.5)  # replicas write by their own clock
    compared = subprocess.run(
        [FLATSHARE, "versions", names[0], "--compare", "--json"],
        env=platform.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    (version,) = json.loads(compared.stdout)["versions"]
    assert sum(version["labels"]) == version["rows"] and version["seconds"] > 0


def used(platform: Platform) -> dict[str, tuple[int, int]]:
    """Requests and rows by tenant, by `flatshare usage`."""
    ran = subprocess.run(
        [FLATSHARE, "usage", "--since", "1h", "--json"],
        env=platform.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return {one["tenant"]: (one["requests"], one["rows"]) for one in json.loads(ran.stdout)["tenants"]}


def test_a_real_prometheus_scrapes_it(platform: Platform, tenants: list[str], tmp_path: Path) -> None:
    (port,) = free_ports(1)
    found = Path(program("prometheus", "prometheus", tmp_path))
    environment = {**platform.environment, "PATH": f"{found.parent}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, ROOT / "scripts/observe.py", "--url", platform.url, "--port", str(port), "--interval", "1s"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        rows, deadline = random_rows(1), time.monotonic() + 60
        while True:  # a rate needs two scrapes with requests between
            assert time.monotonic() < deadline and running.poll() is None, (tmp_path / "log").read_text()[
                -2000:
            ]
            for name in tenants:
                platform.predict(name, rows)
            rate = asked(port, "sum(rate(flatshare_leases_total[30s]))")
            if rate and float(rate[0]["value"][1]) > 0:
                break
            time.sleep(0.2)  # Prometheus scrapes by its own clock
        assert len(asked(port, "flatshare_replica_info")) == 2
        assert asked(port, 'flatshare_replicas{state="RUNNING"}')[0]["value"][1] == "2"
        assert asked(port, "histogram_quantile(0.5, sum by (le) (flatshare_load_seconds_bucket))")
        rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        silent = dict(panels())
        while silent:  # each query of each panel gives something, once two scrapes lie within its window
            assert time.monotonic() < deadline, silent
            unloaded = platform.http.post(f"{platform.url}/admin/unload", json={"model": tenants[0]})
            unloaded.raise_for_status()
            for name in tenants:  # one of them is loaded anew
                platform.predict(name, rows)
            for panel, query in list(silent.items()):
                found = asked(port, query.replace("$__rate_interval", "30s"))
                if any(one["value"][1] != "NaN" for one in found):
                    del silent[panel]
            time.sleep(0.2)  # Prometheus scrapes by its own clock
        assert len(rules) == 12 and all(rule["health"] in ("ok", "unknown") for rule in rules), rules
    finally:
        running.terminate()
        assert running.wait(20) == 0


def panels() -> Iterator[tuple[str, str]]:
    """Every query of the dashboard, by its panel and number."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for number, target in enumerate(panel.get("targets", ())):
            yield f"{panel['title']} {number}", target["expr"]


def asked(port: int, query: str) -> list[dict[str, list[str]]]:
    """What Prometheus answers; nothing while it starts."""
    try:
        reply = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=10)
        found: list[dict[str, list[str]]] = reply.json()["data"]["result"]
    except (httpx.TransportError, ValueError, KeyError):
        return []
    return found
