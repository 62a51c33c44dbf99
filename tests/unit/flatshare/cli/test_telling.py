"""A change is made in the store, then told to a platform: what is said, and the exit code, in every case."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner, Result

from flatshare.cli.context import Told, platform_url, tell_replicas
from flatshare.cli.errors import EXIT_CODES, NotTold, exit_code
from flatshare.cli.main import app
from flatshare.errors import FleetUnavailable, OtherStore
from flatshare.local.state import PlatformState
from flatshare.mnist.cnn import ARCHITECTURE
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import InvalidInput
from flatshare_registry.keys import parse_key
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.files import encode_safetensors

NOBODY = "http://127.0.0.1:9"
Serve = Callable[..., AbstractContextManager[Any]]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_STORE", (tmp_path / "store").as_uri())


def runs_here(url: str, port: int = 8000) -> None:
    """As `up` writes it of a platform of this process."""
    PlatformState(
        pid=os.getpid(), started_at=psutil.Process().create_time(), url=url, port=port, edge="haproxy",
        store="file:///s", replicas=2, slots=3, log="", ray_address="", family=(),
    ).save()  # fmt: skip


def weights(folder: Path) -> str:
    path = folder / "w.safetensors"
    tensors = {name: np.zeros(one.shape, dtype=np.float32) for name, one in ARCHITECTURE.tensors.items()}
    path.write_bytes(encode_safetensors(tensors))
    return str(path)


# -- a platform that takes it up


def test_a_change_is_told(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)
    assert "created tenant acme" in ok("tenants", "create", "acme", "--url", control.url)
    assert "2 replicas see it now" in ok("tenants", "suspend", "acme", "--url", control.url + "/")
    assert control.replicas.calls == ["refresh acme", "refresh acme"]


# -- a platform that refuses


@pytest.mark.parametrize("key", ["admin of another platform", "viewer", "none"])
def test_a_refused_key_is_said_and_is_no_success(
    control: Any, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    from flatshare_registry.keys import new_key

    control.registry.create_tenant(TenantId("acme"))
    texts = {"admin of another platform": new_key("ADMIN").text, "viewer": control.viewer_key, "none": ""}
    monkeypatch.setenv("FLATSHARE_API_KEY", texts[key])
    result = run("tenants", "suspend", "acme", "--url", control.url)
    assert isinstance(result.exception, NotTold), result.output
    assert exit_code(result.exception) == 8
    assert "acme is suspended; the platform was not told" in result.stdout
    assert "the change stands in the store" in str(result.exception)
    assert control.url in str(result.exception)
    assert "no running platform" not in result.output
    assert control.registry.head(TenantId("acme")).state == "suspended"


def test_a_platform_found_here_that_refuses_is_one_too(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    control.registry.create_tenant(TenantId("acme"))
    runs_here(control.url)
    monkeypatch.setenv("FLATSHARE_ADMIN_KEY", "wrong")
    with pytest.raises(NotTold):
        tell_replicas(control.registry, "acme", None).check()
    runs_here(NOBODY)  # it runs, says its process, and does not answer
    with pytest.raises(NotTold, match="nothing answers"):
        tell_replicas(control.registry, "acme", None).check()


def test_several_platforms_here_are_said_after_the_change(control: Any) -> None:
    control.registry.create_tenant(TenantId("acme"))
    runs_here(control.url)
    runs_here(NOBODY, 8001)
    result = run("tenants", "suspend", "acme")
    assert isinstance(result.exception, NotTold)
    assert "choose one with --url" in str(result.exception)
    assert "acme is suspended" in result.stdout


def test_what_is_wrong_on_this_machine_is_said_after_the_change_too(control: Any) -> None:
    control.registry.create_tenant(TenantId("acme"))
    runs_here(control.url)
    PlatformState.path(8000).write_text("{")
    result = run("tenants", "suspend", "acme")
    assert isinstance(result.exception, NotTold)
    assert "is damaged" in str(result.exception)
    assert control.registry.head(TenantId("acme")).state == "suspended"


@pytest.mark.parametrize(
    "verb",
    [
        ["tenants", "create", "globex"],
        ["tenants", "suspend", "acme"],
        ["tenants", "resume", "acme"],
        ["tenants", "delete", "acme", "--yes"],
        ["keys", "create", "acme"],
        ["keys", "revoke", "KEY"],
        ["keys", "rotate", "KEY"],
        ["quotas", "set", "acme", "burst=3"],
        ["promote", "acme@1"],
        ["rollback", "acme"],
        ["remove-alias", "acme", "canary"],
        ["delete-version", "acme@2"],
        ["register", "acme", "FILE"],
        ["register", "acme", "FILE", "--json"],
        ["tenants", "import", "FOLDER"],
    ],
)
def test_every_changing_verb_says_that_it_was_not_told(
    control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    from flatshare_registry.ids import AliasName
    from flatshare_registry.testing.files import TINY_SPECS, tiny_weights
    from flatshare_registry.transfer import export_tenant

    acme, registry = TenantId("acme"), control.registry
    elsewhere = Registry(MemoryStore())
    elsewhere.create_tenant(TenantId("comer"))
    export_tenant(elsewhere.store, TenantId("comer"), tmp_path / "out")
    registry.create_tenant(acme)
    for value in (1.0, 2.0):
        registry.register(acme, tiny_weights(value), "tiny", TINY_SPECS)
    for version in (2, 1):
        registry.set_alias(acme, AliasName("production"), version)
    registry.set_alias(acme, AliasName("canary"), 1)
    replaced = {
        "KEY": registry.tenancy.create_key(acme).id,
        "FILE": weights(tmp_path),
        "FOLDER": str(tmp_path / "out"),
    }
    monkeypatch.setenv("FLATSHARE_API_KEY", control.viewer_key)
    result = run(*[replaced.get(word, word) for word in verb], "--url", control.url)
    assert isinstance(result.exception, NotTold), result.output + repr(result.exception)
    assert result.stdout, "what was done is said all the same"


def test_no_replica_that_took_it_up_is_no_success(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)
    control.registry.create_tenant(TenantId("acme"))
    control.replicas.refreshed = []
    with pytest.raises(NotTold, match="none of 2 replicas"):
        tell_replicas(control.registry, "acme", control.url).check()
    control.states.clear()
    assert tell_replicas(control.registry, "acme", control.url) == Told("0 replicas see it now"), (
        "there are none to tell"
    )
    manage = control.registry.tenancy.create_key(TenantId("acme"), ["manage"]).text
    monkeypatch.setenv("FLATSHARE_API_KEY", manage)
    with pytest.raises(NotTold, match="no replica of the platform"):
        tell_replicas(
            control.registry, "acme", control.url
        ).check()  # this key may not ask how many there are


def test_a_preload_that_nobody_took_up_is_no_success(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)
    control.registry.create_tenant(TenantId("acme"))
    result = run("preload", "acme", "--url", control.url)
    assert isinstance(result.exception, FleetUnavailable)
    control.replicas.preloaded = ["r1"]
    assert "acme is resident on 1 replicas" in ok("preload", "acme", "--url", control.url)


# -- no platform


@pytest.mark.usefixtures("store")
def test_without_a_platform_a_change_is_a_success() -> None:
    assert "created tenant acme" in ok("tenants", "create", "acme", "--url", NOBODY)
    text = ok("tenants", "suspend", "acme", "--url", NOBODY)
    assert "no platform runs here to be told; one that starts" in text


@pytest.mark.usefixtures("store")
def test_an_address_that_does_not_answer_in_another_way_is_not_nobody() -> None:
    ok("tenants", "create", "acme", "--url", NOBODY)
    result = run("tenants", "suspend", "acme", "--url", "http://platform.invalid")
    assert isinstance(result.exception, NotTold)


def test_a_stranger_at_the_default_port_was_not_asked_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(MemoryStore())
    refusal = {"error": {"code": "unauthenticated", "message": "who?", "request_id": "r"}}
    with serve(lambda method, path: (401, {}, json.dumps(refusal).encode())) as site:
        monkeypatch.setenv("FLATSHARE_PORT", site.url.rpartition(":")[2])
        told = tell_replicas(registry, "acme", None)
        assert told.failure is None
        assert "no running platform was told (who?" in told.text
        monkeypatch.setenv("FLATSHARE_API_KEY", "abcdefgh")
        assert tell_replicas(registry, "acme", None).failure is not None, "a key is for a platform"


def test_the_port_of_the_settings_is_where_nobody_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform_url(None) == "http://127.0.0.1:8000"
    monkeypatch.setenv("FLATSHARE_PORT", "18931")
    assert platform_url(None) == "http://127.0.0.1:18931"


# -- something else at its address


STRANGERS = {
    "a web page": (200, {"content-type": "text/html"}, b"<html><body>It works!</body></html>"),
    "other JSON": (200, {"content-type": "application/json"}, b'{"status": "ok"}'),
    "other API": (200, {"content-type": "application/json"}, b'{"info": {"title": "Petstore"}}'),
    "a list": (200, {}, b"[]"),
    "nothing": (200, {}, b""),
    "a redirect": (302, {"location": "https://me:hunter2@login.example/"}, b""),
    "no such page": (404, {"content-type": "text/html"}, b"<h1>404</h1>"),
}


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("what", STRANGERS)
def test_something_else_at_the_address_is_said_before_anything_is_changed(
    serve: Serve, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("tenants", "create", "acme", "--url", NOBODY)
    monkeypatch.setenv("FLATSHARE_API_KEY", "fs_of_a_platform")
    with serve(lambda method, path: STRANGERS[what]) as site:
        for verb in (
            ["tenants", "suspend", "acme"],
            ["keys", "create", "acme"],
            ["tenants", "create", "globex"],
        ):
            result = run(*verb, "--url", site.url)
            assert isinstance(result.exception, InvalidInput), result.exception
            assert "Nothing was changed" in str(result.exception)
            assert "hunter2" not in str(result.exception)
        assert all("authorization" not in headers for headers in site.headers), "it was shown no key"
    assert len(json.loads(ok("audit", "acme", "--json"))) == 1


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("what", STRANGERS)
def test_something_else_that_was_found_out_too_late_hides_no_new_key(
    serve: Serve, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("tenants", "create", "acme", "--url", NOBODY)
    about = (200, {}, b'{"info": {"title": "flatshare control plane"}}')

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        return about if path.endswith("openapi.json") else STRANGERS[what]

    with serve(answer) as site:
        for verb in (["keys", "create", "acme"], ["keys", "create", "acme", "--json"]):
            result = run(*verb, "--url", site.url)
            assert isinstance(result.exception, NotTold), result.exception
            made = json.loads(result.stdout)["key"] if "--json" in verb else result.stdout.strip()
            assert parse_key(made).tenant == "acme"
        key_id = parse_key(made).id
        rotated = run("keys", "rotate", key_id, "--url", site.url)
        assert parse_key(rotated.stdout.strip()).tenant == "acme"
        assert isinstance(rotated.exception, NotTold)
        result = run("tenants", "suspend", "acme", "--url", site.url)
        assert isinstance(result.exception, NotTold)


def test_a_new_key_is_shown_before_the_platform_is_asked(
    control: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who interrupts a long wait has the key."""
    from flatshare.cli import tenancy_verbs

    control.registry.create_tenant(TenantId("acme"))

    def interrupted(tenant: str, url: str | None) -> Told:
        raise KeyboardInterrupt

    monkeypatch.setattr(tenancy_verbs, "tell_replicas", interrupted)
    result = run("keys", "create", "acme", "--url", control.url)
    assert result.exit_code != 0
    assert parse_key(result.stdout.splitlines()[0]).tenant == "acme"


