"""A key is in the request's header and nowhere else: not on a screen, not at a proxy, not in an exception."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flatshare.bench.client import Target
from flatshare.cli.context import call
from flatshare.cli.main import app
from flatshare.errors import BadInput, SettingsError
from flatshare.settings import load_settings
from flatshare_registry.errors import InvalidInput, Unavailable
from flatshare_registry.keys import new_key

KEY = new_key("acme").text
SECRET = KEY.rpartition("_")[2]
VERBS = [["replicas"], ["predict", "acme", "BODY"], ["bench", "--requests", "1"], ["keys", "create", "acme"]]
WRONG = {
    "two lines": f"{KEY}\nx: y", "two words": f"{KEY} {KEY}", "not ASCII": f"{KEY}é", "no text": f"{KEY}\udce9",
}  # fmt: skip


@pytest.fixture
def echo(serve: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """Answers in JSON; notes the headers."""
    with serve(lambda method, path: (200, {"content-type": "application/json"}, b"{}")) as site:
        yield site


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def shown(result: Result) -> str:
    """All that anybody could come to see: what was printed, and the exception with all that led to it."""
    texts, error = [result.output], result.exception
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(texts)


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t\n"], ids=repr)
def test_white_space_around_a_key_is_cut_off(echo: Any, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", end + KEY + end)
    call("GET", echo.url)
    assert echo.headers[0]["authorization"] == f"Bearer {KEY}"
    for name in ("api_key", "admin_key", "viewer_key"):
        assert getattr(load_settings(**{name: KEY + end}), name).get_secret_value() == KEY


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_key_with_characters_of_no_key_is_refused_unseen(
    echo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, verb: list[str]
) -> None:
    (tmp_path / "body.json").write_text("{}")
    monkeypatch.setenv("FLATSHARE_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("FLATSHARE_API_KEY", WRONG[wrong])
    body = str(tmp_path / "body.json")
    result = run(*[body if word == "BODY" else word for word in verb], "--url", echo.url)
    assert isinstance(result.exception, SettingsError), shown(result)
    assert "FLATSHARE_API_KEY" in str(result.exception)
    assert SECRET not in shown(result)
    assert not echo.asked


def test_what_the_other_side_repeats_of_a_key_is_not_shown(
    serve: Callable[..., AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", KEY)
    problem = {"error": {"code": "bad_input", "message": f"what is {KEY}?", "request_id": "r"}}
    with serve(lambda method, path: (400, {}, json.dumps(problem).encode())) as site:
        with pytest.raises(BadInput) as caught:
            call("GET", site.url)
        assert "what is" in str(caught.value)
        assert SECRET not in str(caught.value)


def test_an_address_with_a_password_is_refused_unseen(echo: Any) -> None:
    for url in (
        echo.url.replace("//", "//me:hunter2@"),
        "http://me:hunter2@127.0.0.1:9",
        "ftp://me:hunter2@x",
    ):
        with pytest.raises((InvalidInput, Unavailable)) as caught:
            call("GET", url)
        assert "hunter2" not in str(caught.value)
    assert not echo.asked, "httpx would have sent the password in the key's place"


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\nb", "é", "\udce9", "a\x00"])
def test_the_bench_client_sends_no_header_that_is_two(value: str) -> None:
    with pytest.raises(BadInput) as caught:
        Target.of("http://127.0.0.1:9/predict").request({"authorization": f"{SECRET}{value}"}, b"")
    assert SECRET not in str(caught.value)
    assert "authorization" in str(caught.value)
    with pytest.raises(BadInput):
        Target.of("http://127.0.0.1:9/predict").request({f"x{value}": "y"}, b"")


# -- proxies


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"])
def test_a_platform_in_clear_is_never_asked_through_a_proxy(
    echo: Any,
    serve: Callable[..., AbstractContextManager[Any]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", KEY)
    with serve(lambda method, path: (200, {}, b"{}")) as proxy:
        monkeypatch.setenv(name, proxy.url)
        call("GET", f"{echo.url}/admin/replicas")
        with pytest.raises(Unavailable):
            call("GET", "http://platform.invalid/admin/replicas")
        assert not proxy.asked
        assert echo.headers[0]["authorization"] == f"Bearer {KEY}"
        with pytest.raises(Unavailable):
            call("GET", "https://127.0.0.1:9/admin/replicas")
        with pytest.raises(Unavailable):
            call("GET", "https://localhost:9/admin/replicas")
        assert not proxy.asked, "loopback is this machine's, with TLS too"


@pytest.mark.parametrize("name", ["https_proxy", "ALL_PROXY"])
def test_a_platform_with_tls_may_be_behind_a_proxy(
    serve: Callable[..., AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FLATSHARE_API_KEY", KEY)
    with serve(lambda method, path: (502, {}, b"")) as proxy:
        monkeypatch.setenv(name, proxy.url)
        with pytest.raises(Unavailable):
            call("GET", "https://platform.invalid/admin/replicas")
        assert proxy.asked == ["CONNECT platform.invalid:443"]
        assert "authorization" not in proxy.headers[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:9"),
        ("HTTPS_PROXY", "gopher://me:hunter2@127.0.0.1:9"),
        ("https_proxy", "http://me:hunter2@127.0.0.1:port"),
        ("NO_PROXY", "[::1]"),
    ],
)
def test_a_proxy_that_cant_be_used_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, echo: Any, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    if name == "NO_PROXY":
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(SettingsError) as caught:
        call("GET", "https://platform.invalid/admin/replicas")
    assert name in str(caught.value)
    assert "hunter2" not in str(caught.value)
    call("GET", echo.url)  # loopback asks no proxy, so it is none of its business
