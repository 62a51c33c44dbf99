"""The conformance suite on S3, over HTTP, and how S3's own failures come out."""

import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from flatshare_registry.errors import Unavailable
from flatshare_registry.stores.base import Create
from flatshare_registry.stores.s3 import S3Options, S3Store, make_s3_client
from flatshare_registry.testing.store_suite import BlobStoreSuite


def open_s3(url: str, bucket: str = "models", prefix: str | None = None, **options: object) -> S3Store:
    chosen = S3Options(endpoint_url=url, **options)
    return S3Store(make_s3_client(chosen), bucket, prefix or uuid.uuid4().hex, chosen)


class TestS3Store(BlobStoreSuite):
    @pytest.fixture
    def store(self, s3_url: str) -> S3Store:
        return open_s3(s3_url)


def test_a_missing_bucket_is_not_a_missing_object(s3_url: str) -> None:
    with pytest.raises(Unavailable, match="bucket does not exist"):
        open_s3(s3_url, bucket="no-such-bucket").get("k")


def test_an_endpoint_that_does_not_answer_is_unavailable_at_once() -> None:
    # Port 9 (discard) is closed on loopback: the connection is refused, each of the two tries.
    store = open_s3("http://127.0.0.1:9", connect_timeout_s=0.2, max_attempts=2)
    for call in (lambda: store.get("k"), lambda: store.head("k"), lambda: list(store.list(""))):
        with pytest.raises(Unavailable, match="can't be reached"):
            call()


def test_prefixes_do_not_see_each_other(s3_url: str) -> None:
    one, two = open_s3(s3_url, prefix="one"), open_s3(s3_url, prefix="one-b")
    one.put("k", b"1", Create())
    assert list(two.list("")) == []
    assert [meta.key for meta in one.list("")] == ["k"]


def test_writes_are_encrypted_when_asked(s3_url: str) -> None:
    store = open_s3(s3_url, prefix="sse", sse="AES256")
    store.put("k", b"1", Create())
    reply = make_s3_client(S3Options(endpoint_url=s3_url)).head_object(Bucket="models", Key="sse/k")
    assert reply["ServerSideEncryption"] == "AES256"


def test_the_test_server_lists_versions_without_copying_all_objects() -> None:
    """moto does, and an erasure beside 2 GB of models then takes all of a machine's memory."""
    server = subprocess.Popen(
        [sys.executable, "-m", "flatshare_registry.testing.s3_server", "--bucket", "models"],
        stdout=subprocess.PIPE,
        text=True,
    )

    def peak_mb() -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1000

    try:
        assert server.stdout is not None
        store = open_s3(server.stdout.readline().strip())
        for number in range(20):
            store.put(f"blobs/{number}", bytes([number]) * 5_000_000, Create())
        before = peak_mb()
        assert store.purge_all("nothing/") == 0
        assert peak_mb() - before < 30, "100 MB of objects"
        assert store.get("blobs/7").data[:3] == b"\7\7\7", "a listing leaves the objects as they are"
    finally:
        server.kill()
        server.wait()
