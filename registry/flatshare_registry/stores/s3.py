"""A store in an S3 bucket: plain boto3 against any endpoint that honours conditional writes.

Conditional puts are S3's own (``If-None-Match: *``, ``If-Match``), never check-then-set.
Amazon S3 has had them since 2024; MinIO, Ceph and moto have them too. Differences of look-alikes are made up
for where that is possible: whole objects in answer to a range, weak ETags, no listing of versions. All that
knows S3 is in this file, which makes it long.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from botocore.config import Config

from flatshare_registry.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Unavailable
from flatshare_registry.stores.base import (
    CHUNK_BYTES,
    BlobMeta,
    ByteRange,
    Create,
    PutMode,
    StoredBlob,
    UpdateIf,
    check_key,
    check_prefix,
)
from flatshare_registry.stores.conditions import check_conditions
from flatshare_registry.stores.s3_replies import (
    cut,
    etag_of,
    http_date_s,
    listed_meta,
    range_header,
    whole_size,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["S3Options", "S3Store", "make_s3_client"]

MAX_PUT_BYTES: Final = 5 * 1024**3
"""S3's limit for one PutObject, in bytes."""

CONFLICT_TRIES: Final = 5
"""Tries of a create that S3 answers with 409 (another conditional write of the key is under way)."""

_MISSING: Final = {"404", "NoSuchKey", "NotFound"}
_TRY_AGAIN: Final = {"409", "ConditionalRequestConflict", "OperationAborted"}
_LOST_RACE: Final = {"412", "PreconditionFailed", "304", "NotModified", *_TRY_AGAIN}
_NO_SUCH_CALL: Final = {"501", "NotImplemented", "405", "MethodNotAllowed"}
_OPERATOR: Final = {
    "NoSuchBucket": "the bucket does not exist; make it, or correct the store URL",
    "AccessDenied": "access denied; check the credentials and the bucket policy",
    "403": "access denied; check the credentials and the bucket policy",
    "InvalidAccessKeyId": "the access key is not known; check the credentials",
    "SignatureDoesNotMatch": "the secret key is wrong; check the credentials",
}