READING = [
    ["replicas"], ["quotas", "show", "acme"], ["preload", "acme"], ["unpin", "acme"], ["unload", "acme"],
    ["predict", "acme", "BODY"], ["tenants", "erase", "acme", "--yes"], ["bench", "--requests", "1"],
    ["bench", "--tenants", "acme", "--requests", "1"],
]  # fmt: skip


@pytest.mark.parametrize("what", STRANGERS)
def test_every_verb_tells_a_stranger_from_a_platform(serve: Serve, tmp_path: Path, what: str) -> None:
    body = tmp_path / "body.json"
    body.write_text("{}")
    with serve(lambda method, path: STRANGERS[what]) as site:
        for verb in READING:
            result = run(*[str(body) if word == "BODY" else word for word in verb], "--url", site.url)
            assert isinstance(result.exception, InvalidInput), (verb, repr(result.exception))
            assert "not as a flatshare platform does" in str(result.exception)
            assert "hunter2" not in str(result.exception)


def test_a_proxy_that_answers_for_a_platform_is_not_a_stranger(serve: Serve) -> None:
    from flatshare.cli.context import call
    from flatshare_registry.errors import Unavailable

    with serve(lambda method, path: (502, {"content-type": "text/html"}, b"<html>")) as site:
        with pytest.raises(Unavailable, match="answered 502"):
            call("GET", site.url)


