"""Who calls. Authentication comes with tenancy; until then every caller on loopback is the operator.

Its place is here and in ``InferenceService.predict``: the caller is known before the body is read
or anything is looked up, and one who goes round the edge to a replica's own port still meets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flatshare_registry.ids import ModelRef

__all__ = ["Caller", "identify"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may use models.

    Attributes
    ----------
    name
        For audit entries.
    """

    name: str

    def authorize(self, ref: ModelRef) -> None:
        """Allow the use of a ref; the operator may use all."""


OPERATOR = Caller("operator")


def identify(headers: Mapping[str, str]) -> Caller:
    """The caller that a request's headers stand for."""
    return OPERATOR
