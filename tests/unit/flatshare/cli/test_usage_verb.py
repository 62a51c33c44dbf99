"""``flatshare usage`` and ``versions --compare`` over what replicas wrote."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatshare.cli.main import app
from flatshare.cli.usage_verb import moment_of
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import InvalidInput, NotFound
from flatshare_registry.ids import TenantId
from flatshare_registry.stores.local import LocalStore
from flatshare_registry.usage import Used, UsedVersion, write_usage

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setenv("FLATSHARE_STORE", (tmp_path / "store").as_uri())
    found = LocalStore(tmp_path / "store")
    Registry(found).create_tenant(TenantId("acme"))
    one = {
        UsedVersion("acme", 1): Used(3, 1, 5, 1, 3000, 0.03, [4, 1]),
        UsedVersion("globex", 1): Used(1, 0, 1),
    }
    write_usage(found, NOW, "r1", one)
    write_usage(found, NOW, "r2", {UsedVersion("acme", 2): Used(1, 0, 1, 0, 1000, 0.02, [0, 0, 1])})
    write_usage(found, NOW - timedelta(days=3), "r1", {UsedVersion("acme", 1): Used(10)})
    return found


def ok(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def test_what_tenants_used_as_json_as_csv_and_as_a_table() -> None:
    document = json.loads(ok("usage", "--json"))
    assert document["tenants"] == [
        {"tenant": "acme", "requests": 4, "failed": 1, "rows": 6, "cold_loads": 1, "body_bytes": 4000, "seconds": 0.05},
        {"tenant": "globex", "requests": 1, "failed": 0, "rows": 1, "cold_loads": 0, "body_bytes": 0, "seconds": 0.0},
    ]  # fmt: skip
    (row,) = csv.DictReader(io.StringIO(ok("usage", "--csv", "--tenant", "acme", "--since", "7d")))
    assert (row["tenant"], row["requests"]) == ("acme", "14")
    table = ok("usage")
    assert "acme" in table and "12.5" in table, "ms a request"


def test_versions_are_compared() -> None:
    document = json.loads(ok("versions", "acme", "--compare", "--json"))
    assert [(one["version"], one["requests"], one["labels"]) for one in document["versions"]] == [
        (1, 3, [4, 1]),
        (2, 1, [0, 0, 1]),
    ]
    table = ok("versions", "acme", "--compare")
    for text in ("acme@1", "acme@2", "10.0", "20.0", "80.0", "33.3"):
        assert text in table, (text, table)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["usage", "--since", "soon"], InvalidInput), (["usage", "--since", "999999d"], InvalidInput), (["usage", "--since", "2999-01-01"], InvalidInput),
     (["usage", "--json", "--csv"], InvalidInput), (["versions", "nobody", "--compare"], NotFound)],
)  # fmt: skip
def test_what_makes_no_sense_is_said(arguments: list[str], error: type[Exception]) -> None:
    assert isinstance(CliRunner().invoke(app, arguments).exception, error)


def test_times_as_people_write_them() -> None:
    assert moment_of("90m", NOW) == NOW - timedelta(minutes=90)
    assert moment_of("2026-01-02", NOW) == datetime(2026, 1, 2, tzinfo=UTC)
    assert moment_of("2026-01-02T03:00+02:00", NOW) == datetime(2026, 1, 2, 1, tzinfo=UTC)
    assert moment_of("2026-01-02T03:00+02:00", NOW).hour == 1
