"""`settings show` and `settings set`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flatshare.cli.main import app
from flatshare.errors import BadInput
from flatshare_registry.errors import InvalidInput


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def key(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)
    monkeypatch.setenv("FLATSHARE_URL", control.url)


def test_a_setting_is_changed_by_name_as_the_environment_has_it(control: Any) -> None:
    done = run("settings", "set", 'plans={"gold": {"burst": 3}}', "FLATSHARE_TENANT_SHARE=0.5", "--json")
    found = json.loads(done.stdout)
    assert (found["settings"]["tenant_share"], found["settings"]["plans"]["gold"]["burst"]) == (0.5, 3)
    assert json.loads(run("settings", "show", "--json").stdout)["settings"] == found["settings"]
    assert "changed 1 times" in run("settings", "show").output


def test_who_was_not_reached_is_named(control: Any) -> None:
    done = run("settings", "set", "tenant_share=0.5")
    assert "not told yet" not in done.output
    control.replicas.refreshed = []
    done = run("settings", "set", "tenant_share=0.4")
    assert "not told yet: r1, r2" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [("tenant_share", "'tenant_share' is not NAME=VALUE"), ("slots=3", "slots can't change in place")],
)
def test_what_can_not_change_is_refused(text: str, message: str) -> None:
    result = run("settings", "set", text)
    assert isinstance(result.exception, InvalidInput | BadInput)
    assert message in str(result.exception)
