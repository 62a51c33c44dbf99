"""Shared by all tests: a clean environment, one S3 server a session, and no process that is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from flatshare_registry.testing.s3_server import CREDENTIALS, local_s3

from .leftovers import pytest_configure

settings.register_profile("flatshare", deadline=None)  # a busy machine is no fault of an example
settings.load_profile("flatshare")

__all__ = ["clean_environment", "pytest_configure", "s3_url"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caller's settings, and boto3 finds credentials that mean nothing."""
    for name in list(os.environ):
        if name.startswith("FLATSHARE_"):
            monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """Endpoint of an S3 server with a bucket ``models``; tests keep apart by prefix."""
    with local_s3(bucket="models") as url:
        yield url
