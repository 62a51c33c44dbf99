"""Store URLs: ``s3://bucket/prefix``, ``file:///path``, ``memory://name``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from flatshare_registry.errors import InvalidInput
from flatshare_registry.stores.base import BlobStore, check_key
from flatshare_registry.stores.local import LocalStore
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.stores.s3 import S3Options, S3Store, make_s3_client

__all__ = ["open_store"]

_FORMS: Final = "s3://bucket/prefix, file:///absolute/path or memory://name"
_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


def open_store(url: str, s3: S3Options | None = None) -> BlobStore:
    """Open the store that a URL names.

    Parameters
    ----------
    url
        ``s3://bucket/prefix``, ``file:///path`` (made when missing) or ``memory://name`` (shared
        by all who name it in this process).
    s3
        How to reach S3; by default what AWS's own variables say.

    Raises
    ------
    InvalidInput
        Not one of these forms. Nothing has been read or made by then; S3 is not contacted at all.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.username or parts.password:
        raise InvalidInput(f"a store URL is {_FORMS}, without credentials, query or fragment")
    match parts.scheme:
        case "s3" if parts.netloc:
            options = s3 or S3Options()
            prefix = parts.path.strip("/")
            if prefix:
                check_key(prefix)
            return S3Store(make_s3_client(options), parts.netloc, prefix, options)
        case "file" if parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            return LocalStore(Path(unquote(parts.path)))
        case "memory" if parts.path in ("", "/"):
            with _memory_lock:
                return _memory.setdefault(parts.netloc, MemoryStore(parts.netloc))
    raise InvalidInput(f"{url[:80]!a} is not a store URL; write {_FORMS}")
