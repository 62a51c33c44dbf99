"""API keys: their form, and how they are made and checked. A secret is shown once and stored nowhere.

    fs_<key id>_<secret>          fs_acme.q3v7k2m9d1_Jx0…   of a tenant; the id names whose
                                  fs_ADMIN.q3v7k2m9d1_…     of an operator; capitals can't be a tenant

The secret is 32 random bytes, so one plain SHA-256 of it is safe to store: there is nothing to guess
(a password would need a slow hash). The id says where to look: a replica that checks a key reads the
head of the tenant in the key, never of the tenant that the request names, so a key can't be used to
find out who else is a customer.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Final

from flatshare_registry.errors import InvalidInput, InvalidRef
from flatshare_registry.ids import TenantId

__all__ = ["NewKey", "PresentedKey", "is_valid", "new_key", "parse_key"]

SECRET_BYTES: Final = 32
_ID_CHARS: Final = "abcdefghijkmnpqrstuvwxyz23456789"
_KEY: Final = re.compile(r"fs_([A-Za-z0-9-]{1,63}\.[a-z0-9]{10})_([A-Za-z0-9_-]{43})", re.ASCII)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made.

    Attributes
    ----------
    text
        The whole key: give it to its owner, and keep it nowhere.
    """

    id: str
    text: str
    sha256: str

    def __repr__(self) -> str:
        """Without the secret: reprs end up in logs."""
        return f"NewKey({self.id})"


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key as somebody presented it; it has not been checked yet."""

    id: str
    sha256: str

    @property
    def owner(self) -> str:
        """Whose key it claims to be: a tenant's id, or an operator's role in capitals."""
        return self.id.partition(".")[0]

    @property
    def tenant(self) -> TenantId | None:
        """The tenant whose key it claims to be; None for an operator's."""
        try:
            return TenantId(self.owner)
        except InvalidRef:
            return None


def new_key(owner: str, *, once: str | None = None) -> NewKey:
    """A new random key of a tenant, or of an operator's role (in capitals).

    Parameters
    ----------
    once
        The request that the key is made for. A repeated request makes a key with the same id (and another
        secret), which shows that there is one already. None: a random id.
    """
    if once is None:
        chosen = [secrets.choice(_ID_CHARS) for _ in range(10)]
    else:
        digest = hashlib.sha256(f"{owner}\0{once}".encode()).digest()
        chosen = [_ID_CHARS[byte % len(_ID_CHARS)] for byte in digest[:10]]
    key_id = f"{owner}.{''.join(chosen)}"
    secret = secrets.token_urlsafe(SECRET_BYTES)
    return NewKey(key_id, f"fs_{key_id}_{secret}", _sha256(secret))


def parse_key(text: str) -> PresentedKey:
    """Take a key apart.

    Raises
    ------
    InvalidInput
        It does not look like a key; the message does not repeat it.
    """
    match = _KEY.fullmatch(text)
    if match is None:
        raise InvalidInput("this is not an API key; keys look like fs_<id>_<secret>")
    return PresentedKey(match[1], _sha256(match[2]))


def is_valid(presented: PresentedKey, sha256: str | None) -> bool:
    """Whether a key has the stored secret. Takes the same time for every wrong one, and for none."""
    return hmac.compare_digest(presented.sha256, sha256 or "-" * 64)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