_Versions = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach S3; what is None comes from the usual AWS variables, files or instance role.

    Attributes
    ----------
    connect_timeout_s, read_timeout_s
        Seconds for one attempt; boto3's own 60 s would hold a replica's load slot far too long.
    max_attempts
        Tries in all, with backoff (botocore's ``standard`` retry mode).
    max_connections
        Connections kept by one client: concurrent requests beyond it wait.
    sse, sse_kms_key_id
        Server-side encryption for writes: ``AES256`` or ``aws:kms``, and its key.
    watch
        Called once with the client's events (``client.meta.events``), so that its calls can be observed.
    """

    endpoint_url: str | None = None
    region: str | None = None
    connect_timeout_s: float = 2.0
    read_timeout_s: float = 10.0
    max_attempts: int = 3
    max_connections: int = 32
    sse: str | None = None
    sse_kms_key_id: str | None = None
    watch: Callable[[Any], None] | None = None


def make_s3_client(options: S3Options) -> S3Client:
    """A boto3 client with timeouts and bounded retries; safe to share between threads.

    Raises
    ------
    InvalidInput
        A variable or a file of AWS's says what can't be; the message has its name.
    """
    try:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=options.region,
            config=Config(
                connect_timeout=options.connect_timeout_s,
                read_timeout=options.read_timeout_s,
                retries={"mode": "standard", "total_max_attempts": options.max_attempts},
                max_pool_connections=options.max_connections,
                # By default boto3 sends a checksum behind the body where there is TLS, in a framing
                # (aws-chunked) that many look-alikes refuse, or store as if it were the object. Puts have
                # Content-MD5 instead, which every S3 checks.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except botocore.exceptions.ProfileNotFound as error:
        name = _first_set("AWS_DEFAULT_PROFILE", "AWS_PROFILE") or "AWS's profile"
        raise InvalidInput(f"{name}: {_first_line(error)}") from error
    except botocore.exceptions.InvalidRegionError as error:
        name = "FLATSHARE_S3_REGION" if options.region else "AWS_DEFAULT_REGION, or AWS's configuration"
        raise InvalidInput(f"{name}: {_first_line(error)}") from error
    except botocore.exceptions.BotoCoreError as error:  # a file of AWS's; its path is in the text
        raise InvalidInput(f"the way to S3: {_first_line(error)}") from error
    except ValueError as error:  # botocore's word for an endpoint without scheme or host
        raise _bad_endpoint(options, str(error)) from None
    if urlsplit(client.meta.endpoint_url).scheme not in ("http", "https"):
        raise _bad_endpoint(options, client.meta.endpoint_url)
    if options.watch is not None:
        options.watch(client.meta.events)
    return client


def _bad_endpoint(options: S3Options, text: str) -> InvalidInput:
    """The error for an S3 endpoint that is no URL: where it was set, and its value without a password."""
    if options.endpoint_url:
        name = "FLATSHARE_S3_ENDPOINT_URL"
    else:
        name = _first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or os.environ.get(
            "AWS_CONFIG_FILE", "~/.aws/config"
        )
    endpoint = text.removeprefix("Invalid endpoint: ").rpartition("@")[2]
    return InvalidInput(f"{name}: {endpoint[:80]!a} is no endpoint; write http://host:port or https://host")


def _first_set(*names: str) -> str | None:
    return next((name for name in names if os.environ.get(name)), None)


_checking = threading.RLock()
_checked: set[str] = set()  # guarded by _checking: buckets that were found to honour conditions


class S3Store:
    """Objects below one prefix of a bucket.

    Parameters
    ----------
    client
        A boto3 S3 client (:func:`make_s3_client`).
    bucket, prefix
        Where; the prefix has no leading or trailing slash and may be empty.
    options
        Encryption of writes is read from here.
    """

    def __init__(self, client: S3Client, bucket: str, prefix: str, options: S3Options) -> None:
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._encryption: dict[str, str] = {}
        if options.sse is not None:
            self._encryption["ServerSideEncryption"] = options.sse
        if options.sse_kms_key_id is not None:
            self._encryption["SSEKMSKeyId"] = options.sse_kms_key_id

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        """See :class:`BlobStore`."""
        return self._get(key, range_header(byte_range), byte_range)

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        """See :class:`BlobStore`."""
        with self._translated(key):
            reply = self._client.get_object(
                Bucket=self._bucket, Key=self._key(key), **cast("Any", range_header(byte_range))
            )
            with contextlib.closing(reply["Body"]) as body:
                pieces = body.iter_chunks(CHUNK_BYTES)
                yield from pieces if byte_range is None else cut(pieces, reply, byte_range, key)

    def get_unless(self, key: str, etag: str) -> StoredBlob | None:
        """See :class:`BlobStore`."""
        try:
            return self._get(key, {"IfNoneMatch": etag}, None)
        except _NotModified:
            return None

    def head(self, key: str) -> BlobMeta:
        """See :class:`BlobStore`."""
        with self._translated(key):
            reply = self._client.head_object(Bucket=self._bucket, Key=self._key(key))
            return BlobMeta(key, etag_of(reply), reply["ContentLength"], reply["LastModified"].timestamp())

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        """See :class:`BlobStore`."""
        if len(data) > MAX_PUT_BYTES:
            raise InvalidInput(f"{key} has {len(data)} bytes; S3 takes {MAX_PUT_BYTES} in one put")
        condition: dict[str, str] = {}
        if isinstance(mode, Create):
            condition["IfNoneMatch"] = "*"
        elif isinstance(mode, UpdateIf):
            condition["IfMatch"] = mode.etag
        if condition:
            self._check_once()
        for left in reversed(range(CONFLICT_TRIES)):
            try:
                return self._put(key, data, mode, condition)
            except Conflict:
                # 409: two conditional writes met, and S3 asks to try again. For a create that ends in
                # success or in AlreadyExists; a lost compare-and-swap is the caller's to redo.
                if not isinstance(mode, Create):
                    raise
                if not left:
                    if self._is_there(key):  # some have 409 for 412
                        raise AlreadyExists(f"{key} already exists") from None
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    def _check_once(self) -> None:
        """Before a process's first conditional write: see that this bucket honours the condition."""
        place = f"{self._client.meta.endpoint_url}/{self._bucket}"
        with _checking:
            if place in _checked:
                return
            _checked.add(place)  # before: the check itself writes
            try:
                check_conditions(self)
            except BaseException:
                _checked.discard(place)
                raise

    def _put(self, key: str, data: bytes | memoryview, mode: PutMode, condition: dict[str, str]) -> BlobMeta:
        with self._translated(key, mode):
            reply = self._client.put_object(
                Bucket=self._bucket,
                Key=self._key(key),
                Body=bytes(data),
                ContentMD5=base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode(),
                # boto3's stubs type each keyword apart; these dicts hold only valid ones.
                **cast("Any", condition),
                **cast("Any", self._encryption),
            )
            date = reply["ResponseMetadata"]["HTTPHeaders"].get("date", "")
            return BlobMeta(key, etag_of(reply), len(data), http_date_s(date))

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        """See :class:`BlobStore`."""
        with self._translated(prefix or "the bucket"):
            for item in self._objects(self._prefix + check_prefix(prefix), after):
                meta = listed_meta(item, self._prefix)
                if meta.key > after:  # not every S3 knows StartAfter
                    yield meta

    def delete(self, key: str) -> None:
        """See :class:`BlobStore`."""
        with self._translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        """See :class:`BlobStore`: in a bucket with versioning a plain delete only hides an object."""
        name = self._key(key)
        with self._translated(key):
            found = self._versions(name, lambda: self._is_there(key))
            if found is not None:
                return self._remove(
                    one for one in found if one["Key"] == name and not (keep_latest and one["IsLatest"])
                )
            if keep_latest or not self._is_there(key):
                return 0
            self._client.delete_object(Bucket=self._bucket, Key=name)
            return 1

    def purge_all(self, prefix: str) -> int:
        """See :class:`BlobStore`."""
        if not check_prefix(prefix):
            raise InvalidInput("name a prefix: a whole store is not purged")
        start = self._prefix + prefix
        with self._translated(prefix):
            found = self._versions(start, lambda: any(True for _ in self._objects(start)))
            if found is not None:
                return self._remove(found)
            names = [item["Key"] for item in self._objects(start)]
            for name in names:
                self._client.delete_object(Bucket=self._bucket, Key=name)
            return len(names)

    def history(self, prefix: str) -> Iterator[str]:
        """See :class:`BlobStore`."""
        start = self._prefix + check_prefix(prefix)
        with self._translated(prefix or "the bucket"):
            found = self._versions(start, lambda: any(True for _ in self._objects(start)))
            if found is None:
                names = {item["Key"] for item in self._objects(start)}
            else:
                names = {one["Key"] for one in found if not one["IsMark"]}
            yield from sorted(name.removeprefix(self._prefix) for name in names)

    def shows_versions(self, key: str) -> bool:
        """See :class:`BlobStore`."""
        name = self._key(key)
        with self._translated(key):
            found = self._versions(name, lambda: self._is_there(key))
            return found is not None and any(one["Key"] == name for one in found)

    def _versions(self, start: str, is_any: Callable[[], bool]) -> _Versions | None:
        """Versions and delete markers of objects whose names begin with ``start``; None if the store can't
        list them.

        Parameters
        ----------
        is_any
            Whether there is an object whose name begins so: some stores mistake the request for another one,
            and answer it without any version.
        """
        found = self._ask_for_versions(start)
        if found != [] or not is_any():
            return found
        return self._ask_for_versions(start) or None  # it may have come between the two questions

    def _ask_for_versions(self, start: str) -> _Versions | None:
        pages = self._client.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=start)
        try:
            return [
                {**one, "IsMark": kind == "DeleteMarkers"}
                for page in pages
                for kind in ("Versions", "DeleteMarkers")
                for one in cast("Any", page).get(kind, [])
            ]
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in _NO_SUCH_CALL:
                return None
            raise

    def _remove(self, versions: Iterable[Mapping[str, Any]]) -> int:
        """Remove versions; returns how many, not counting delete markers."""
        removed = 0
        for one in versions:
            self._client.delete_object(Bucket=self._bucket, Key=one["Key"], VersionId=one["VersionId"])
            removed += not one["IsMark"]
        return removed

    def _objects(self, start: str, after: str = "") -> Iterator[Mapping[str, Any]]:
        """A plain listing of objects whose names begin with ``start`` and whose keys sort after ``after``."""
        extra = {"StartAfter": self._prefix + after} if after else {}
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=start, **cast("Any", extra)
        )
        for page in pages:
            yield from cast("Any", page.get("Contents", []))

    def _is_there(self, key: str) -> bool:
        try:
            self.head(key)
        except NotFound:
            return False
        return True

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _get(self, key: str, extra: dict[str, str], byte_range: ByteRange | None) -> StoredBlob:
        with self._translated(key, conditional="IfNoneMatch" in extra):
            reply = self._client.get_object(Bucket=self._bucket, Key=self._key(key), **cast("Any", extra))
            with contextlib.closing(reply["Body"]) as body:
                if byte_range is None:
                    data = body.read()
                else:
                    data = b"".join(cut(body.iter_chunks(CHUNK_BYTES), reply, byte_range, key))
            size = whole_size(reply)
            modified_s = reply["LastModified"].timestamp()
            return StoredBlob(
                data, BlobMeta(key, etag_of(reply), len(data) if size is None else size, modified_s)
            )

    @contextlib.contextmanager
    def _translated(
        self, what: str, mode: PutMode | None = None, *, conditional: bool = False
    ) -> Iterator[None]:
        """Turn botocore's errors into the registry's: the one exception map of this backend.

        Parameters
        ----------
        mode
            Of a put.
        conditional
            It is a read that may find nothing new.
        """
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if conditional and (code in ("304", "NotModified") or status == 304):
                raise _NotModified from error
            if code in _MISSING:
                if isinstance(mode, UpdateIf):
                    raise Conflict(f"{what} went meanwhile") from error
                raise NotFound(f"{what} does not exist") from error
            if isinstance(mode, Create | UpdateIf) and code in _LOST_RACE:
                if isinstance(mode, Create) and code not in _TRY_AGAIN:
                    raise AlreadyExists(f"{what} already exists") from error
                raise Conflict(f"{what} changed meanwhile") from error
            if code in ("InvalidRange", "416"):
                raise InvalidInput(f"the byte range does not lie within {what}") from error
            reason = _OPERATOR.get(code, f"S3 answered {code or status}")
            raise Unavailable(f"{self.url}: {reason}") from error
        except KeyError as error:  # every S3 sends these: an object without them can't be trusted to be ours
            raise Unavailable(f"{self.url}: S3's answer for {what} has no {error.args[0]}") from error
        except (botocore.exceptions.BotoCoreError, OSError) as error:
            # Covers refused connections, time-outs, cut bodies and missing credentials.
            raise Unavailable(f"{self.url} can't be reached: {_first_line(error)}") from error


class _NotModified(Exception):
    """S3 answered 304; stays within this module."""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
