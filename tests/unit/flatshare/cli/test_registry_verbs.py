"""Registry verbs through the real command, on a folder store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from flatshare.cli.main import app
from flatshare.errors import SettingsError
from flatshare.mnist.cnn import ARCHITECTURE
from flatshare_registry.errors import (
    Corrupt,
    InvalidInput,
    InvalidRef,
    InvalidWeights,
    NotFound,
    StillReferenced,
)
from flatshare_registry.testing.files import encode_safetensors


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATSHARE_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("FLATSHARE_URL", "http://127.0.0.1:9")  # nobody: changes say so and still land
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def weights(folder: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    tensors = {name: random.random(one.shape, dtype=np.float32) for name, one in ARCHITECTURE.tensors.items()}
    path = folder / f"{seed}.safetensors"
    path.write_bytes(encode_safetensors(tensors))
    return str(path)


def test_a_tenants_life(tmp_path: Path) -> None:
    assert "created tenant acme" in ok("tenants", "create", "acme")
    assert "registered acme@1 (mnist-cnn, 4.8 MB)" in ok("register", "acme", weights(tmp_path, 1))
    assert "already registered as acme@1" in ok("register", "acme", weights(tmp_path, 1))
    second = json.loads(
        ok("register", "acme", weights(tmp_path, 2), "--alias", "canary", "--note", "by=ci", "--json")
    )
    assert (second["ref"], second["metadata"]) == ("acme@2", {"by": "ci"})
    assert "is now version 2" in ok("promote", "acme@2")
    listed = json.loads(ok("versions", "acme", "--json"))
    assert [(one["version"], one["aliases"]) for one in listed] == [(1, []), (2, ["canary", "production"])]
    assert "is version 1 again" in ok("rollback", "acme")
    assert "acme@1" in ok("versions", "acme")
    ok("remove-alias", "acme", "canary")
    ok("delete-version", "acme@2")
    assert "production=1" in ok("tenants", "list")
    assert "production=1" in ok("tenants", "show", "acme")
    assert "alias.rolled-back" in ok("audit", "acme")
    assert len(json.loads(ok("audit", "acme", "--json"))) == 7
    report = json.loads(ok("gc", "--json"))
    assert (report["removed"], report["spared"], report["live_blobs"]) == (False, 1, 1)
    assert "would delete" in ok("gc")
    ok("tenants", "delete", "acme", "--yes")
    assert json.loads(ok("tenants", "list", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tenants", "create", "Bad!"], InvalidRef),
        (["tenants", "show", "nobody"], NotFound),
        (["versions", "nobody"], NotFound),
        (["promote", "acme"], InvalidInput),
        (["promote", "acme:canary"], InvalidInput),
        (["promote", "acme@9"], NotFound),
        (["delete-version", "acme@1"], StillReferenced),
        (["register", "acme", "/no/such/file"], InvalidWeights),
        (["register", "acme", "/no/such/file", "-a", "gpt"], InvalidInput),
        (["register", "acme", "/no/such/file", "--note", "x"], InvalidInput),
        (["gc", "--grace-hours", "0"], InvalidInput),
        (["tenants", "list", "--store", "ftp://x"], InvalidInput),
    ],
)
def test_errors_come_as_ours(tmp_path: Path, arguments: list[str], error: type[Exception]) -> None:
    ok("register", "acme", weights(tmp_path, 1), "--create")
    result = run(*arguments)
    assert isinstance(result.exception, error), result.exception


@pytest.mark.parametrize("why", ["junk", "another network", "an alias", "a note", "an architecture"])
def test_a_refused_registration_leaves_no_tenant(tmp_path: Path, why: str) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"junk" if why == "junk" else encode_safetensors({"w": np.zeros(3, dtype=np.float32)}))
    good = weights(tmp_path, 1)
    arguments = {
        "junk": [str(bad)],
        "another network": [str(bad)],
        "an alias": [good, "--alias", "Not A Label"],
        "a note": [good, "--note", f"long={'x' * 5000}"],
        "an architecture": [good, "-a", "gpt"],
    }[why]
    result = run("register", "acme", *arguments, "--create")
    assert isinstance(result.exception, InvalidInput), result.exception
    assert json.loads(ok("tenants", "list", "--json")) == []
    ok("register", "acme", good, "--create")
    ok("register", "acme", good, "--create")


def test_tenants_may_be_called_as_a_sub_command(tmp_path: Path) -> None:
    for tenant in ("verify", "show", "acme"):
        ok("tenants", "create", tenant)
    for tenant in ("verify", "show", "acme"):
        shown = json.loads(ok("audit", "show", tenant, "--json"))
        assert [(one["tenant"], one["action"]) for one in shown] == [(tenant, "tenant.created")]
    assert json.loads(ok("audit", "verify", "--json"))["tenants"] == 3
    assert json.loads(ok("audit", "verify", "verify", "--json"))["links"].keys() == {"verify"}
    assert json.loads(ok("audit", "--json", "acme")) == json.loads(ok("audit", "acme", "--json"))
    assert "show" in ok("audit", "--help")
    assert isinstance(run("audit", "nobody").exception, NotFound)


def test_a_log_that_was_written_anew_is_found_by_a_link_that_was_kept(tmp_path: Path) -> None:
    ok("tenants", "create", "acme")
    shown = ok("audit", "verify", "acme")
    kept = shown.rpartition("last link ")[2].strip()
    assert json.loads(ok("audit", "verify", "--json"))["links"] == {"acme": kept}
    ok("register", "acme", weights(tmp_path, 1))
    assert "whole" in ok("audit", "verify", "acme", "--link", kept), "it is further up in the chain now"
    shutil.rmtree(tmp_path / "store")
    ok("tenants", "create", "acme")
    ok("audit", "verify", "acme")
    result = run("audit", "verify", "acme", "--link", kept)
    assert isinstance(result.exception, Corrupt)
    assert isinstance(run("audit", "verify", "--link", kept).exception, InvalidInput)


def test_no_store_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATSHARE_STORE")
    result = run("tenants", "list")
    assert isinstance(result.exception, SettingsError)
    assert "FLATSHARE_STORE" in str(result.exception)


def test_delete_asks_first(tmp_path: Path) -> None:
    ok("tenants", "create", "acme")
    result = CliRunner().invoke(app, ["tenants", "delete", "acme"], input="n\n")
    assert result.exit_code == 1
    assert "acme" in ok("tenants", "list")
