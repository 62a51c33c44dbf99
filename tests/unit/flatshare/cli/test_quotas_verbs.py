"""`quotas set` and `quotas show`: no plan that does not exist, and no change of a colleague's lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flatshare.cli.main import app
from flatshare_registry import TenantId
from flatshare_registry.errors import InvalidInput

ACME = TenantId("acme")
NOBODY = "http://127.0.0.1:9"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def tenant(control: Any) -> None:
    control.registry.create_tenant(ACME)


def test_an_unknown_plan_is_refused_by_the_platform_that_runs(
    control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)
    monkeypatch.setenv("FLATSHARE_PLANS", '{"bronze": {}}')  # another machine's: the platform knows
    result = run("quotas", "set", "acme", "burst=3", "--plan", "bronze", "--url", control.url)
    assert isinstance(result.exception, InvalidInput)
    assert str(result.exception).endswith(f"the platform at {control.url} knows default, gold, silver")
    assert control.registry.head(ACME).revision == 1, "and the limit with it was not set"
    for plan in ("gold", "default"):
        assert run("quotas", "set", "acme", "--plan", plan, "--url", control.url).exit_code == 0
        assert control.registry.head(ACME).plan == plan


@pytest.mark.parametrize("url", [NOBODY, "the platform, which refuses"])
def test_where_no_platform_can_be_asked_the_setting_here_counts(
    control: Any, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    address = NOBODY if url == NOBODY else control.url
    monkeypatch.setenv("FLATSHARE_API_KEY", control.registry.tenancy.create_key(ACME, ["manage"]).text)
    for plans, names in (("", "default"), ('{"bronze": {}}', "bronze, default")):
        monkeypatch.setenv("FLATSHARE_PLANS", plans)
        result = run("quotas", "set", "acme", "--plan", "gold", "--url", address)
        assert isinstance(result.exception, InvalidInput), result.exception
        assert "no platform could be asked" in str(result.exception)
        assert "FLATSHARE_PLANS" in str(result.exception)
        assert str(result.exception).endswith(f" {names}")
    assert run("quotas", "set", "acme", "--plan", "bronze", "--url", address).exit_code == 0
    assert control.registry.head(ACME).plan == "bronze"


def test_a_colleagues_change_meanwhile_stands(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatshare.cli import quotas_verbs

    changed, calls = quotas_verbs._changed, []

    def meanwhile(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            assert run("quotas", "set", "acme", "burst=10", "--url", NOBODY).exit_code == 0
        return changed(*arguments)

    monkeypatch.setattr(quotas_verbs, "_changed", meanwhile)
    assert run("quotas", "set", "acme", "requests_per_s=50", "--url", NOBODY).exit_code == 0
    quotas = control.registry.head(ACME).quotas
    assert (quotas.burst, quotas.requests_per_s) == (10, 50)


@pytest.mark.parametrize("limit", ["speed=3", "burst", "burst=many", "burst=-1"])
def test_a_limit_that_can_not_be_changes_nothing(control: Any, limit: str) -> None:
    assert isinstance(run("quotas", "set", "acme", limit, "--url", NOBODY).exception, InvalidInput)
    assert control.registry.head(ACME).revision == 1


def test_show_is_what_the_platform_holds(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", control.viewer_key)
    run("quotas", "set", "acme", "burst=3", "--plan", "gold", "--url", NOBODY)
    monkeypatch.setenv("FLATSHARE_PLANS", '{"gold": {}}')
    run("quotas", "set", "acme", "burst=3", "--plan", "gold", "--url", NOBODY)
    shown = json.loads(run("quotas", "show", "acme", "--url", control.url, "--json").stdout)
    assert (shown["plan"], shown["own"]["burst"], shown["effective"]["requests_per_s"]) == ("gold", 3, 100)
    lines = run("quotas", "show", "acme", "--url", control.url).stdout.splitlines()
    assert ["burst", "3", "3"] in [line.split() for line in lines]
    assert ["requests_per_s", "-", "100"] in [line.split() for line in lines]
