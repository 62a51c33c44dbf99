"""A program for a test: the machine's, or Debian's package unpacked into a folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def program(name: str, package: str, folder: Path) -> str:
    """Path of a program that needs no library of the package's own. Skips where it can't be had."""
    if (path := shutil.which(name)) is not None:
        return path
    if shutil.which("apt-get") is None:
        pytest.skip(f"no {name} here, and no apt-get to fetch it with")
    got = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"no {name} here, and Debian's {package} can't be had: {got.stderr.strip()[-200:]}")
    for one in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", one, folder], check=True)
    return str(folder / "usr/bin" / name)
