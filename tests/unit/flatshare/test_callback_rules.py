"""Where callbacks may go."""

from __future__ import annotations

import pytest

from flatshare.callback_rules import CallbackRules, is_public
from flatshare.errors import BadInput

RULES = CallbackRules.parse("hooks.acme.com, *.Example.org,http://10.0.0.5:8080, https://[fd00::1]:9443/")


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.acme.com/x?y=1", "https://HOOKS.acme.com:443", "https://a.example.org/", "https://b.a.example.org",
        "http://10.0.0.5:8080/done", "https://[fd00::1]:9443/x",
    ],
)  # fmt: skip
def test_what_is_allowed(url: str) -> None:
    RULES.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.acme.com/x", "https://hooks.acme.com:8443/", "https://acme.com/", "https://example.org/",
        "https://evilexample.org/", "https://hooks.acme.com.evil.net/", "https://hooks.acme.com@evil.net/",
        "https://evil.net/#hooks.acme.com", "https://evil.net\\@hooks.acme.com/", "http://10.0.0.5/",
        "http://10.0.0.5:8081/", "http://u@10.0.0.5:8080/", "https://10.0.0.5:8080/", "file:///etc/passwd",
        "gopher://hooks.acme.com/", "https://", "https://hooks.acme.com/\r\nx: y", "https://h\xf6oks.acme.com/",
        "https://hooks.acme.com../", "https://a..example.org/", "https://" + "a" * 64 + ".example.org/",
        "https://-a.example.org/", "https://hooks.acme.com:x/", "https://[::1", "", "//hooks.acme.com", "https://hooks.acme.com/" + "x" * 2000,
    ],
)  # fmt: skip
def test_what_is_not(url: str) -> None:
    with pytest.raises(BadInput):
        RULES.check(url)


def test_any_host_is_a_choice_and_nobody_the_default() -> None:
    anybody = CallbackRules.parse("*")
    anybody.check("https://anything.net/x")
    anybody.check("https://93.184.215.14/x")
    for wrong in ("https://999.1.1.1/", "https://1.2.3/"):
        with pytest.raises(BadInput):
            anybody.check(wrong)
    with pytest.raises(BadInput, match="FLATSHARE_TASKS_CALLBACK_HOSTS"):
        CallbackRules().check("https://anything.net/x")


@pytest.mark.parametrize(
    "text", ["a/b", "ftp://x", "http://x/path", "*.a.*", "a b", "x:443", "http://u:p@x", "http://x:y"]
)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        CallbackRules.parse(text)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True), ("::ffff:93.184.215.14", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.0.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00::1", False),
        ("ff0e::1", False), ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False), ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False), ("2001:0:4136:e378::1", False), ("not an address", False),
        ("64:ff9b:1::7f00:1", False), ("::127.0.0.1", False), ("fec0::1", False), ("3fff::1", False), ("5f00::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
