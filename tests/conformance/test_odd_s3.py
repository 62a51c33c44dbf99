"""S3 look-alikes, and proxies in front of S3, that do some things otherwise: what the store makes of them."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import ipaddress
import ssl
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from flatshare_registry.errors import AlreadyExists, Conflict, InvalidInput
from flatshare_registry.stores.base import CHUNK_BYTES, ByteRange, Create, Overwrite, UpdateIf
from flatshare_registry.stores.s3 import S3Options, S3Store, make_s3_client
from flatshare_registry.testing.s3_server import local_s3
from flatshare_registry.testing.store_suite import BlobStoreSuite

from ..odd_s3 import ODDITIES, odd_s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@functools.cache  # a client takes a tenth of a second to make
def client_of(url: str) -> S3Client:
    return make_s3_client(S3Options(endpoint_url=url))


def open_s3(url: str) -> S3Store:
    return S3Store(client_of(url), "models", uuid.uuid4().hex, S3Options(endpoint_url=url))


Open = Callable[[str], S3Store]


@pytest.fixture(scope="module")
def odd(s3_url: str) -> Iterator[Open]:
    """Opens a store whose S3 has an oddity."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def url_of(oddity: str) -> str:
            return stack.enter_context(odd_s3(s3_url, ODDITIES[oddity]))[0]

        yield lambda oddity: open_s3(url_of(oddity))


class TestOddS3(BlobStoreSuite):
    """Every promise of a store holds on every such S3: what they do otherwise, S3 allows or we can mend."""

    test_list_is_whole_beyond_one_page = None
    """Not for each: it is a thousand writes, and paging is none of the oddities."""

    @pytest.fixture(params=["oddest", "other-oddest"])
    def store(self, odd: Open, request: pytest.FixtureRequest) -> S3Store:
        return odd(request.param)


# -- ranges


def test_a_range_is_cut_out_of_a_whole_answer(odd: Open) -> None:
    store = odd("range-ignored")
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256)
    store.put("k", data, Create())
    for start, end in ((0, 1), (5, 9), (CHUNK_BYTES - 3, 2 * CHUNK_BYTES + 7), (len(data) - 1, len(data))):
        blob = store.get("k", ByteRange(start, end))
        assert blob.data == data[start:end]
        assert blob.meta.size_bytes == len(data)
        pieces = list(store.chunks("k", ByteRange(start, end)))
        assert b"".join(pieces) == data[start:end]
        assert max(map(len, pieces)) <= CHUNK_BYTES
    for beyond in (ByteRange(len(data) - 1, len(data) + 1), ByteRange(len(data) + 5, len(data) + 9)):
        with pytest.raises(InvalidInput, match="range ends at"):
            store.get("k", beyond)
        with pytest.raises(InvalidInput, match="range ends at"):
            list(store.chunks("k", beyond))


# -- conditions


@pytest.mark.parametrize("oddity", ["lost-is-304", "lost-is-409", "weak-etags"])
def test_a_lost_condition_is_that_whatever_its_status(odd: Open, oddity: str) -> None:
    store = odd(oddity)
    first = store.put("k", b"1", Create())
    with pytest.raises((AlreadyExists, Conflict)):
        store.put("k", b"2", Create())
    store.put("k", b"3", UpdateIf(first.etag))
    with pytest.raises(Conflict):
        store.put("k", b"4", UpdateIf(first.etag))
    assert store.get("k").data == b"3"


def test_weak_etags_are_the_same_wherever_they_come_from(odd: Open) -> None:
    store = odd("weak-etags")
    etag = store.put("k", b"1", Create()).etag
    assert {etag, store.head("k").etag, store.get("k").meta.etag, next(store.list("")).etag} == {etag}
    assert store.get_unless("k", etag) is None


# -- versions


@pytest.fixture
def versioned() -> Iterator[str]:
    """A server whose bucket keeps versions."""
    with local_s3(bucket="models") as url:
        client = make_s3_client(S3Options(endpoint_url=url))
        client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
        yield url


@pytest.mark.parametrize("oddity", ["no-versions", "versions-ignored"])
def test_where_versions_cannot_be_listed_objects_go_all_the_same(odd: Open, oddity: str) -> None:
    store = odd(oddity)
    for key in ("tree/a", "tree/b/c", "tree-house", "k", "k/below"):
        store.put(key, b"1", Create())
    assert not store.shows_versions("k")
    assert store.purge("k", keep_latest=True) == 0
    assert store.purge("k") == 1
    assert store.purge("k") == 0
    assert sorted(store.history("tree/")) == ["tree/a", "tree/b/c"]
    assert store.purge_all("tree/") == 2
    assert list(store.history("tree/")) == []
    assert [meta.key for meta in store.list("")] == ["k/below", "tree-house"]


def test_where_versions_can_be_listed_that_is_said(versioned: str, s3_url: str) -> None:
    for url in (versioned, s3_url):
        store = open_s3(url)
        store.put("k", b"1", Overwrite())
        assert store.shows_versions("k")


# -- checksums over TLS


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A certificate for loopback, which boto3 trusts from now on."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "odd-s3")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "both.pem"
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + certificate.public_bytes(Encoding.PEM)
    )
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(certificate.public_bytes(Encoding.PEM))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def test_over_tls_an_object_arrives_byte_for_byte(s3_url: str, tls: ssl.SSLContext) -> None:
    data = b"head" * 1000
    with odd_s3(s3_url, ODDITIES["framing-kept"], tls=tls) as (url, seen):
        store = open_s3(url)
        store.put("k", data, Create())
        assert store.get("k").data == data
        assert b"".join(store.chunks("k", ByteRange(3, 9))) == data[3:9]
    puts = [one for one in seen if one.method == "PUT"]
    assert puts
    for one in puts:
        assert "aws-chunked" not in one.headers.get("content-encoding", "")
        assert not one.headers["x-amz-content-sha256"].startswith("STREAMING"), "a trailer"
        assert one.body == data
        assert base64.b64decode(one.headers["content-md5"]) == hashlib.md5(data).digest()
    gets = [one for one in seen if one.method == "GET"]
    assert gets
    assert not any("x-amz-checksum-mode" in one.headers for one in gets)


def test_without_our_settings_the_stand_in_shows_the_framing(s3_url: str, tls: ssl.SSLContext) -> None:
    """The test above can fail: a plain client's object arrives damaged here."""
    with odd_s3(s3_url, ODDITIES["framing-kept"], tls=tls) as (url, _):
        boto3.client("s3", endpoint_url=url).put_object(Bucket="models", Key="framed", Body=b"12345")
    framed = make_s3_client(S3Options(endpoint_url=s3_url)).get_object(Bucket="models", Key="framed")
    assert framed["Body"].read() != b"12345"
