"""API keys: their form, their secrecy, and that only the right secret is good."""

from __future__ import annotations

import hashlib

import pytest

from flatshare_registry.errors import InvalidInput
from flatshare_registry.keys import is_valid, new_key, parse_key


def test_a_key_names_its_owner_and_is_good_only_with_its_own_secret() -> None:
    made, other = new_key("acme"), new_key("acme")
    presented = parse_key(made.text)
    assert (presented.id, presented.owner, presented.tenant) == (made.id, "acme", "acme")
    assert is_valid(presented, made.sha256)
    assert not is_valid(presented, other.sha256)
    assert not is_valid(presented, None)
    secret = made.text.removeprefix(f"fs_{made.id}_")
    assert hashlib.sha256(secret.encode()).hexdigest() == made.sha256
    assert len(secret) == 43, "32 random bytes"
    assert secret not in repr(made)
    assert made.text != other.text


def test_an_operators_key_is_no_tenants() -> None:
    presented = parse_key(new_key("ADMIN").text)
    assert (presented.owner, presented.tenant) == ("ADMIN", None)


@pytest.mark.parametrize(
    "text",
    ["", "fs_", "fs_acme_x", "acme", "fs_acme.q3v7k2m9d1_short", "fs_acme.q3v7k2m9d1_" + "x" * 44,
     "FS_acme.q3v7k2m9d1_" + "x" * 43, "fs_acme.q3v7k2m9d1_" + "ü" * 43, "fs_a/../b.q3v7k2m9d1_" + "x" * 43,
     "fs_acme.q3v7k2m9d1_" + "x" * 43 + "\n", "fs_" + "a" * 100 + ".q3v7k2m9d1_" + "x" * 43],
)  # fmt: skip
def test_what_is_not_a_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_key(text)
    assert "xxx" not in caught.value.message
