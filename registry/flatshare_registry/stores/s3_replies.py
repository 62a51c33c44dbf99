"""What answers of S3 say, and those of look-alikes and of proxies in between, which say it differently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from flatshare_registry.errors import InvalidInput, Unavailable
from flatshare_registry.stores.base import BlobMeta, ByteRange

__all__ = ["cut", "etag_of", "http_date_s", "listed_meta", "range_header", "whole_size"]


def range_header(byte_range: ByteRange | None) -> dict[str, str]:
    """The arguments of a GET that ask for a range."""
    return {} if byte_range is None else {"Range": f"bytes={byte_range.start}-{byte_range.end - 1}"}


def etag_of(reply: Mapping[str, Any]) -> str:
    """An object's ETag, without the mark of a weak one.

    A proxy that compresses, or may, says ``W/"..."`` in its headers and not in listings, and no condition
    on a weak ETag holds. What is within the quotes is the store's own.
    """
    return str(reply["ETag"]).removeprefix("W/")


def listed_meta(item: Mapping[str, Any], prefix: str) -> BlobMeta:
    """One object of a listing, its key without the store's prefix."""
    name, modified = str(item["Key"]), item["LastModified"]
    return BlobMeta(name.removeprefix(prefix), etag_of(item), item["Size"], modified.timestamp())


def whole_size(reply: Mapping[str, Any]) -> int | None:
    """Length of the whole object, from a reply that holds all or a range of it; None if it does not say."""
    whole = str(reply.get("ContentRange", "")).rpartition("/")[2]
    if whole.isascii() and whole.isdigit() and len(whole) < 20:  # int() fails on thousands of digits
        return int(whole)
    return None if _is_partial(reply) else reply.get("ContentLength")


def cut(
    pieces: Iterable[bytes], reply: Mapping[str, Any], byte_range: ByteRange, key: str
) -> Iterator[bytes]:
    """A range's bytes, out of the body of a reply that holds it, or more, or all of the object.

    A store, or a proxy before it, may ignore that a range was asked for (RFC 9110 allows it) and send all.

    Raises
    ------
    InvalidInput
        The range does not lie within the object.
    Unavailable
        The reply holds another range.
    """
    size = whole_size(reply)
    if size is not None and byte_range.end > size:
        raise InvalidInput(f"range ends at {byte_range.end}, {key} has {size} bytes")
    at = _first_byte(reply, byte_range)
    if at > byte_range.start:
        raise Unavailable(f"the store was asked for byte {byte_range.start} of {key} and begins at {at}")
    for piece in pieces:
        wanted = piece[max(byte_range.start - at, 0) : max(byte_range.end - at, 0)]
        at += len(piece)
        if wanted:
            yield wanted
        if at >= byte_range.end:
            return
    if _is_partial(reply):
        raise Unavailable(f"the store sent less of {key} than it was asked for")
    raise InvalidInput(f"range ends at {byte_range.end}, {key} has {at} bytes")


def http_date_s(text: str) -> float:
    """POSIX seconds of an HTTP date; 0 when the endpoint sent none that can be read."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        return 0.0


def _is_partial(reply: Mapping[str, Any]) -> bool:
    return bool(reply["ResponseMetadata"]["HTTPStatusCode"] == 206)


def _first_byte(reply: Mapping[str, Any], asked: ByteRange) -> int:
    """Where in the object a reply's body begins."""
    if not _is_partial(reply):
        return 0
    first = str(reply.get("ContentRange", "")).rpartition(" ")[2].partition("-")[0]
    return int(first) if first.isascii() and first.isdigit() and len(first) < 20 else asked.start
