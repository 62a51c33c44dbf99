"""Ids and refs: what the grammar takes, what it refuses, and how it says so."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatshare_registry.errors import InvalidRef
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId, parse_version

LABEL = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


@pytest.mark.parametrize("text", ["a", "acme", "a-b", "0", "a" * 63, "x--y"])
def test_tenant_ids(text: str) -> None:
    assert TenantId(text) == text


BAD_LABELS = ["", "-a", "a-", "A", "a_b", "a.b", "a" * 64, "ä", "a b", "a\n", "a\0", "../x", "a/b", "٣"]


@pytest.mark.parametrize("text", BAD_LABELS)
def test_bad_labels_are_refused_with_the_grammar(text: str) -> None:
    for kind in (TenantId, AliasName):
        with pytest.raises(InvalidRef, match="acme, acme:canary or acme@7"):
            kind(text)


def test_a_bare_tenant_means_production() -> None:
    assert ModelRef.parse("acme") == ModelRef(TenantId("acme"), PRODUCTION)
    assert ModelRef.parse("acme:production") == ModelRef.parse("acme")


@given(LABEL, LABEL, st.integers(1, 99_999_999))
def test_refs_round_trip(tenant: str, alias: str, version: int) -> None:
    for text in (f"{tenant}:{alias}", f"{tenant}@{version}", tenant):
        ref = ModelRef.parse(text)
        assert ModelRef.parse(str(ref)) == ref
        assert pickle.loads(pickle.dumps(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [*BAD_LABELS, "acme:", "acme@", "acme@0", "acme@01", "acme@-1", "acme@1.0", "acme@999999999", "acme@7:x",
     "acme:x@7", "acme:x:y", "acme@@7", ":x", "@7", "acme@seven", "acme@٧", "acme @7", "acme@7 "],
)  # fmt: skip
def test_bad_refs_are_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(InvalidRef, match="acme, acme:canary or acme@7"):
        ModelRef.parse(text)


def test_a_refusal_repeats_little_and_escapes_it() -> None:
    with pytest.raises(InvalidRef) as caught:
        ModelRef.parse("x\n[ERROR] forged log line " + "y" * 10_000)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


@given(st.text(max_size=100))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        ref = ModelRef.parse(text)
    except InvalidRef:
        return
    assert str(ref) == text or text == f"{ref.tenant}:production"


@pytest.mark.parametrize(
    "value", [True, "1.0", "", "+1", 0, -1, 10**9, 10**5000, -(10**5000), "9" * 5000, "0" * 5000 + "1"],
    ids=lambda value: str(type(value)),
)  # fmt: skip
def test_bad_version_numbers(value: object) -> None:
    with pytest.raises(InvalidRef):
        parse_version(value)  # type: ignore[arg-type]  # wrong types are the point
