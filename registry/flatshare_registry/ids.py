"""Ids and model refs: parsed once, at the door, into types that can be trusted from then on.

Grammar (shown in every refusal)::

    tenant   [a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?        a DNS label
    alias    the same                                  production when left out
    version  1, 2, 3 ... 99999999
    ref      tenant | tenant:alias | tenant@version    acme   acme:canary   acme@7
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from flatshare_registry.errors import InvalidRef

__all__ = ["MAX_VERSION", "PRODUCTION", "AliasName", "ModelRef", "TenantId", "parse_version"]

GRAMMAR: Final = (
    "write acme, acme:canary or acme@7 (tenant and alias: 1 to 63 of a-z, 0-9 and '-', "
    "not starting or ending with '-'; version: 1 to 99999999)"
)

MAX_VERSION: Final = 99_999_999

_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_VERSION: Final = re.compile(r"[1-9][0-9]{0,7}", re.ASCII)
_SHOWN_CHARS: Final = 80
"""How much of a refused value is repeated in the message: enough to recognise, too little to flood a log."""


def _shown(text: str) -> str:
    """The refused value, shortened, with control characters escaped (no log injection)."""
    return ascii(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


class _Label(str):
    """A DNS label; the constructor is the only way in, and it validates."""

    __slots__ = ()
    kind = "label"

    def __new__(cls, value: str) -> Self:
        if _LABEL.fullmatch(value) is None:
            raise InvalidRef(f"{_shown(str(value))} is not a valid {cls.kind}: {GRAMMAR}")
        return super().__new__(cls, value)


class TenantId(_Label):
    """A customer's id.

    Raises
    ------
    InvalidRef
        When the text is not a DNS label.

    Examples
    --------
    >>> TenantId("acme")
    'acme'
    """

    __slots__ = ()
    kind = "tenant id"


class AliasName(_Label):
    """A movable name for one of a tenant's versions.

    Raises
    ------
    InvalidRef
        When the text is not a DNS label.
    """

    __slots__ = ()
    kind = "alias"


PRODUCTION: Final = AliasName("production")
"""The alias that a bare tenant id means."""


def parse_version(text: str | int) -> int:
    """Version number from text.

    Raises
    ------
    InvalidRef
        When it is not one of 1 ... 99999999, written without sign or leading zero.
    """
    if isinstance(text, int):
        # Compared as a number: Python writes no number of more than 4,300 digits as text.
        if isinstance(text, bool) or not 1 <= text <= MAX_VERSION:
            shown = str(text) if abs(text) < 10**_SHOWN_CHARS else "a number of too many digits"
            raise InvalidRef(f"{shown} is not a version number: {GRAMMAR}")
        return text
    if _VERSION.fullmatch(text) is None:
        raise InvalidRef(f"{_shown(text)} is not a version number: {GRAMMAR}")
    return int(text)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What the model-id header carries: a tenant, and which of its versions.

    Attributes
    ----------
    tenant
        Whose model.
    selector
        An alias, or a version number. Exactly one of the two, so there is no empty state.

    Examples
    --------
    >>> ModelRef.parse("acme@7")
    ModelRef(tenant='acme', selector=7)
    >>> str(ModelRef.parse("acme:production"))
    'acme'
    """

    tenant: TenantId
    selector: AliasName | int

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Parse a ref.

        Raises
        ------
        InvalidRef
            With the grammar in its message. Nothing has been looked up by then.
        """
        if not isinstance(text, str):
            raise InvalidRef(f"{_shown(str(text))} is not a model ref: {GRAMMAR}")
        try:
            if "@" in text:
                tenant, _, number = text.partition("@")
                return cls(TenantId(tenant), parse_version(number))
            tenant, colon, alias = text.partition(":")
            return cls(TenantId(tenant), AliasName(alias) if colon else PRODUCTION)
        except InvalidRef:
            raise InvalidRef(f"{_shown(text)} is not a model ref: {GRAMMAR}") from None

    def __str__(self) -> str:
        """Canonical text: ``acme`` rather than ``acme:production``."""
        if isinstance(self.selector, int):
            return f"{self.tenant}@{self.selector}"
        return self.tenant if self.selector == PRODUCTION else f"{self.tenant}:{self.selector}"
