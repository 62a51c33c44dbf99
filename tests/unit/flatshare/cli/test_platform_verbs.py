"""`up` looks at the machine before it starts anything: one line that says what is in the way."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from flatshare_registry.testing.ports import free_ports


class Machine:
    """The command in a state folder of its own, with free ports, and a Ray that nobody would start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ray_folder = folder / "ray"
        self.port, self.serve_port = free_ports(2)
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLATSHARE_", "RAY_")) and "proxy" not in name.lower()
        }
        self.environment = {
            **clean,
            "XDG_STATE_HOME": str(folder / "state"),
            "FLATSHARE_HOST_DIR": "off",
            "FLATSHARE_STORE": (folder / "store").as_uri(),
            "RAY_TMPDIR": str(self.ray_folder),
        }

    def run(
        self, *arguments: str, files: int | None = None, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        chosen = {
            name: value for name, value in {**self.environment, **environment}.items() if value is not None
        }
        limit = (
            None if files is None else (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
        )
        return subprocess.run(
            [sys.executable, "-m", "flatshare.cli.main", *arguments],
            env=chosen,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=limit,
        )

    def refused(self, *options: str, files: int | None = None, **environment: str | None) -> str:
        """What ``up`` says on one line, having started nothing."""
        ports = ["--port", str(self.port), "--serve-port", str(self.serve_port)]
        ports = [] if "--port" in options else ports
        done = self.run("up", *ports, "--ray", "local", *options, files=files, **environment)
        assert done.returncode in (2, 7), done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert not self.ray_folder.exists(), "Ray was started first"
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, done.stderr
        assert list(self.folder.rglob("platform-*.json")) == []
        return lines[0]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def pem(folder: Path, *parts: str) -> Path:
    """A PEM file of what is named: certificate, key, other-key, encrypted-key."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("key", "other-key")}
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(keys["key"].public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(keys["key"], hashes.SHA256())
    )
    made = {
        "certificate": certificate.public_bytes(Encoding.PEM),
        "encrypted-key": keys["key"].private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        ),
        **{
            one: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            for one, key in keys.items()
        },
    }
    path = folder / "edge.pem"
    path.write_bytes(b"".join(made[part] for part in parts) or b"nothing of the kind\n")
    return path


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "no certificate"),
        (["key"], "no certificate"),
        (["certificate"], "no private key"),
        (["certificate", "other-key"], "does not belong"),
        (["certificate", "encrypted-key"], "passphrase"),
    ],
)
def test_a_bad_certificate_file_is_named(machine: Machine, parts: list[str], says: str) -> None:
    path = pem(machine.folder, *parts)
    error = machine.refused("--tls-cert", str(path))
    assert says in error
    assert str(path) in error


def test_a_certificate_that_is_not_there_is_named(machine: Machine) -> None:
    for path, says in ((machine.folder / "nope.pem", "No such file"), (machine.folder, "directory")):
        error = machine.refused("--tls-cert", str(path))
        assert says in error
        assert str(path) in error


def test_too_few_open_files_are_refused(machine: Machine) -> None:
    error = machine.refused(files=600)
    assert "600" in error
    assert "ulimit -n" in error


def test_a_port_that_needs_privilege_is_not_called_taken() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest <= 80:
        pytest.skip("on this machine everybody may listen on port 80")
    said = as_a_stranger(
        "import encodings.idna\nfrom flatshare.local.checks import check_port",
        "check_port('port', '127.0.0.1', 80)",
        HOME="/nowhere",
    )
    assert "LocalError: port 80 needs privilege" in said
    assert "--port" in said


def as_a_stranger(imports: str, statement: str, **environment: str) -> str:
    """Last line of what a process without privilege, and without an entry in the list of users, says."""
    user = 4_000_001 if os.getuid() == 0 else os.getuid()
    code = f"import os\n{imports}\nif os.getuid() != {user}: os.setuid({user})\n{statement}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stderr.strip().splitlines()[-1]


def test_an_address_that_is_not_of_this_machine_is_named(machine: Machine) -> None:
    error = machine.refused("--host", "203.0.113.7")
    assert "203.0.113.7" in error
    assert "not an address of this machine" in error


def test_a_port_that_is_taken_on_another_address_is_found_too(machine: Machine) -> None:
    with socket.create_server(("127.0.0.2", machine.port)):
        assert f"port {machine.port} is taken" in machine.refused("--host", "127.0.0.2", "--auth", "on")


def test_a_host_tier_that_was_named_and_cannot_be_used_is_refused(machine: Machine) -> None:
    folder = machine.folder / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    error = machine.refused(FLATSHARE_HOST_DIR=str(folder))
    assert str(folder) in error
    assert "nobody else may write there" in error
    (machine.folder / "file").write_text("")
    error = machine.refused(FLATSHARE_HOST_DIR=str(machine.folder / "file" / "tier"))
    assert "host_dir" in error


@pytest.mark.skipif(
    os.getuid() != 0, reason="only root can be a user without an entry, as in a bare container"
)
def test_without_a_home_it_says_what_to_set() -> None:
    said = as_a_stranger("from flatshare.local.state import state_folder", "state_folder()")
    assert "LocalError" in said
    assert "XDG_STATE_HOME" in said
    assert "HOME" in said
    listed = as_a_stranger(
        "from flatshare.local.state import find_states", "raise SystemExit(f'found {find_states()}')"
    )
    assert listed == "found []", "a client of a platform elsewhere needs no home"
