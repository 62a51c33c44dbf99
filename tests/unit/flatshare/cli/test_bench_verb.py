"""`bench`: whose key is shown, what is said when the servers say nothing, and when it has failed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flatshare.cli.main import app
from flatshare_registry import TenantId
from flatshare_registry.errors import InvalidInput, NotFound
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

TENANTS = ("acme", "globex", "42")
MODEL = "serve_multiplexed_model_id"


@pytest.fixture(autouse=True)
def tenants(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for tenant in TENANTS:
        control.registry.create_tenant(TenantId(tenant))
        control.registry.register(TenantId(tenant), tiny_weights(1.0), "tiny", TINY_SPECS)
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)


def bench(control: Any, *arguments: str) -> Result:
    if "--requests" not in arguments:
        arguments = ("--requests", "20", *arguments)
    return CliRunner().invoke(app, ["bench", "--url", control.url, "--concurrency", "2", *arguments])


def report(done: Result, code: int = 0) -> dict[str, Any]:
    assert done.exit_code == code, done.output + repr(done.exception)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sent(control: Any) -> dict[str, set[str]]:
    """Keys that were shown, by model."""
    found: dict[str, set[str]] = {}
    for headers in control.predicted:
        found.setdefault(headers[MODEL], set()).add(headers["authorization"].removeprefix("Bearer "))
    return found


def test_tenants_are_named_and_counted_apart(control: Any) -> None:
    assert report(bench(control, "--json"))["load"]["models"] == 3
    assert report(bench(control, "--json", "--count", "2"))["load"]["models"] == 2
    control.predicted.clear()
    assert report(bench(control, "--json", "--tenants", "42"))["load"]["models"] == 1
    assert set(sent(control)) == {"42"}
    control.predicted.clear()
    report(bench(control, "--json", "--tenants", " globex:canary, acme@1 ,", "--count", "1"))
    assert set(sent(control)) == {"globex:canary"}


@pytest.mark.parametrize(
    "arguments",
    [["--count", "4"], ["--tenants", "acme\r\nx: y"], ["--tenants", "Nobody!"], ["--tenants", ","]],
)
def test_what_can_not_be_asked_is_refused_before_the_run(control: Any, arguments: list[str]) -> None:
    assert isinstance(bench(control, *arguments).exception, InvalidInput | NotFound)
    assert not control.predicted


def test_each_tenants_own_key_is_shown(control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: control.registry.tenancy.create_key(TenantId(name)).text for name in ("acme", "globex")}
    file = tmp_path / "keys"
    file.write_text("# of the demo\n\n" + "\n".join(f" {key} " for key in keys.values()) + "\n")
    found = report(bench(control, "--json", "--keys", str(file)))
    assert found["servers"]["hits"] == {"device": 0, "host": 0, "peer": 0, "store": 0}, (
        "the operator's key asked these"
    )
    assert sent(control) == {name: {key} for name, key in keys.items()}
    control.predicted.clear()
    report(bench(control, "--json", "--keys", str(file), "--tenants", "acme,42"))
    assert sent(control) == {"acme": {keys["acme"]}, "42": {control.admin_key}}
    control.predicted.clear()
    monkeypatch.delenv("FLATSHARE_API_KEY")
    assert report(bench(control, "--json", "--keys", str(file)))["servers"] is None
    assert sent(control) == {name: {key} for name, key in keys.items()}
    control.predicted.clear()
    refused = bench(control, "--keys", str(file), "--tenants", "acme,42")
    assert isinstance(refused.exception, InvalidInput)
    assert "42" in str(refused.exception)
    assert not control.predicted


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "junk-that-is-secret\n", "fs_ADMIN.abcdefghij_" + "s" * 43]
)
def test_a_file_without_keys_is_refused_unseen(control: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    refused = bench(control, "--keys", str(file))
    assert isinstance(refused.exception, InvalidInput)
    assert str(file) in str(refused.exception)
    assert "secret" not in str(refused.exception)
    assert "sss" not in str(refused.exception)
    assert isinstance(bench(control, "--keys", str(tmp_path / "nowhere")).exception, InvalidInput)


def test_a_customer_may_bench_its_own_tenant(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = control.registry.tenancy.create_key(TenantId("globex")).text
    monkeypatch.setenv("FLATSHARE_API_KEY", key)
    found = report(bench(control, "--json"))
    assert (found["errors"], found["servers"]) == (0, None)
    assert "may not" in found["servers_unknown"]
    assert sent(control) == {"globex": {key}}
    done = bench(control)
    assert done.exit_code == 0, done.output
    assert "device    100.00%" in done.stdout
    assert "the servers' counts are not known: " in done.stdout


def test_a_report_is_printed_though_the_servers_can_not_be_asked_any_more(control: Any) -> None:
    original = control.predicted.append

    class Predicted(list[dict[str, str]]):
        def append(self, headers: dict[str, str]) -> None:
            control.held_back = True
            original(headers)

    control.predicted = Predicted()
    found = report(bench(control, "--json"))
    assert (found["requests"], found["errors"], found["servers"]) == (20, 0, None)
    assert "too many" in found["servers_unknown"]


@pytest.mark.parametrize(
    ("failures", "option", "code"),
    [
        (0, [], 0),
        (1, [], 1),
        (1, ["--max-errors", "0.1"], 0),
        (3, ["--max-errors", "0.1"], 1),
        (20, ["--max-errors", "1"], 1),
    ],
)
def test_a_share_of_failures_is_a_failure(control: Any, failures: int, option: list[str], code: int) -> None:
    control.failures += [503] * failures
    done = bench(control, "--json", *option)
    assert report(done, code)["errors"] == failures
    assert Counter(report(done, code)["errors_by_code"]) == Counter({"c503": failures} if failures else {})
    assert ("--max-errors" in done.stderr) == (code == 1 and failures < 20)


def test_what_the_edge_held_back_is_told_from_what_the_platform_refused(control: Any) -> None:
    control.failures += [429] * 5
    control.code = "too_many_refusals"
    done = bench(control, "--max-errors", "0.5")
    assert done.exit_code == 0
    assert "5 x too_many_refusals" in done.stdout
    assert "--keys" in done.stderr


def test_a_picture_that_can_not_be_drawn_costs_no_report(
    control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "run.png"
    picture.mkdir()
    done = bench(control, "--json", "--plot", str(picture))
    assert json.loads(done.stdout)["requests"] == 20
    assert isinstance(done.exception, OSError)


def test_what_was_sent_is_recorded_and_replayed_at_its_times(control: Any, tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    report(bench(control, "--json", "--record", str(file), "--tenants", "acme,42", "--zipf", "0"))
    first = [headers[MODEL] for headers in control.predicted]
    lines = file.read_text().splitlines()
    assert lines[0] == "time,tenant" and Counter(line.split(",")[1] for line in lines[1:]) == Counter(first)
    control.predicted.clear()
    file.write_text("time,tenant\n5.0,acme\n5.3,42\n5.1,acme\n")
    done = CliRunner().invoke(app, ["bench", "--url", control.url, "--json", "--trace", str(file)])
    found = report(done)
    assert (found["requests"], found["load"]["loop"], found["load"]["zipf"]) == (3, "trace", None)
    assert [headers[MODEL] for headers in control.predicted] == ["acme", "acme", "42"]
    assert found["seconds"] >= 0.25
    again = CliRunner().invoke(
        app, ["bench", "--url", control.url, "--json", "--trace", str(file), "--speed", "100"]
    )
    assert report(again)["seconds"] < 0.25
    shown = CliRunner().invoke(app, ["bench", "--url", control.url, "--trace", str(file), "--speed", "100"])
    assert shown.exit_code == 0 and "at the trace's times" in shown.stdout, shown.output
    nowhere = bench(control, "--record", "/nowhere/trace.csv")
    assert isinstance(nowhere.exception, InvalidInput)
    both = bench(control, "--trace", str(file), "--tenants", "acme")
    assert isinstance(both.exception, InvalidInput)


def test_plan_says_how_many_slots_a_hit_rate_needs(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("time,tenant\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(100)))
    run = CliRunner().invoke(app, ["plan", "--trace", str(file), "--slots", "1", "--target", "0.9", "--json"])
    assert run.exit_code == 0, run.output + repr(run.exception)
    found = json.loads(run.stdout)
    assert [(row["slots"], row["lru"]) for row in found["rows"]] == [(1, 0.0), (2, 1.0)]
    assert found["slots_needed"] == {"lru": 2, "sieve": 2}
    drawn = tmp_path / "plan.png"
    run = CliRunner().invoke(
        app, ["plan", "--tenants", "20", "--requests", "2000", "--target", "1", "--plot", str(drawn)]
    )
    assert run.exit_code == 0 and drawn.stat().st_size > 5000
    assert "first requests of a model always miss" in run.stdout or "needs" in run.stdout
    assert isinstance(CliRunner().invoke(app, ["plan", "--trace", "/nowhere"]).exception, InvalidInput)
