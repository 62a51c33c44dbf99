"""What is wrong with the environment's ways to S3 is said by the name of the variable or file."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatshare_registry.errors import InvalidInput
from flatshare_registry.stores.open import open_store
from flatshare_registry.stores.s3 import S3Options


@pytest.fixture(autouse=True)
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def refused(options: S3Options | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        open_store("s3://models/x", options)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "nope")
    assert f"{name}: " in refused()
    assert "nope" in refused()


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "value", ["localhost:9000", "127.0.0.1:9000", "http://", "ftp://x", "http://a b:9000"]
)
def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}: " in refused()
    assert value in refused()
    assert "FLATSHARE_S3_ENDPOINT_URL: " in refused(S3Options(endpoint_url=value))


def test_an_endpoint_with_a_password_is_not_shown() -> None:
    assert "hunter2" not in refused(S3Options(endpoint_url="me:hunter2@localhost:9000"))


@pytest.mark.parametrize("name", ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"])
@pytest.mark.parametrize("text", [b"[unclosed\n", b"key = without a section\n", b"\xff\xfe\x00"], ids=repr)
def test_a_file_that_can_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: bytes
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(text)
    monkeypatch.setenv(name, str(broken))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable, raising=False)
    assert str(broken) in refused()


def test_an_endpoint_of_the_config_file_that_is_no_url(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = localhost:9000\n")
    assert str(tmp_path / "config") in refused()


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_DEFAULT_REGION", "not a region"), ("AWS_MAX_ATTEMPTS", "many")]
)
def test_other_variables(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    if name == "AWS_MAX_ATTEMPTS":
        open_store("s3://models/x")  # ours is given, so nobody reads it
    else:
        assert "region" in refused()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9000", "https://s3.example/path", "http://[::1]:9000"])
def test_urls_are_taken(url: str) -> None:
    open_store("s3://models/x", S3Options(endpoint_url=url))