def test_the_exit_code_is_one_of_its_own() -> None:
    assert [kind for kind, code in EXIT_CODES.items() if code == 8] == [NotTold]
    shown = CliRunner().invoke(app, ["--help"])
    assert "8 changed in the store" in " ".join(shown.output.split())


# -- a platform of another store


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: Any) -> Path:
    """The environment names another store than the platform that runs here; both have a tenant acme."""
    control.registry.create_tenant(TenantId("acme"))
    monkeypatch.setenv("FLATSHARE_API_KEY", control.admin_key)
    monkeypatch.setenv("FLATSHARE_STORE", (tmp_path / "other").as_uri())
    runs_here(control.url)
    return tmp_path / "other"


def test_nobody_tells_a_platform_about_another_stores_tenants(control: Any, elsewhere: Path) -> None:
    for arguments in (
        ("tenants", "create", "acme"),
        ("tenants", "suspend", "acme"),
        ("keys", "create", "acme"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "serves another" in result.output or arguments[1] == "create"
    assert control.replicas.calls == []
    assert control.registry.head(TenantId("acme")).keys == {}


def test_an_erasure_of_another_stores_tenant_reaches_nobody(control: Any, elsewhere: Path) -> None:
    result = run("tenants", "erase", "acme", "--yes")
    assert isinstance(result.exception, OtherStore), result.output
    assert exit_code(result.exception) == 4
    assert control.registry.head(TenantId("acme")).state.exists
    assert control.replicas.calls == []


@pytest.mark.parametrize("verb", ["preload", "unload"])
def test_nor_are_models_of_another_store_moved(control: Any, elsewhere: Path, verb: str) -> None:
    assert isinstance(run(verb, "acme").exception, OtherStore)
    assert control.replicas.calls == []


def test_a_platform_that_is_named_is_asked_before_the_change(control: Any, elsewhere: Path) -> None:
    result = run("tenants", "create", "globex", "--url", control.url)
    assert isinstance(result.exception, InvalidInput)
    assert "serves another store. Nothing was changed" in result.exception.message
    assert not (elsewhere / "tenants").exists()
